"""Refit against least squares in NumPy, written down independently."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, decoder, layer, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import (
  least_squares,
  linear_algebra,
  normal_equations,
  refit,
  streams,
  surgery,
)
from tests import small

CONFIG = ModelConfig(
  family="llama",
  vocab_size=31,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(3, 3),
  ffn_widths=(24, 24),
  norm_eps=1e-5,
  rope=Rope(),
  context=16,
  tied=True,
  residual_scale=0.7,
)
KEPT = {
  "K": (np.array([0, 2]), np.array([1])),
  "F": (np.arange(3, 20), np.arange(0, 24, 2)),
}
TOKENS = np.random.default_rng(0).integers(
  0, CONFIG.vocab_size, (40, 8), np.int32
)


def random_params(config, seed=0):
  """Weights of a size at which half layers matter."""
  rng = np.random.default_rng(seed)

  def draw(name, _, leaf):
    if "norm" in name:
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    return jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32)

  return axes.map_named(draw, model_config.abstract_params(config, jnp.float32))


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def pair():
  """A dense model, and what pruning leaves of it."""
  params = random_params(CONFIG)
  return (CONFIG, params), surgery.gather(CONFIG, params, KEPT, one_device())


def to_numpy(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# ---- A LLaMA in NumPy --------------------------------------------------------


def norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def heads(layer, x):
  """The input of `o`, [B, T, K * G * H]; one rotary embedding for all."""
  B, T, D = x.shape
  h = norm(x, layer["attn_norm"])
  q = np.einsum("btd,dkgh->btkgh", h, layer["q"])
  k = np.einsum("btd,dkh->btkh", h, layer["k"])
  v = np.einsum("btd,dkh->btkh", h, layer["v"])
  half = q.shape[-1] // 2
  angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(half) / half)

  def turn(y, angle):
    a, b = y[..., :half], y[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  q = turn(q, angle[:, None, None])
  k = turn(k, angle[:, None])
  score = np.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(q.shape[-1])
  score = np.where(np.tri(T, dtype=bool), score, -np.inf)
  share = np.exp(score - score.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  return np.einsum("bkgts,bskh->btkgh", share, v).reshape(B, T, -1)


def channels(layer, x):
  """The input of `down`."""
  h = norm(x, layer["mlp_norm"])
  gate = h @ layer["gate"]
  return gate / (1 + np.exp(-gate)) * (h @ layer["up"])


INPUTS = {"o": heads, "down": channels}


def refit_by_hand(dense, pruned, tokens, ridge, fit_rows):
  """The new `o` and `down` of each layer."""
  z = u = dense["embedding"][tokens]
  found = []
  for i in range(CONFIG.num_layers):
    full, left = dense[f"layer_{i}"], dict(pruned[f"layer_{i}"])
    for name, inputs in INPUTS.items():
      W = full[name].reshape(-1, CONFIG.hidden_size)
      z = z + 0.7 * inputs(full, z) @ W
      x = inputs(left, u)
      W = left[name].reshape(-1, CONFIG.hidden_size)
      lacks = (z - u) / 0.7 - x @ W
      # Tokens of more than ten medians of the minibatch weigh less.
      energy = (x * x).sum(-1)
      weight = np.minimum(1, 10 * np.median(energy) / energy)
      keep = np.sqrt(weight[:fit_rows]).ravel()[:, None]
      A = x[:fit_rows].reshape(-1, x.shape[-1]) * keep
      b = lacks[:fit_rows].reshape(-1, CONFIG.hidden_size) * keep
      shrink = np.sqrt(ridge * np.median((A * A).sum(0))) * np.eye(A.shape[1])
      zeros = np.zeros((A.shape[1], CONFIG.hidden_size))
      change, *_ = np.linalg.lstsq(
        np.concatenate([A, shrink]), np.concatenate([b, zeros]), rcond=None
      )
      left[name] = (W + change).reshape(left[name].shape)
      u = u + 0.7 * x @ (W + change)
    found.append((left["o"], left["down"]))
  return found


@pytest.fixture(scope="module")
def refitted(pair):
  return refit.refit(*pair, KEPT, TOKENS, 40, ridge=0.1)


def test_equals_ridge_least_squares(pair, refitted):
  (_, dense), (_, pruned) = pair
  expected = refit_by_hand(
    to_numpy(dense), to_numpy(pruned), TOKENS, 0.1, fit_rows=36
  )
  new, records = refitted
  assert all(r["refitted"] for r in records)
  for i, (o, down) in enumerate(expected):
    np.testing.assert_allclose(new[f"layer_{i}"]["o"], o, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(
      new[f"layer_{i}"]["down"], down, rtol=2e-3, atol=2e-4
    )


def test_changes_only_what_writes_and_keeps_shapes(pair, refitted):
  _, (config, pruned) = pair
  new, records = refitted
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, pruned)
  changed = [
    (i, n)
    for i in range(config.num_layers)
    for n in new[f"layer_{i}"]
    if not np.array_equal(new[f"layer_{i}"][n], pruned[f"layer_{i}"][n])
  ]
  names = [(r["layer"], r["matrix"]) for r in records]
  assert set(changed) == set(names)
  assert {n for _, n in names} == {"o", "down"}
  assert all(r["after"] < r["before"] for r in records)


def test_rows_that_pad_do_not_matter(pair, monkeypatch):
  """Nor for the cap: minibatches of five have three more on eight devices."""
  monkeypatch.setattr(normal_equations, "CAP", 1.0)  # of every other token
  jax.clear_caches()
  one, _ = refit.refit(*pair, KEPT, TOKENS, 5, ridge=0.1)
  mesh = sharding.make_mesh(data=8)
  placed = [
    (c, jax.device_put(p, sharding.param_shardings(p, mesh))) for c, p in pair
  ]
  many, _ = refit.refit(*placed, KEPT, TOKENS, 5, ridge=0.1, mesh=mesh)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, one, many)
  jax.clear_caches()


def test_minibatches_and_devices_do_not_matter(pair, monkeypatch):
  # The cap depends on the minibatch; without it nothing does.
  monkeypatch.setattr(normal_equations, "CAP", 1e9)
  jax.clear_caches()
  one, _ = refit.refit(*pair, KEPT, TOKENS, 40, ridge=0.1)
  one_size = streams.fed_to._cache_size()
  mesh = sharding.make_mesh(data=2, fsdp=4)
  placed = [
    (c, jax.device_put(p, sharding.param_shardings(p, mesh))) for c, p in pair
  ]
  many, _ = refit.refit(*placed, KEPT, TOKENS, 16, ridge=0.1, mesh=mesh)
  # One of attention and one of the MLP, for both models and all layers.
  assert streams.fed_to._cache_size() == one_size + 2
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
    one,
    many,
  )
  jax.clear_caches()


def test_nothing_changes_where_nothing_was_pruned(pair):
  dense, _ = pair
  everything = surgery.everything(CONFIG)
  new, records = refit.refit(dense, dense, everything, TOKENS, 40)
  assert records == []
  jax.tree.map(np.testing.assert_array_equal, new, dense[1])


def test_old_weights_stay_where_held_out_tokens_got_worse(pair):
  # One sequence of one token to fit, another of all kinds to judge.
  tokens = np.stack([np.full(8, 5), np.arange(8) + 10]).astype(np.int32)
  new, records = refit.refit(*pair, KEPT, tokens, 40, ridge=1e-6)
  worse = [r for r in records if not r["refitted"]]
  assert worse
  for r in worse:
    assert r["after"] >= r["before"] or np.isnan(r["after"])
    layer, name = f"layer_{r['layer']}", r["matrix"]
    np.testing.assert_array_equal(new[layer][name], pair[1][1][layer][name])


def test_refit_all(pair, refitted):
  new, records = refit.refit(*pair, KEPT, TOKENS, 40, ridge=0.1, refit_all=True)
  # In front of the first removal both streams are one, and nothing lacks.
  first = [r for r in records if r["layer"] == 0 and r["matrix"] in "qkv"]
  assert [r["before"] for r in first] == [0, 0, 0]
  later = [r for r in records if r["layer"] == 1]
  assert {r["matrix"] for r in later} == set("qkvo") | {"gate", "up", "down"}
  assert sum(r["refitted"] for r in later) >= 5
  # The last matrix ends nearer to the dense stream than without.
  assert records[-1]["after"] < refitted[1][-1]["after"]


@pytest.mark.slow
def test_layers_whose_mlp_is_beside_their_attention():
  """One refit of `down` of the last layer, against least squares in NumPy."""
  config = dataclasses.replace(
    CONFIG,
    family="gpt_neox",
    parallel=True,
    norm="layer",
    norm_bias=True,
    gated=False,
    activation="gelu",
    residual_scale=1.0,
  )
  params = random_params(config)
  kept = {"K": (np.arange(3),) * 2, "F": (np.arange(24), np.arange(0, 24, 2))}
  dense = config, params
  pruned = surgery.gather(config, params, kept, one_device())
  new, records = refit.refit(dense, pruned, kept, TOKENS, 40, ridge=0.1)
  (record,) = [r for r in records if r["layer"] == 1 and r["matrix"] == "down"]
  assert record["refitted"]
  assert record["after"] < 0.9 * record["before"]

  def last(pair):
    _, stream = decoder.Decoder(pair[0]).apply({"params": pair[1]}, TOKENS)
    return np.asarray(stream[-1], np.float64)

  far = lambda x: np.square(last(dense) - x).sum()
  assert far(last((pruned[0], new))) < 0.9 * far(last(pruned))
  everything = refit.refit(
    dense, pruned, kept, TOKENS, 40, ridge=0.1, refit_all=True
  )[1]
  assert {r["matrix"] for r in everything} == {*"qkvo", "up", "down"}


def test_automatic_ridge(pair):
  # 36 x 8 tokens: enough for 8 and 12 channels (20 each), not for 16 and 17.
  _, records = refit.refit(*pair, KEPT, TOKENS, 40)
  assert {(r["layer"], r["matrix"]): r["ridge"] for r in records} == {
    (0, "o"): 1.0,
    (0, "down"): 1.0,
    (1, "o"): 0.1,
    (1, "down"): 0.1,
  }


def test_output_biases_and_absent_halves(pair):
  """FLAP's biases are counted in; a layer may have lost a half."""
  (_, dense), _ = pair
  kept = {
    "K": (np.array([0, 2]), np.array([], int)),
    "F": (np.array([], int), np.arange(0, 24, 2)),
  }
  config, params = surgery.gather(CONFIG, dense, kept, one_device())
  config = dataclasses.replace(config, o_bias=True, down_bias=True)
  rng = np.random.default_rng(1)
  for i in range(config.num_layers):
    for name in ("o_bias", "down_bias"):
      bias = jnp.asarray(rng.normal(0, 0.1, CONFIG.hidden_size), jnp.float32)
      params[f"layer_{i}"][name] = bias
  new, records = refit.refit(
    (CONFIG, dense), (config, params), kept, TOKENS, 40
  )
  names = [(r["layer"], r["matrix"]) for r in records]
  assert names == [(0, "o"), (1, "down")]
  assert all(r["refitted"] for r in records)
  for i in range(config.num_layers):
    for name in ("o_bias", "down_bias"):
      np.testing.assert_array_equal(
        new[f"layer_{i}"][name], params[f"layer_{i}"][name]
      )
  # The streams that the records speak of are those of the real models.
  run = lambda c, p: decoder.Decoder(c).apply({"params": p}, TOKENS)[1][-1]
  z, before, after = run(CONFIG, dense), run(config, params), run(config, new)
  error = lambda x: float(jnp.linalg.norm((x - z)[36:]))
  assert error(after) < error(before)


