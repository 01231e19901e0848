"""Scores in many passes are those of one, and devices keep only their parts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.planning import arrays
from adapt_pruner_jax.pruning import (
  curvature,
  elimination,
  methods,
  passes,
  scores,
  surgery,
)
from adapt_pruner_jax.pruning.steps import _begin
from adapt_pruner_jax.pruning.task import PruneTask
from tests import small

N, T = 5, 8  # five minibatches of one window: passes of two, the last half full


def measured(score, pass_tokens, mesh=None):
  config = small.option("plain")
  task = PruneTask(
    config,
    small.random_params(config),
    Prune(group_importance=score, max_steps=1),
    samples=None,
    batch=1,
    pass_tokens=pass_tokens,
    mesh=mesh,
  )
  measure = methods.MEASURES[score]
  return measure(_begin(task), small.tokens(config, N, T))


@pytest.mark.parametrize(
  "score",
  [
    "taylor",
    *(
      pytest.param(s, marks=pytest.mark.slow)
      for s in ("taylor_mix", "curvature", "fisher", "random")
    ),
  ],
)
def test_passes_give_the_same_to_the_last_bit(score):
  one, three = (measured(score, tokens) for tokens in (N * T, 2 * T))
  assert len(one.losses_M) == N
  np.testing.assert_array_equal(three.losses_M, one.losses_M)
  if one.importance_L is not None:
    np.testing.assert_array_equal(three.importance_L, one.importance_L)
  for u, scores_LU in one.scores.items():
    np.testing.assert_array_equal(three.scores[u], scores_LU)


@pytest.mark.slow
@pytest.mark.parametrize("minibatches", [2, N])
def test_streams_in_the_hosts_memory_are_the_same_to_the_last_bit(
  minibatches, monkeypatch
):
  """With an option of the compiler's, as TPUs have one; it changes nothing. All
  passes are one program."""
  one = measured("taylor", N * T)
  option = {"xla_cpu_enable_fast_math": False}
  monkeypatch.setattr(placement, "hosted_options", lambda mesh: option)
  a_pass = passes.Pass(minibatches, hosted=True)
  monkeypatch.setattr(passes, "a_pass", lambda *_: a_pass)
  program = scores.PROGRAMS.hosted(sharding.one_device()).walk
  before = program._cache_size()
  hosted = measured("taylor", 0)
  jax.tree.map(np.testing.assert_array_equal, vars(hosted), vars(one))
  assert program._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("score", ["taylor", "curvature"])
def test_on_eight_devices(score):
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  one, three = measured(score, 0), measured(score, 2 * 4 * T, mesh)
  np.testing.assert_allclose(three.losses_M, one.losses_M, rtol=1e-5)
  for u, scores_LU in one.scores.items():
    np.testing.assert_allclose(three.scores[u], scores_LU, rtol=1e-3)


@pytest.mark.parametrize(
  "most, number, each", [(9, 1, 5), (2, 3, 2), (4, 2, 3)]
)
def test_equal_parts(most, number, each):
  tokens = small.tokens(small.CONFIG, 5, 3)
  parts = placement.passes(tokens, 1, small.one_device(), most)
  assert [t.shape for t, _ in parts] == [(each, 1, 3)] * number
  together = np.concatenate([t[v] for t, v in parts])
  np.testing.assert_array_equal(together, tokens)


def test_a_pass_is_what_fills_the_memory():
  """8B in bfloat16 on eight devices: half a GB each is 8192 tokens."""
  full = dataclasses.replace(
    small.CONFIG, hidden_size=4096, kv_groups=(8,) * 32, ffn_widths=(64,) * 32
  )
  mesh, kind = sharding.make_mesh(), jnp.dtype("bfloat16")
  most = functools.partial(passes.a_pass, full, kind, mesh=mesh)
  assert most((512, 64), 32, 0).minibatches * 32 * 64 == 8192
  assert most((512, 64), 32, 4096) == (2, False)
  assert most((512, 2048), 32, 0) == (1, False)  # whatever it takes


def test_the_host_of_tpus_keeps_more(monkeypatch):
  """Qwen3-30B-A3B in bfloat16: 24 GiB a device are 2^16 tokens."""
  monkeypatch.setattr(placement, "has_host_memory", lambda mesh: True)
  full = dataclasses.replace(
    small.CONFIG, hidden_size=2048, kv_groups=(8,) * 48, ffn_widths=(64,) * 48
  )
  mesh, kind = sharding.make_mesh(), jnp.dtype("bfloat16")
  most = functools.partial(passes.a_pass, full, kind, mesh=mesh)
  assert most((512, 2048), 16, 0) == (16, True)  # half of them, on eight
  assert most((8, 1024), 8, 0) == (1, False)  # fits a device
  assert most((512, 2048), 16, 2**17) == (4, False)


def test_one_pass_is_taken_where_it_holds_no_more_than_the_sums():
  """32768 tokens of that model take 2 GiB a device; more passes, and the sums
  are there as well."""
  full = dataclasses.replace(
    small.CONFIG, hidden_size=4096, kv_groups=(8,) * 32, ffn_widths=(64,) * 32
  )
  mesh, kind = sharding.make_mesh(), jnp.dtype("bfloat16")

  def tokens(handed_on):
    sums = lambda: jax.ShapeDtypeStruct((handed_on,), jnp.dtype("int8"))
    given = full, kind, (512, 64), 32, 0, mesh, sums
    return passes.a_pass(*given).minibatches * 32 * 64

  assert tokens(2**31) == 32768
  assert tokens(2**31 - 2**19) == 8192


# ---- What a device holds -----------------------------------------------------

F = 1048  # occurs nowhere else


@pytest.mark.slow
def test_no_device_has_all_of_a_sum(monkeypatch):
  """Gram matrices are reduced once a half, into rows; weights gathered once."""
  monkeypatch.setattr(elimination, "wanted", lambda mesh: mesh is not None)
  full = dataclasses.replace(
    small.option("plain"), hidden_size=64, ffn_widths=(F,) * 3
  )
  mesh = sharding.make_mesh()
  whole = sharding.replicated(mesh)
  array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
  units = full.units()
  args = (
    surgery.dense(full),
    arrays.stacked_params(full, jnp.dtype("float32"), mesh),
    {u: array((3, max(w)), bool) for u, w in units.items()},
    array((4, 8, 16), jnp.int32),
    array((4, 8), bool),
  )
  how = {"mesh": mesh}
  before = passes.sums(curvature.PROGRAMS, args[:3], (8, 16), how)
  handed_on = 3 * 4 * F * F // 8
  assert handed_on < arrays.size(before) < 1.1 * handed_on
  lowered = curvature.measure_step.lower(*args, before=before, **how)
  compiled = lowered.compile()
  text = compiled.as_text()
  assert not re.findall(rf"\[{F},{F}\]\S* all-(?:gather|reduce)\(", text)
  scattered = re.findall(rf"\[{F // 8},{F}\]\S* reduce-scatter\(", text)
  assert len(scattered) == 1  # in the body of the loop over layers
  # The sums so far, one layer's sum of this device's rows and a minibatch's.
  most = arrays.size(before) + 3 * 4 * F * F
  assert compiled.memory_analysis().temp_size_in_bytes < most
