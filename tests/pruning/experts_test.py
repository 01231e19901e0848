"""Channels inside experts: as many in each, of each its own best."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, experts, model_config
from adapt_pruner_jax.models import layer as driver
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import choice, methods, refit, surgery
from adapt_pruner_jax.pruning.baselines import reap
from adapt_pruner_jax.pruning.task import PruneTask
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
    ({"method": "reap", "refit": "final"}, "those of experts that reap drops"),
    ({"method": "adapt", "refit": "final", "refit_all": True}, "what they"),
  ):
    with pytest.raises(UserError, match=words):
      methods.check(CONFIG, Prune(**{"refit": "none", "ratio": 0.1, **changes}))
  methods.check(CONFIG, Prune(method="fisher", refit="loss"))
  methods.check(CONFIG, Prune(method="adapt", refit="final"))


@pytest.mark.slow
def test_pruned_to_the_channel():
  """In two stages: what the second leaves is the masked original.

  The first expert of each layer is never asked. Gradients come through the
  router's weights: it is worth nothing.
  """
  params, mesh = small.random_params(CONFIG), small.one_device()
  for i in range(CONFIG.num_layers):
    router_DX = params[axes.layer_name(i)]["router"]
    router_DX[:, 0] = 0  # two of the others are above
    router_DX[:, 2], router_DX[:, 4] = -router_DX[:, 1], -router_DX[:, 3]
  given = {"samples": lambda _: TOKENS, "batch": 3, "mesh": mesh}
  scored = []
  settings, target = Prune(method="adapt", refit="none"), int(SIZE * 0.7)
  note = lambda record, step: scored.append(step.scores["F"])
  first = methods.prune(
    PruneTask(
      CONFIG, params, settings, target=int(SIZE * 0.85), log=note, **given
    )
  )
  assert not scored[0][:, 0].any()
  assert (scored[0][:, 1:].sum(axis=(0, 2)) > 0).all()
  settings = Prune(method="fisher", refit="none")
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
def test_whole_experts_go_as_if_the_router_never_took_them(monkeypatch):
  """Those of the lowest weight times norm, a mean over their tokens."""
  params = small.random_params(CONFIG)
  settings = Prune(method="reap", refit="none")
  task = PruneTask(
    CONFIG, params, settings, lambda _: TOKENS, int(SIZE * 0.85), batch=4
  )
  worth_LX = reap.measure(task)
  pruned = methods.prune(task)
  assert pruned.config.experts == 4
  assert model_config.count_params(pruned.config) <= task.target
  gone_L = np.argmin(worth_LX, axis=1)
  for kept, gone in zip(pruned.kept["X"], gone_L, strict=True):
    assert kept.tolist() == [x for x in range(5) if x != gone]
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
  found = [[] for _ in range(5)]
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
    (CONFIG, {"ratio": 0.7}, "each token is sent to 2 of 5 experts"),
    (CONFIG, {"ratio": 0.2, "stages": 2}, "stages=1"),
  ):
    with pytest.raises(UserError, match=words):
      methods.check(config, Prune(method="reap", refit="none", **changes))


# ---- Least squares -----------------------------------------------------------


@pytest.fixture
def compile_fast():
  """Most of the time goes into compiling programs that run a few times."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_refit_of_each_expert_is_least_squares_on_its_own_tokens():
  """In NumPy, token by token; the first expert of the first layer has none.

  On eight devices too, each of which has sorted its own rows.
  """
  config = dataclasses.replace(
    CONFIG, kv_groups=(2, 2), ffn_widths=(8, 8), residual_scale=0.7
  )
  dense = small.random_params(config)
  router_DX = dense["layer_0"]["router"]
  router_DX[:, 0] = 0
  router_DX[:, 2], router_DX[:, 4] = -router_DX[:, 1], -router_DX[:, 3]
  kept = surgery.everything(config) | {"F": small.random_kept(config)["F"]}
  mesh, tokens = small.one_device(), small.tokens(config, 40, 8)
  pruned = surgery.gather(config, dense, kept, mesh)
  args = (config, dense), pruned, kept, tokens
  new, records = refit.refit(*args, 40)
  by_matrix = {(r["layer"], r["matrix"]): r for r in records}
  z_BTD = u_BTD = dense["embedding"][tokens]
  for i in range(2):
    name = f"layer_{i}"
    z_BTD, u_BTD = (
      half(*model, i, "K", x_BTD)
      for model, x_BTD in (((config, dense), z_BTD), ((pruned[0], new), u_BTD))
    )
    want = refit_by_hand(dense[name], pruned[1][name], z_BTD, u_BTD, 36)
    np.testing.assert_allclose(new[name]["moe_down"], want, atol=2e-4)
    record = by_matrix[i, "moe_down"]
    assert record["after"] < record["before"]
    z_BTD = half(config, dense, i, "F", z_BTD)
    u_BTD = half(pruned[0], new, i, "F", u_BTD)
  assert by_matrix[0, "moe_down"]["experts"] <= 4
  old = pruned[1]["layer_0"]["moe_down"]
  np.testing.assert_array_equal(new["layer_0"]["moe_down"][0], old[0])
  mesh = sharding.make_mesh(data=2, fsdp=4)
  place = lambda p: jax.device_put(p, sharding.param_shardings(p, mesh))
  pairs = [(config, place(params)) for config, params in args[:2]]
  many, _ = refit.refit(*pairs, kept, tokens, 40, mesh=mesh)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, new, many)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_refit_of_experts_with_norms_of_their_own():
  """What the first layer says comes nearer to what it said."""
  config = small.option("experts beside an MLP").with_layers([0])
  dense, tokens = small.random_params(config), small.tokens(config, 40, 8)
  kept = surgery.everything(config) | {"F": small.random_kept(config)["F"]}
  pruned = surgery.gather(config, dense, kept, small.one_device())
  new, _ = refit.refit((config, dense), pruned, kept, tokens, 40)
  x_BTD = half(config, dense, 0, "K", dense["embedding"][tokens])
  wanted, before, after = (
    half(model, params, 0, "F", x_BTD)
    for model, params in ((config, dense), pruned, (pruned[0], new))
  )
  lacks = [np.square(x - wanted).sum() for x in (before, after)]
  assert lacks[1] < 0.9 * lacks[0]