def test_unequal_dense_layers(pair):
  """A second stage: the dense model has been pruned before."""
  _, (config, params) = pair
  keep = {
    "K": (np.array([1]), np.array([0])),
    "F": (np.arange(10), np.arange(12)),
  }
  pruned = surgery.gather(config, params, keep, one_device())
  new, records = refit.refit((config, params), pruned, keep, TOKENS, 40)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, pruned[1])
  assert [r["refitted"] for r in records] == [True] * 4


def massive_model():
  """Token 0, first of each row, drives one MLP channel 10,000 times as far."""
  params = random_params(CONFIG, seed=3)
  table = np.array(params["embedding"])
  table[:, 0], table[0] = 0, 0
  table[0, 0] = 1
  layer = dict(params["layer_0"])
  # Attention neither reads nor writes that direction.
  layer["o"] = layer["o"].at[..., 0].set(0)
  layer["v"] = layer["v"].at[0].set(0)
  layer["gate"] = layer["gate"].at[:, 5].set(0).at[0, 5].set(30)
  layer["up"] = layer["up"].at[:, 5].set(0).at[0, 5].set(30)
  params = params | {"embedding": jnp.asarray(table), "layer_0": layer}
  tokens = np.random.default_rng(4).integers(
    1, CONFIG.vocab_size, (60, 8), np.int32
  )
  tokens[:, 0] = 0
  return params, tokens


