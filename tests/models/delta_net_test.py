"""Gated delta nets: against Transformers' two forms, packed, and in families.

Whole models: tests/formats/families_test.py and clients_test.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import delta_net, layer
from adapt_pruner_jax.models.decoder import Decoder
from tests import small

B, T, Z, A, U, Y = 2, 150, 2, 3, 8, 6  # more than two chunks


def rule(seed=0):
  draw = np.random.default_rng(seed).normal
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


@pytest.mark.slow
def test_the_rule_is_that_of_transformers():
  """Both of its forms; ours in chunks, and token by token from the middle."""
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
  given = rule()
  q, k, v, g, beta = (torch.tensor(x) for x in given)
  heads = lambda x: x.reshape(B, T, Z * A, *x.shape[4:])
  args = {"g": heads(g), "beta": heads(beta), "output_final_state": True}
  args["use_qk_l2norm_in_kernel"] = True
  ours = normed(given)
  said, memory = delta_net.in_chunks(ours)
  first, half_way = delta_net.in_chunks(part(ours, 0, T - 5))
  rest = []
  for t in range(T - 5, T):
    one, half_way = delta_net.one_token(part(ours, t, t + 1), half_way)
    rest.append(one)
  by_token = jnp.concatenate([first, *rest], axis=1), half_way
  for form in ("chunk", "recurrent"):
    fn = getattr(modeling, f"torch_{form}_gated_delta_rule")
    expected = [x.numpy() for x in fn(q, k, heads(v), **args)]
    for found in ((said, memory), by_token):
      for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_documents_of_a_row_do_not_see_each_other():
  """Through all layers; documents shorter than a convolution, and longer than
  a chunk of the rule."""
  config = small.option("delta")
  params, lengths = small.random_params(config), (70, 1, 2, 77)
  segments = np.repeat(np.arange(4) + 1, lengths)[None].astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  tokens = small.tokens(config, 1, sum(lengths))
  run = jax.jit(Decoder(config).apply)
  packed, _ = run({"params": params}, tokens, segments, positions)
  at = 0
  for n in lengths:
    alone, _ = run({"params": params}, tokens[:, at : at + n])
    np.testing.assert_allclose(packed[:, at : at + n], alone, atol=2e-5)
    at += n
  assert np.abs(packed - run({"params": params}, tokens)[0]).max() > 0.1


@pytest.mark.slow
def test_what_is_kept_goes_on():
  """Several tokens behind a cache, as behind the row that it is of."""
  config = small.option("delta")
  weights = small.random_params(config)["layer_1"]
  x_BTD = np.random.default_rng(0).normal(size=(2, 90, config.hidden_size))
  x_BTD = x_BTD.astype(np.float32)
  place = layer.place(config, 1)

  def run(x_BTD, before=None):
    inputs = layer.attention_inputs(config, x_BTD.shape[1])
    args = config, weights, place, inputs, x_BTD
    out, tap = layer.run_half("K", *args, cache=before)
    return out, tap.cache

  whole, kept = run(x_BTD)
  first, before = run(x_BTD[:, :20])
  rest, then = run(x_BTD[:, 20:], before)
  found = jnp.concatenate([first, rest], axis=1)
  np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)
  for x, y in zip(then, kept, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
