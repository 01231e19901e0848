"""Channels inside experts: as many in each, of each its own best."""

import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import choice, methods, scores, surgery
from adapt_pruner_jax.pruning.task import Masked, PruneTask, Step
from tests import small

CONFIG = small.option("experts")
TOKENS = small.tokens(CONFIG, 6, 8)
SIZE = model_config.count_params(CONFIG)


def test_the_lowest_of_each_expert_go_together():
  s_LXF = np.array([[[3.0, 1, 2, 0], [5, 9, 7, 6]]])
  masks = {"K": np.ones((1, 1), bool), "F": np.ones((1, 2, 4), bool)}
  masks["F"][0, 0, 3] = masks["F"][0, 1, 1] = False  # what is gone is no worth
  found = {"K": np.ones((1, 1)), "F": s_LXF}
  order = choice.order(found, masks)
  assert order["F"][0].tolist() == [[1, 0], [2, 3], [0, 2]]
  worth = choice.in_order(s_LXF[0], masks["F"][0])
  assert worth.tolist() == [1 + 5, 2 + 6, 3 + 7]
  left = choice.remove(masks, order, {"K": [0], "F": [2]})
  assert surgery.widths(left)["F"].tolist() == [1]
  assert surgery.to_kept(left)["F"][0].tolist() == [[0], [2]]
  choice.put_back(left["F"], masks["F"] & ~left["F"], s_LXF, 0, 1)
  assert surgery.to_kept(left)["F"][0].tolist() == [[0, 2], [2, 3]]


def test_numberings_of_channels_in_experts():
  kept = small.random_kept(CONFIG)
  again = surgery.to_kept(surgery.to_masks(kept, CONFIG))
  jax.tree.map(np.testing.assert_array_equal, again, kept)
  left = {u: tuple(x[..., 1:] for x in units) for u, units in kept.items()}
  relative = surgery.relative_to(kept, left)
  for x in relative["F"]:
    assert x.tolist() == [list(range(1, x.shape[1] + 1))] * CONFIG.experts


def test_what_does_not_look_into_experts_is_refused():
  for changes, words in (
    ({"method": "flap"}, "mixture of experts, whose channels flap does not"),
    ({"method": "slicegpt"}, "whose channels slicegpt does not"),
    ({"method": "adapt", "refit": "final"}, "each of its experts sees tokens"),
  ):
    with pytest.raises(UserError, match=words):
      methods.check(CONFIG, Prune(**{"refit": "none", **changes}))
  methods.check(CONFIG, Prune(method="fisher", refit="loss"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapt", "fisher"])
def test_pruned_to_the_channel(method):
  """In two stages: the masked model of the second is the gathered one."""
  params, mesh = small.random_params(CONFIG), small.one_device()
  settings = Prune(method=method, refit="none")
  given = {"samples": lambda _: TOKENS, "batch": 3, "mesh": mesh}
  target = int(SIZE * 0.7)
  first = methods.prune(
    PruneTask(CONFIG, params, settings, target=int(SIZE * 0.85), **given)
  )
  task = PruneTask(
    first.config,
    first.params,
    settings,
    target=target,
    full=CONFIG,
    kept=first.kept,
    **given,
  )
  second = methods.prune(task)
  left = model_config.count_params(second.config)
  channel = model_config.unit_cost(CONFIG)["F"]
  assert channel == 3 * CONFIG.experts * CONFIG.hidden_size
  assert target - channel < left <= target
  assert len({*second.config.ffn_widths}) > 1  # a number for each layer
  masks = surgery.to_masks(second.kept, CONFIG)
  rows = [{tuple(row) for row in kept} for kept in second.kept["F"]]
  assert max(map(len, rows)) > 1  # of each expert other channels
  sizes = CONFIG.units()
  masked = axes.map_named(
    lambda n, i, x: (
      x
      if i is None
      else axes.mask(n, x, {u: masks[u][i][..., : sizes[u][i]] for u in sizes})
    ),
    params,
  )
  run = lambda config, params: Decoder(config).apply({"params": params}, TOKENS)
  want, got = run(CONFIG, masked)[0], run(second.config, second.params)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_expert_that_no_token_is_sent_to_is_worth_nothing():
  """Gradients go through the router's weights: scores are weighted by them."""
  config = dataclasses.replace(CONFIG, experts_per_token=1, router_norm=False)
  params = small.random_params(config)
  for i in range(config.num_layers):
    router_DX = params[axes.layer_name(i)]["router"]
    router_DX[:, 0], router_DX[:, 2] = 0, -router_DX[:, 1]  # one of both wins
  task = PruneTask(config, params, Prune(refit="none"), lambda _: TOKENS)
  stacked = surgery.expand(config, params, task.kept, config, task.mesh)
  masked = Masked(task, stacked, Step(0, task.begin, {}, SIZE))
  found = scores.measure(masked, TOKENS, kind="taylor").scores["F"]
  assert not found[:, 0].any()
  assert (found[:, 1:].sum(axis=(0, 2)) > 0).all()