def test_massive_activations_do_not_drown_the_rest():
  config, (params, tokens) = CONFIG, massive_model()
  kept = {"K": (np.arange(3),) * 2, "F": (np.arange(3, 20), np.arange(24))}
  pruned = surgery.gather(config, params, kept, one_device())
  new, _ = refit.refit((config, params), pruned, kept, tokens, 60, ridge=0.1)

  def behind_first(c, p):
    return np.asarray(
      decoder.Decoder(c).apply({"params": p}, tokens)[1][1][54:]
    )

  z = behind_first(config, params)
  assert np.abs(z[:, 0]).max() > 1e3 * np.abs(z[:, 1:]).mean()
  error = lambda x, at: np.linalg.norm((x - z)[:, at])
  before, after = behind_first(*pruned), behind_first(pruned[0], new)
  # 0.82; with a ridge by the mean energy and no cap on tokens it is 0.9999.
  assert error(after, slice(1, 8)) < 0.85 * error(before, slice(1, 8))
  # The massive token, which the dense model relies on, is still what it was.
  assert error(after, 0) < 1e-4 * np.linalg.norm(z[:, 0])


def solved(gram, ridge, right):
  gram, right = (jnp.asarray(x, jnp.float32) for x in (gram, right))
  return linear_algebra.solve(gram, ridge, {"W": right})["W"]


