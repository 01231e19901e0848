"""Channels inside experts: as many in each, of each its own best."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, experts, model_config
from adapt_pruner_jax.models import layer as driver
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import choice, methods, scores, surgery
from adapt_pruner_jax.pruning.baselines import reap
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
    (
      {"method": "adapt", "refit": "final"},
      "each expert sees tokens",
    ),
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


@pytest.mark.slow
def test_whole_experts_go_as_if_the_router_never_took_them(monkeypatch):
  """Those of the lowest weight times norm, a mean over their tokens."""
  params = small.random_params(CONFIG)
  settings = Prune(method="reap", refit="none")
  task = PruneTask(
    CONFIG, params, settings, lambda _: TOKENS, int(SIZE * 0.8), batch=4
  )
  worth_LX = reap.measure(task)
  pruned = methods.prune(task)
  assert pruned.config.experts == 3
  assert model_config.count_params(pruned.config) <= task.target
  gone_L = np.argmin(worth_LX, axis=1)
  for kept, gone in zip(pruned.kept["X"], gone_L, strict=True):
    assert kept.tolist() == [x for x in range(4) if x != gone]
  by_hand = worth_by_hand(params)
  np.testing.assert_allclose(worth_LX[0], by_hand, rtol=1e-4)
  got = Decoder(pruned.config).apply({"params": pruned.params}, TOKENS)[0]
  routes, plain = iter(gone_L), experts.route

  def never(config, weights, h_TD):
    infinite = jnp.zeros(config.experts).at[next(routes)].set(-jnp.inf)
    top_k = jax.lax.top_k
    monkeypatch.setattr(jax.lax, "top_k", lambda x, k: top_k(x + infinite, k))
    found = plain(config, weights, h_TD)
    monkeypatch.setattr(jax.lax, "top_k", top_k)
    return found

  monkeypatch.setattr(experts, "route", never)
  want = Decoder(CONFIG).apply({"params": params}, TOKENS)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def worth_by_hand(params):
  """Of the experts of the first layer, token by token."""
  _, stream = Decoder(CONFIG).apply({"params": params}, TOKENS)
  weights = params["layer_0"]
  inputs = driver.attention_inputs(CONFIG, TOKENS.shape[1])
  args = CONFIG, weights, driver.place(CONFIG, 0), inputs, stream[0]
  x_BTD, _ = driver.run_half("K", *args)
  h_TD = driver.norm(CONFIG, weights, "mlp_norm", x_BTD).reshape(-1, 16)
  logits_TX = np.asarray(h_TD @ weights["router"], np.float64)
  found = [[] for _ in range(4)]
  for h_D, logits_X in zip(np.asarray(h_TD), logits_TX, strict=True):
    best = np.argsort(-logits_X)[:2]
    share = np.exp(logits_X[best]) / np.exp(logits_X[best]).sum()
    for expert, g in zip(best, share, strict=True):
      gate_F = h_D @ weights["moe_gate"][expert]
      up_F = h_D @ weights["moe_up"][expert]
      fed_F = gate_F / (1 + np.exp(-gate_F)) * up_F
      said_D = fed_F @ weights["moe_down"][expert]
      found[expert].append(g * np.linalg.norm(said_D))
  return [np.mean(x) for x in found]


def test_what_the_result_of_reap_would_break_is_refused():
  for config, changes, words in (
    (small.CONFIG, {}, "llama has none"),
    (CONFIG, {"ratio": 0.7}, "each token is sent to 2 of 4 experts"),
    (CONFIG, {"ratio": 0.2, "stages": 2}, "stages=1"),
  ):
    with pytest.raises(UserError, match=words):
      methods.check(config, Prune(method="reap", refit="none", **changes))