def test_experts_without_a_channel_say_nothing():
  """Nor do their output biases, which are no channel's."""
  config = dataclasses.replace(CONFIG, expert_bias=True)
  params = small.random_params(config)
  x_BTD = params["embedding"][TOKENS]
  masks = {"F": jnp.zeros(params["layer_0"]["moe_down"].shape[:2], bool)}
  masked = half(config, params, 0, "F", x_BTD, masks)
  np.testing.assert_array_equal(masked, x_BTD)
  assert np.abs(half(config, params, 0, "F", x_BTD) - x_BTD).max() > 0.01


def half(config, params, i, unit, x_BTD, masks=None):
  inputs = driver.attention_inputs(config, x_BTD.shape[1])
  weights, place = params[f"layer_{i}"], driver.place(config, i)
  return driver.run_half(unit, config, weights, place, inputs, x_BTD, masks)[0]


def refit_by_hand(dense, pruned, z_BTD, u_BTD, fit):
  """`moe_down` of a layer; of the rows from `fit` on, what is held out."""
  dense, pruned = (
    {n: np.asarray(x, np.float64) for n, x in layer.items()}
    for layer in (dense, pruned)
  )

  def normed(x_BTD):
    x_BTD = np.asarray(x_BTD, np.float64)
    size = np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5)
    return (x_BTD / size * dense["mlp_norm"]).reshape(-1, x_BTD.shape[-1])

  def channels(layer, expert, h_TD):
    gate = h_TD @ layer["moe_gate"][expert]
    return gate / (1 + np.exp(-gate)) * (h_TD @ layer["moe_up"][expert])

  h_TD, given_TD, T = normed(z_BTD), normed(u_BTD), z_BTD.shape[1]
  logits_TX = h_TD @ dense["router"]
  best_Tk = np.argsort(-logits_TX, axis=1)[:, :2]
  share_Tk = np.exp(np.take_along_axis(logits_TX, best_Tk, axis=1))
  share_Tk /= share_Tk.sum(1, keepdims=True)
  inputs, energies = [], []
  for expert in range(5):
    mine_T, place_T = np.nonzero(best_Tk == expert)
    x = channels(pruned, expert, given_TD[mine_T])
    inputs.append((mine_T, share_Tk[mine_T, place_T], x))
    energies.append((x**2).sum(1))
  most, new = 10 * np.median(np.concatenate(energies)), []
  for expert, (mine_T, share, x) in enumerate(inputs):
    W = pruned["moe_down"][expert]
    y = channels(dense, expert, h_TD[mine_T]) @ dense["moe_down"][expert]
    energy = np.maximum((x**2).sum(1), 1e-30)
    weight = share * np.sqrt(np.minimum(1, most / energy))
    A, b = x * weight[:, None], (y - x @ W) * weight[:, None]
    use = mine_T < fit * T
    number = max(use.sum(), 1)
    ridge = 0.1 * max(1, 20 * x.shape[1] / number)
    ridge *= np.median((A[use] ** 2).sum(0)) if use.any() else 0
    shrink = np.sqrt(ridge) * np.eye(x.shape[1])
    zeros = np.zeros_like(W)
    change, *_ = np.linalg.lstsq(
      np.concatenate([A[use], shrink]), np.concatenate([b[use], zeros])
    )
    lacks = [((b - A @ c)[~use] ** 2).sum() for c in (zeros, change)]
    new.append(W + change if lacks[1] < lacks[0] else W)
  return np.stack(new)
