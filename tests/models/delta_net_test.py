"""Gated delta nets: against Transformers' two forms, and packed.

Whole models: tests/formats/families_test.py and clients_test.py; pruned:
tests/pruning/two_kinds_test.py; with a cache: tests/evaluation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import delta_net, layer, layer_runs
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.training import stacking
from tests import small

pytestmark = pytest.mark.slow
B, T, Z, A, U, Y = 2, 150, 2, 3, 8, 6  # more than two chunks


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Most of the time goes into compiling programs that run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def rule():
  draw = np.random.default_rng(0).normal
  q, k = (draw(size=(B, T, Z, U)).astype(np.float32) for _ in "qk")
  v, g, beta = (
    draw(size=(B, T, Z, A, *more)).astype(np.float32) for more in ((Y,), (), ())
  )
  return delta_net.Rule(q, k, v, -0.1 * np.exp(g), 1 / (1 + np.exp(-beta)))


def normed(given):
  q, k = map(delta_net.unit_norm, (given.q, given.k))
  return given._replace(q=q * U**-0.5, k=k)


def part(given, start, end):
  return jax.tree.map(lambda x: x[:, start:end], given)


def test_the_rule_is_that_of_transformers():
  """Both of its forms; ours in chunks, and token by token from the middle."""
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
  given = rule()
  q, k, v, g, beta = (torch.tensor(x) for x in given)
  heads = lambda x: x.reshape(B, T, Z * A, *x.shape[4:])
  args = {"g": heads(g), "beta": heads(beta), "output_final_state": True}
  args["use_qk_l2norm_in_kernel"] = True
  ours, in_chunks = normed(given), jax.jit(delta_net.in_chunks)
  one_token = jax.jit(delta_net.one_token)
  said, memory = in_chunks(ours)
  first, half_way = in_chunks(part(ours, 0, T - 5))
  rest = []
  for t in range(T - 5, T):
    one, half_way = one_token(part(ours, t, t + 1), half_way)
    rest.append(one)
  by_token = jnp.concatenate([first, *rest], axis=1), half_way
  for form in ("chunk", "recurrent"):
    fn = getattr(modeling, f"torch_{form}_gated_delta_rule")
    expected = [x.numpy() for x in fn(q, k, heads(v), **args)]
    for found in ((said, memory), by_token):
      for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, rtol=0, atol=5e-6)


def test_documents_of_a_row_do_not_see_each_other():
  """Shorter than a convolution, and longer than a chunk of the rule."""
  config = small.option("delta")
  weights = small.random_params(config)["layer_1"]
  lengths, place = (70, 1, 2, 77), layer.place(config, 1)
  segments = np.repeat(np.arange(4) + 1, lengths)[None].astype(np.int32)
  draw = np.random.default_rng(0).normal
  x_BTD = draw(size=(1, sum(lengths), config.hidden_size)).astype(np.float32)

  @partial(jax.jit, static_argnames="prefix")
  def run(x_BTD, segments=None, prefix=False):
    inputs = layer.attention_inputs(config, x_BTD.shape[1], segments)
    inputs = dataclasses.replace(inputs, prefix=prefix)
    args = config, weights, place, inputs, x_BTD
    out, tap = layer.run_half("K", *args)
    return out, tap.cache

  packed, kept = run(x_BTD, segments)
  whole, _ = run(x_BTD)
  assert np.abs(packed - whole).max() > 0.1
  # A continuation behind what it continues, as lm-eval's rows have them.
  branches = np.int32(np.arange(sum(lengths)) > 50)[None]
  one_way, _ = run(x_BTD, branches, prefix=True)
  np.testing.assert_array_equal(one_way, whole)
  # Each alone in a row; what is behind it does not matter to it.
  ends = np.cumsum(lengths)
  rows = np.zeros((4, 77, config.hidden_size), np.float32)
  for row, (n, end) in enumerate(zip(lengths, ends, strict=True)):
    rows[row, :n] = x_BTD[0, end - n : end]
  alone, kept_alone = run(rows)
  for row, (n, end) in enumerate(zip(lengths, ends, strict=True)):
    np.testing.assert_allclose(
      packed[0, end - n : end], alone[row, :n], rtol=0, atol=2e-5
    )
  for x, y in zip(kept, kept_alone, strict=True):
    np.testing.assert_allclose(x[0], y[-1], rtol=0, atol=1e-5)


def test_a_run_of_both_kinds_of_layer():
  """Stacked and padded as in training: the decoder, and its gradients."""
  config, mesh = small.option("delta"), small.one_device()
  params, tokens = small.random_params(config), small.tokens(config, 1, 9)
  runs = stacking.cheapest(config, 1e9, 1.0)
  assert runs == (stacking.Run(0, 3, 4, 40, 2),)
  layers = {n: x for n, x in params.items() if n.startswith("layer_")}
  stacked = stacking.stack(runs, layers, mesh)
  back = stacking.unstack(runs, config, stacked, mesh)
  jax.tree.map(np.testing.assert_array_equal, back, layers)
  inputs = layer.attention_inputs(config, 9)
  decoder = Decoder(config)
  x_BTD = decoder.apply({"params": params}, tokens, method="embed")

  def plain(layers):
    return decoder.apply({"params": params | layers}, tokens)[1][-1]

  def scanned(stacked):
    return layer_runs.scan_layers(config, stacked, dict, inputs, x_BTD)[0]

  found, expected = (
    jax.jit(jax.value_and_grad(lambda tree, fn=fn: jnp.sum(jnp.sin(fn(tree)))))(
      tree
    )
    for fn, tree in ((scanned, stacked), (plain, layers))
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
  padded = stacking.stack(runs, expected[1], mesh)  # zeros where nothing is
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  jax.tree.map(near, found[1], padded)
