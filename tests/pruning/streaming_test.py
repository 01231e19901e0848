"""Layers that lie in the host's memory while units are scored."""

import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, check
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.planning import memory
from adapt_pruner_jax.pruning import fisher, methods, targets
from adapt_pruner_jax.pruning.task import Masked, PruneTask, Step
from tests import small

CONFIG = small.CONFIG


@pytest.mark.slow
def test_the_same_prune():
  """Same scores, masks and weights, and only what is outside of the layers is
  on the device."""
  params = jax.device_put(small.random_params(CONFIG))
  tokens_NT = small.tokens(CONFIG, 6, 8, 1)
  found = []
  for streamed in (False, True):
    settings = Prune(method="fisher", ratio=0.2, stream_layers=streamed)
    given = jax.device_get(params) if streamed else params
    target = targets.resolve_target(CONFIG, settings)
    task = PruneTask(
      CONFIG, given, settings, lambda _: tokens_NT, target, batch=4
    )
    stacked = task.stacked()
    for x in stacked["layers"].values():  # all but norms
      held = x.sharding.memory_kind == placement.HOST
      assert held == (streamed and x.ndim > 2)
    assert stacked["embedding"].sharding.memory_kind != placement.HOST
    masked = Masked(task, stacked, Step(0, task.begin, None, 0))
    found.append((fisher.measure(masked, tokens_NT), methods.prune(task)))
  (one, pruned), (other, again) = found
  for u in "KF":
    np.testing.assert_allclose(one.scores[u], other.scores[u], rtol=1e-5)
  assert pruned.config == again.config
  jax.tree.map(np.testing.assert_array_equal, pruned.params, again.params)
  where = sharding.param_shardings(again.params, sharding.one_device())
  assert jax.tree.map(lambda x: x.sharding, again.params) == where


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fisher", "curvature", "adapt"])
def test_memory_is_that_of_few_layers(method):
  """Of eight times as many layers: what layers are given grows, and no more."""
  config = Config()
  config.prune.method, config.prune.stream_layers = method, True
  config.calibration.samples, config.calibration.batch = 2, 2
  config.calibration.seq_len = 8
  full = dataclasses.replace(
    CONFIG, hidden_size=128, kv_groups=(2,) * 4, ffn_widths=(256,) * 4
  )
  many = full.with_layers([0] * 32)
  less, more = (
    memory.scoring(config, c, sharding.one_device()) for c in (full, many)
  )
  streams = 2 * 28 * 2 * 8 * 128 * 4
  one_layer = 4 * 3 * 128 * 256
  norms = 28 * 2 * 128 * 4
  assert more["stacked copy"] - less["stacked copy"] == norms
  assert sum(more.values()) - sum(less.values()) < 2 * streams + one_layer
  assert "weights" not in more


def test_what_cannot_be_streamed():
  config = Config()
  config.prune = Prune(ratio=0.2, method="slicegpt", stream_layers=True)
  with pytest.raises(UserError, match=r"is not for prune\.method=slicegpt"):
    check(config)
  config.prune = Prune(ratio=0.2, refit="2", stream_layers=True)
  with pytest.raises(UserError, match=r"give --config\.prune\.refit=final"):
    check(config)