def test_a_massive_channel_does_not_set_the_ridge():
  rng = np.random.default_rng(5)
  x = rng.normal(size=(400, 6))
  x[:, 0] *= 1e4
  gram, right = x.T @ x, x.T @ (x[:, 1:] @ rng.normal(size=(5, 2)))
  found = solved(gram, 0.1, right)
  exact = np.linalg.solve(
    gram + 0.1 * np.median(np.diag(gram)) * np.eye(6), right
  )
  np.testing.assert_allclose(found[1:], exact[1:], rtol=1e-3)
  drowned = np.linalg.solve(
    gram + 0.1 * np.diag(gram).mean() * np.eye(6), right
  )
  assert np.linalg.norm(drowned[1:]) < 0.01 * np.linalg.norm(exact[1:])


def test_massive_channels_that_say_the_same_are_no_obstacle():
  rng = np.random.default_rng(6)
  x = rng.normal(size=(400, 6))
  x[::8, 1:3] = 1e5 * x[::8, :1]
  y = x[:, 3:] @ rng.normal(size=(3, 2))
  found = solved(x.T @ x, 1e-3, x.T @ y)
  error = lambda W: np.linalg.norm((x @ W - y)[np.arange(400) % 8 > 0])
  assert error(np.asarray(found)) < 0.01 * error(np.zeros((6, 2)))


