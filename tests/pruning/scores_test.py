"""Scores and layer importances, against plain gradients of the small model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import scores, surgery
from tests import small

N, T, BATCH = 5, 8, 2  # minibatches of 2, 2 and 1 sequences


@functools.cache
def measured(option, kind, measure="cosine", dtype="float32", mesh=None):
  """What `measure_step` finds on a model with half of the units masked."""
  config = small.option(option)
  mesh = mesh or small.one_device()
  params = small.random_params(config, dtype=jnp.dtype(dtype))
  everything = surgery.everything(config)
  stacked = surgery.expand(config, params, everything, config, mesh)
  masks = surgery.to_masks(small.random_kept(config), config)
  tokens = small.tokens(config, N, T)
  found = scores.measure_step(
    surgery.dense(config),
    stacked,
    placement.replicate(masks, mesh),
    *placement.minibatches(tokens, BATCH, mesh),
    kind=kind,
    measure=measure,
    mesh=mesh,
  )
  return jax.device_get(found), masks


@functools.cache
def plain(option, dtype="float32"):
  """The same from the smaller model: losses, streams and summed gradients."""
  config = small.option(option)
  params = small.random_params(config, dtype=jnp.dtype(dtype))
  kept = small.random_kept(config)
  config, params = surgery.gather(config, params, kept, small.one_device())
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

  def mean_loss(params, tokens):
    logits, stream = Decoder(config).apply({"params": params}, tokens)
    logp = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked), stream

  gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
  tokens = small.tokens(config, N, T)
  losses, streams, total = [], [], None
  for start in range(0, N, BATCH):
    (loss, stream), grads = gradient(params, tokens[start : start + BATCH])
    losses.append(float(loss))
    streams.append([np.asarray(x, np.float64) for x in stream])
    total = grads if total is None else jax.tree.map(jnp.add, total, grads)
  as64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  return config, as64(params), as64(total), losses, streams


def scores_by_hand(params, grads, unit, layer, vectorize):
  """|W g| summed per unit; query heads count for their own group."""
  total = 0.0
  for name in axes.SCORED[unit]:
    if name not in params[axes.layer_name(layer)]:
      continue  # an MLP without a gate
    weight = params[axes.layer_name(layer)][name]
    salience = weight * grads[axes.layer_name(layer)][name]
    letters = axes.AXES[name]
    if vectorize:  # |sum over the residual width|
      axis = next(i for i, x in enumerate(letters) if x in axes.RESIDUAL)
      salience = np.abs(salience.sum(axis, keepdims=True))
    others = tuple(i for i, x in enumerate(letters) if x not in (unit, "X"))
    total += np.abs(salience).sum(others)
  return total


@pytest.mark.slow
@pytest.mark.parametrize(
  "option, kind",
  [
    ("plain", "taylor"),
    ("plain", "taylor_vectorize"),
    ("biases", "taylor"),
    ("sandwich", "taylor"),
    ("parallel", "taylor"),
    ("experts", "taylor"),
  ],
)
def test_taylor_is_weight_times_summed_gradient(option, kind):
  found, masks = measured(option, kind)
  config, params, grads, losses, _ = plain(option)
  np.testing.assert_allclose(found["loss_M"], losses, rtol=2e-6)
  got = scores.group_scores(found["salience"], masks, kind, "aligned")
  for unit in axes.UNITS:
    for layer in range(config.num_layers):
      want = scores_by_hand(params, grads, unit, layer, "vec" in kind)
      kept = got[unit][layer][masks[unit][layer]]
      np.testing.assert_allclose(kept, want.ravel(), rtol=2e-4, atol=1e-6)
      gone = got[unit][layer][~masks[unit][layer]]
      assert not np.any(gone)  # what is masked has no gradient


@pytest.mark.slow
def test_norm_over_all_heads_is_over_those_that_are_left():
  found, masks = measured("norm of all heads", "taylor")
  config, params, grads, losses, _ = plain("norm of all heads")
  np.testing.assert_allclose(found["loss_M"], losses, rtol=2e-6)
  got = scores.group_scores(found["salience"], masks, "taylor", "aligned")
  for layer in range(config.num_layers):
    want = scores_by_hand(params, grads, "K", layer, False)
    kept = got["K"][layer][masks["K"][layer]]
    np.testing.assert_allclose(kept, want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("measure", ["cosine", "euclidean", "manhattan"])
def test_layer_importance(measure):
  found, _ = measured("plain", "l1", measure)
  config, _, _, losses, streams = plain("plain")
  np.testing.assert_allclose(found["loss_M"], losses, rtol=2e-6)
  for m, stream in enumerate(streams):
    for layer in range(config.num_layers):
      x, y = stream[layer], stream[layer + 1]
      size = {
        "cosine": lambda x, y: (
          (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
        ),
        "euclidean": lambda x, y: np.sqrt(((x - y) ** 2).sum(-1)),
        "manhattan": lambda x, y: np.abs(x - y).sum(-1),
      }[measure]
      got = found["importance_ML"][m, layer]
      assert got == pytest.approx(-size(x, y).mean(), rel=1e-5)


@pytest.mark.slow
def test_bfloat16_params_have_float32_sums():
  found, masks = measured("plain", "taylor", dtype="bfloat16")
  assert {s.dtype for s in found["salience"].values()} == {np.dtype("float32")}
  assert found["loss_M"].dtype == np.float32
  # As float32 arithmetic on the same weights, to what bfloat16 can do.
  config, params, grads, losses, _ = plain("plain", "bfloat16")
  np.testing.assert_allclose(found["loss_M"], losses, rtol=2e-2)
  got = scores.group_scores(found["salience"], masks, "taylor", "aligned")
  for layer in range(config.num_layers):
    want = scores_by_hand(params, grads, "F", layer, False)
    kept = got["F"][layer][masks["F"][layer]]
    np.testing.assert_allclose(kept, want, rtol=0.25)
    np.testing.assert_allclose(kept.sum(), want.sum(), rtol=0.05)


@pytest.mark.slow
def test_sums_of_bfloat16_gradients_do_not_lose_the_small_ones():
  # 1 + 2^-9 is 1 in bfloat16. One loud minibatch, then 64 quiet ones.
  M = 65
  config = dataclasses.replace(small.CONFIG, kv_groups=(1,), ffn_widths=(8,))
  params = small.random_params(config, dtype=jnp.bfloat16)
  mesh = small.one_device()
  everything = surgery.everything(config)
  stacked = surgery.expand(config, params, everything, config, mesh)
  masks = placement.replicate(surgery.to_masks(everything, config), mesh)
  tokens = np.repeat(small.tokens(config, 1, T), M, axis=0)
  run = functools.partial(
    scores.measure_step,
    surgery.dense(config),
    stacked,
    masks,
    kind="taylor",
    measure="cosine",
    mesh=mesh,
  )
  one = run(*placement.minibatches(tokens[:1], 1, mesh))["salience"]
  many = run(*placement.minibatches(tokens, 1, mesh))["salience"]
  # The same minibatch 65 times: exactly 65 times its gradient, which a
  # bfloat16 sum (8 bits) does not reach.
  for name in one:
    np.testing.assert_allclose(many[name], M * one[name], rtol=1e-5)


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_magnitude_is_the_mean_over_coupled_matrices(kind, power):
  found, masks = measured("plain", kind)
  _, params, _, _, _ = plain("plain")
  got = scores.group_scores(found["salience"], masks, kind, "aligned")
  for layer in range(3):
    w = params[f"layer_{layer}"]
    raised = {n: np.abs(w[n]) ** power for n in w}
    per_group = (
      raised["q"].sum((0, 2, 3))
      + raised["k"].sum((0, 2))
      + raised["v"].sum((0, 2))
      + raised["o"].sum((1, 2, 3))
    ) / 4
    kept = got["K"][layer][masks["K"][layer]]
    np.testing.assert_allclose(kept, per_group, rtol=1e-5)
    per_channel = (
      raised["gate"].sum(0) + raised["up"].sum(0) + raised["down"].sum(1)
    ) / 3
    kept = got["F"][layer][masks["F"][layer]]
    np.testing.assert_allclose(kept, per_channel, rtol=1e-5)


def test_folds_of_query_heads():
  # Two layers of 3 groups x 2 heads; in the second only groups 0 and 2 live.
  q_LKG = np.array([[[1, 2], [3, 4], [5, 6]], [[1, 2], [90, 90], [5, 6]]])
  zero_LK, zero_LF = np.zeros((2, 3)), np.zeros((2, 1))
  salience = {"q": q_LKG, "k": zero_LK, "v": zero_LK, "o": q_LKG * 10}
  salience |= dict.fromkeys(("gate", "up", "down"), zero_LF)
  masks = {"K": np.array([[1, 1, 1], [1, 0, 1]], bool)}
  masks["F"] = np.ones((2, 1), bool)
  aligned = scores.group_scores(salience, masks, "taylor", "aligned")["K"]
  assert aligned[0].tolist() == [33, 77, 121]
  assert aligned[1, [0, 2]].tolist() == [33, 121]
  authors = scores.group_scores(salience, masks, "taylor", "reference")["K"]
  # Heads 1 2 3 4 5 6 go to groups 0 1 2 0 1 2; then 1 2 5 6 to 0 2 0 2.
  assert authors[0].tolist() == [55, 77, 99]
  assert authors[1].tolist() == [66, 0, 88]


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 2, 2), (1, 8, 1)])
def test_eight_devices_find_the_same(data, fsdp, tensor):
  # K, F, V and the minibatch do not divide by 8, some not even by 2.
  mesh = sharding.make_mesh(data, fsdp, tensor)
  got, masks = measured("biases", "taylor", mesh=mesh)
  want, _ = measured("biases", "taylor")
  np.testing.assert_allclose(got["loss_M"], want["loss_M"], rtol=1e-5)
  np.testing.assert_allclose(
    got["importance_ML"], want["importance_ML"], rtol=1e-5
  )
  for name, salience in want["salience"].items():
    np.testing.assert_allclose(
      got["salience"][name], salience, rtol=1e-4, atol=1e-7
    )
