"""What a train step recomputes, and by which memory that is chosen."""

import dataclasses

import jax
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import layer_runs, remat
from adapt_pruner_jax.training import memory, step
from adapt_pruner_jax.training.stacking import Run
from tests import small

LLAMA = small.LLAMA_8B


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def chosen(config, shape, gigabytes, **settings):
  args = Train(**settings), config, None, shape, one_device()
  return memory.with_remat(*args, gigabytes * 1e9).remat


def test_chosen_by_memory():
  assert chosen(small.SMOLLM2_135M, (1, 512), 8) == "none"
  assert chosen(LLAMA, (8, 4096), 95) == "full"
  assert chosen(LLAMA, (8, 4096), 1e6, remat="full") == "full"
  # Between all and nothing, as memory shrinks.
  names = [chosen(small.SMOLLM2_135M, (8, 2048), gb) for gb in (40, 17, 8, 4)]
  assert names == [*remat.ON_DEVICE]


def test_what_the_stream_carries_is_kept_too():
  """What layers are told of tokens, and the keys and values that they share."""
  config, mesh = small.option("shared"), one_device()
  none = {"told": 0, "told_layers": 0, "reuses": (), "reused_groups": (0, 0)}
  bare = dataclasses.replace(config, **none)
  settings, shape = Train(remat="full", dtype="float32"), (2, 8)
  more = memory.kept(config, settings, shape, mesh)
  more -= memory.kept(bare, settings, shape, mesh)
  in_front = 5 * 3 + 2 * 4 * config.head_dim
  assert more == 4 * 2 * 8 * config.num_layers * in_front


def products(jaxpr):
  """Matrix products in a program; those of a loop count once."""
  inside = jax.tree.leaves([list(e.params.values()) for e in jaxpr.eqns])
  inside = [getattr(x, "jaxpr", x) for x in inside]
  own = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
  return own + sum(products(x) for x in inside if hasattr(x, "eqns"))


@pytest.mark.parametrize("runs", [(), (Run(0, 3, 4, 40),)])
def test_products_computed_twice(runs):
  """Of a layer's seven and attention's two; each is one forward, two back."""
  config, mesh = small.CONFIG, one_device()
  layers = len(config.kv_groups)
  found = {}
  for name in remat.NAMES:
    settings = Train(remat=name, attention="plain")
    trained, _ = step.abstract_state(config, settings, mesh, 0, runs)
    loss = step.make_loss(config, settings, mesh, None)
    batch = step.abstract_batch(2, 16, mesh)
    program = jax.make_jaxpr(
      jax.grad(lambda p, b, f=loss: f(p, None, None, b, 1)[0])
    )
    found[name] = products(program(trained, batch).jaxpr)
  number = 1 if runs else layers
  assert layer_runs.bounds(trained) == tuple((r.first, r.end) for r in runs)
  extra = {n: (found[n] - found["none"]) / number for n in remat.NAMES[1:]}
  # `down` need not be made again; nor need `o`, between kept halves.
  assert extra == {"dots": 2, "attention+mlp": 7, "full": 8, "offload": 8}