def test_channels_that_are_always_zero_stay_zero():
  gram = jnp.zeros((3, 3)).at[1, 1].set(4.0)
  found = solved(gram, 0.5, [[0.0], [3.0], [0.0]])
  np.testing.assert_allclose(found, [[0], [0.5], [0]], rtol=1e-6)


def test_refusals(pair):
  dense, pruned = pair
  with pytest.raises(UserError, match="at least 2 calibration sequences"):
    refit.refit(dense, pruned, KEPT, TOKENS[:1], 4)
  norms = dataclasses.replace(CONFIG, norm_order="sandwich", family="gemma2")
  with pytest.raises(UserError, match="gemma2 norms what"):
    linear_algebra.check(norms)
  least_squares.check(norms)
  sliced = dataclasses.replace(CONFIG, residual=((16, 16, 16),) * 2)
  for check in linear_algebra.check, least_squares.check:
    with pytest.raises(UserError, match="SliceGPT"):
      check(sliced)


@pytest.mark.slow
@pytest.mark.parametrize(
  "option, flap",
  [("sandwich", False), ("norm of all heads", False), ("sandwich", True)],
)
def test_through_norms_behind_the_matrices(option, flap):
  """The first `o`, solved in NumPy; and what is held out fits better.

  FLAP's bias is said beside the matrix, which has not to say it again.
  """
  config, mesh = small.option(option).with_layers([0, 2]), one_device()
  params, kept = small.random_params(config), small.random_kept(config)
  cut, fewer = surgery.gather(config, params, kept, mesh)
  tokens, bias_D = small.tokens(config, 40, 16), np.zeros(config.hidden_size)
  if flap:
    cut = dataclasses.replace(cut, o_bias=True)
    bias_D += np.random.default_rng(0).normal(size=bias_D.shape)
    for i in range(config.num_layers):
      fewer[f"layer_{i}"]["o_bias"] = jnp.asarray(bias_D, jnp.float32)
  fitted, records = refit.refit(
    (config, params), (cut, fewer), kept, tokens, 40, ridge=0.1, refit_all=False
  )

  def fed(config, params):
    """Inputs of the first `o`."""
    x_BTD = decoder.Decoder(config).apply(
      {"params": params}, tokens, method="embed"
    )
    inputs = layer.attention_inputs(config, 16)
    args = params["layer_0"], layer.place(config, 0), inputs, x_BTD
    _, tap = layer.run_half("K", config, *args)
    o = np.float64(params["layer_0"]["o"]).reshape(-1, config.hidden_size)
    return np.float64(tap.fed["K"]).reshape(-1, len(o)), o

  (X, W), (X_dense, W_dense) = fed(cut, fewer), fed(config, params)
  energy = np.square(X).sum(1)
  counts = np.minimum(1, normal_equations.CAP * np.median(energy) / energy)
  counts[36 * 16 :] = 0  # held out
  gram = X.T @ (counts[:, None] * X)
  gram += 0.1 * np.median(np.diag(gram)) * np.eye(len(gram))
  lacks = counts[:, None] * (X_dense @ W_dense - X @ W - bias_D)
  expected = W + np.linalg.solve(gram, X.T @ lacks)
  found = np.asarray(fitted["layer_0"]["o"]).reshape(W.shape)
  assert records[0]["refitted"]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  better = [r["refitted"] for r in records]
  assert sum(better) > len(better) / 2
  held = small.tokens(config, 20, 16, seed=1)
  logits = lambda c, p: decoder.Decoder(c).apply({"params": p}, held)[0]
  off = lambda p: np.square(logits(cut, p) - logits(config, params)).mean()
  assert off(fitted) < 0.9 * off(fewer)
