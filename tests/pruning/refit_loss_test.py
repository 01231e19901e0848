"""The refit by the loss: against its own definition, and what it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import refit_loss, surgery
from tests import small

CONFIG = ModelConfig(
  family="llama",
  vocab_size=31,
  hidden_size=8,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(2,),
  ffn_widths=(16,),
  norm_eps=1e-5,
  rope=Rope(),
  context=16,
  tied=True,
)
TOKENS_NT = np.random.default_rng(0).integers(0, 31, (30, 9), np.int32)
MESH = sharding.one_device()
SETS_PNT = np.random.default_rng(1).integers(0, 31, (20, 30, 9), np.int32)
SETS_PNT[0] = TOKENS_NT


@pytest.fixture(scope="module")
def pairs():
  """A model, and the half of its channels in bfloat16."""
  rng = np.random.default_rng(0)
  draw = lambda name, _, leaf: jnp.asarray(
    rng.normal(1.0 if "norm" in name else 0, 0.4, leaf.shape), jnp.float32
  )
  params = axes.map_named(
    draw, model_config.abstract_params(CONFIG, jnp.float32)
  )
  kept = surgery.everything(CONFIG)
  stacked = surgery.expand(CONFIG, params, kept, CONFIG, MESH)
  left = kept | {"F": [np.arange(8)]}
  config, pruned = surgery.compact(stacked, left, CONFIG, MESH)
  stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), pruned)
  return (CONFIG, params), (config, stored)


def distance(dense, pruned, tokens_NT, temperature):
  """KL of both softmaxes, times the temperature's square, by hand."""
  logits = [
    Decoder(config).apply({"params": params}, tokens_NT)[0][:, :-1]
    for config, params in (dense, pruned)
  ]
  t, s = (
    jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in logits
  )
  return temperature**2 * jnp.sum(jnp.exp(t) * (t - s), axis=-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_held_out_loss_falls_and_types_stay(pairs, temperature):
  dense, pruned = pairs
  args = dense, pruned, SETS_PNT.__getitem__, 8, MESH
  how = {"passes": 20, "rate": 3e-3, "temperature": temperature}
  params, record = refit_loss.refit_loss(*args, **how)
  widened = jax.tree.map(lambda p: p.astype(jnp.float32), pruned[1])
  by_hand = distance(dense, (pruned[0], widened), TOKENS_NT[27:], temperature)
  assert record["before"] == pytest.approx(by_hand, rel=1e-2)  # bfloat16
  assert record["after"] < 0.9 * record["before"]
  assert record["tokens"] == 20 * 3 * 8 * 9  # of 27 and 30 rows, whole steps
  assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
    lambda p: (p.shape, p.dtype), pruned[1]
  )
  again, same = refit_loss.refit_loss(*args, **how)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert same == record


def test_weights_stay_where_the_loss_would_rise(pairs):
  dense, pruned = pairs
  args = dense, pruned, SETS_PNT.__getitem__, 8, MESH
  how = {"passes": 1, "rate": 3.0, "temperature": 1.0}
  params, record = refit_loss.refit_loss(*args, **how)
  assert record["after"] > record["before"]
  jax.tree.map(np.testing.assert_array_equal, params, pruned[1])


def test_the_balance_of_experts_is_not_judged():
  config = small.option("experts")
  params, tokens_NT = small.random_params(config), small.tokens(config, 20, 8)
  pair, how = (config, params), {"passes": 1, "rate": 1e-3, "temperature": 1.0}
  assert config.router_loss_on
  _, record = refit_loss.refit_loss(
    pair, pair, lambda _: tokens_NT, 1, MESH, **how
  )
  assert record["before"] == pytest.approx(0, abs=1e-5)


def test_too_few_windows(pairs):
  args = *pairs, lambda number: TOKENS_NT[:5], 8, MESH
  how = {"passes": 1, "rate": 1e-3, "temperature": 1.0}
  with pytest.raises(UserError, match="refit_samples="):
    refit_loss.refit_loss(*args, **how)


def test_each_pass_has_windows_of_its_own_and_the_held_out_are_never_seen():
  sets = SETS_PNT[0][:27], *SETS_PNT[1:3]
  seen = [
    row.tobytes()
    for batch in refit_loss._batches(sets.__getitem__, 4, 3, seed=7)
    for row in batch["tokens_BT"]
  ]
  whole = [[row.tobytes() for row in rows_NT] for rows_NT in sets]
  assert len(seen) == 6 * 4 + 7 * 4 + 7 * 4
  assert set(seen[:24]) < set(whole[0])
  assert set(seen[24:52]) < set(whole[1])
  assert len(set(seen)) == len(seen)
