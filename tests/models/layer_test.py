"""The driver of a layer: scanned, masked, tapped, packed, cached, branched.

Whole families against Transformers: tests/formats/families_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import layer
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import surgery
from tests import small

# Windows, a rope of their own, soft caps; a norm over all heads; layers without
# rotary embeddings; and MLPs beside their attention.
OPTIONS = ["sandwich", "norm of all heads", "biases", "scales", "parallel"]
LENGTHS = (70, 50, 30)  # of packed documents: more than one block of queries


def packed(config):
  """Tokens, segments and positions [1, 150] of three documents."""
  segments = np.repeat(np.arange(3) + 1, LENGTHS)[None].astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in LENGTHS])[None]
  return small.tokens(config, 1, sum(LENGTHS)), segments, positions


def scanned(config, params, tokens, inputs, masks):
  """The stream behind the last layer of a dense model, and what is tapped."""
  full, mesh = surgery.dense(config), small.one_device()
  everything = surgery.everything(config)
  stacked = surgery.expand(config, params, everything, config, mesh)
  apply = lambda x, method: Decoder(full).apply(
    {"params": {n: p for n, p in stacked.items() if n != "layers"}},
    x,
    method=method,
  )

  def run(x_BTD, xs):
    weights, place, masks = xs
    return layer.run_layer(full, weights, place, inputs, x_BTD, masks)

  xs = stacked["layers"], layer.places(full), masks
  return jax.jit(lambda x: jax.lax.scan(run, x, xs))(apply(tokens, "embed"))


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_masked_scan_is_the_gathered_decoder(option):
  config = small.option(option)
  params, kept = small.random_params(config), small.random_kept(config)
  tokens, segments, positions = packed(config)
  inputs = layer.attention_inputs(config, jnp.asarray(positions), segments)
  masks = surgery.to_masks(kept, config)
  got, tap = scanned(config, params, tokens, inputs, masks)
  cut, fewer = surgery.gather(config, params, kept, small.one_device())
  run = jax.jit(Decoder(cut).apply)
  _, stream = run({"params": fewer}, tokens, segments, positions)
  assert np.std(stream[-1]) > 1e-2
  np.testing.assert_allclose(got, stream[-1], rtol=1e-4, atol=1e-5)
  # The tap, against the layers of the gathered model, each run alone.
  for i, x_BTD in enumerate(stream[:-1]):
    args = cut, fewer[f"layer_{i}"], layer.place(cut, i), inputs, x_BTD
    out, alone = jax.jit(lambda a=args: layer.run_layer(*a))()
    np.testing.assert_allclose(out, stream[i + 1], rtol=1e-4, atol=1e-5)
    near = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(tap.between[i], alone.between, **near)
    for unit, fed in alone.fed.items():
      left = tap.fed[unit][i][:, :, masks[unit][i]]
      np.testing.assert_allclose(left, fed, **near)
    keys = tap.cache[0][i][:, :, masks["K"][i]]
    np.testing.assert_allclose(keys, alone.cache[0], **near)


def test_what_is_fed_is_what_o_and_down_multiply():
  config = dataclasses.replace(small.option("scales"), parallel=False)
  weights = small.random_params(config)["layer_0"]
  x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
  inputs = layer.attention_inputs(config, 9)
  args = config, weights, layer.place(config, 0), inputs
  out, tap = layer.run_layer(*args, x)
  said = np.einsum("btkgh,kghd->btd", tap.fed["K"], weights["o"])
  np.testing.assert_allclose(tap.between, x + 0.5 * said, rtol=1e-5, atol=1e-5)
  said = tap.fed["F"] @ weights["down"]
  np.testing.assert_allclose(out, tap.between + 0.5 * said, rtol=1e-5)
  # Without the mask, although it counts.
  masks = {"K": np.zeros(4, bool), "F": np.zeros(24, bool)}
  off, masked = layer.run_layer(*args, x, masks)
  np.testing.assert_array_equal(off, x)
  np.testing.assert_array_equal(masked.fed["K"], tap.fed["K"])


@pytest.mark.parametrize("option", ["sandwich", "plain"])
def test_packed_documents_are_as_alone(option):
  config = small.option(option)
  variables = {"params": small.random_params(config)}
  tokens, segments, positions = packed(config)
  run = jax.jit(Decoder(config).apply)
  got, _ = run(variables, tokens, segments, positions)
  ends = np.cumsum(LENGTHS)
  for start, end in zip(ends - LENGTHS, ends, strict=True):
    want, _ = run(variables, tokens[:, start:end])
    np.testing.assert_allclose(got[:, start:end], want, rtol=1e-4, atol=1e-5)


def test_branches_see_the_prefix_and_themselves():
  config = small.option("sandwich")
  variables = {"params": small.random_params(config)}
  prefix, one, two = (small.tokens(config, 1, n, n)[0] for n in (60, 20, 30))
  tokens = np.concatenate([prefix, one, two])[None]
  segments = np.repeat(np.arange(3), (60, 20, 30))[None]
  positions = np.r_[np.arange(80), np.arange(60, 90)][None]
  inputs = layer.attention_inputs(config, jnp.asarray(positions), segments)
  inputs = dataclasses.replace(inputs, prefix=True)
  apply = jax.jit(Decoder(config).apply, static_argnames="method")
  x_BTD = apply(variables, tokens, method="embed")
  got, _ = apply(variables, x_BTD, inputs, method="residual")
  for own, said in ((slice(60, 80), one), (slice(80, 110), two)):
    row = np.concatenate([prefix, said])[None]
    _, stream = apply(variables, row)
    np.testing.assert_allclose(
      got[:, own], stream[-1][:, 60:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("option", ["sandwich", "norm of each head"])
def test_a_cache_goes_on_where_the_rows_stopped(option):
  config = small.option(option)
  variables = {"params": small.random_params(config)}
  tokens, columns = small.tokens(config, 2, 12), 16
  apply = jax.jit(Decoder(config).apply, static_argnames="method")
  _, stream = apply(variables, tokens)
  inputs = layer.attention_inputs(config, 9)
  x_BTD = apply(variables, tokens, method="embed")
  _, caches = apply(variables, x_BTD[:, :9], inputs, method="residual")
  room = ((0, 0), (0, columns - 9), (0, 0), (0, 0))
  caches = jax.tree.map(lambda kv: jnp.pad(kv, room), caches)
  inputs = dataclasses.replace(
    layer.attention_inputs(config, jnp.arange(9, 12)[None]),
    cached=jnp.arange(columns)[None],
    column=9,
  )
  got, _ = apply(variables, x_BTD[:, 9:], inputs, caches, method="residual")
  np.testing.assert_allclose(got, stream[-1][:, 9:], rtol=1e-4, atol=1e-5)


def test_nobody_sees_columns_below_position_zero():
  config = small.CONFIG
  weights = small.random_params(config)["layer_0"]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 1, 16)).astype(np.float32)
  cache = tuple(rng.normal(size=(2, 1, 5, 4, 4)).astype(np.float32))

  def run(cache, columns):
    positions = jnp.array([[3]])
    ropes = config.rope_tables(positions)
    cached = jnp.asarray(columns)[None]
    inputs = AttentionInputs(positions, ropes, None, cached, len(columns) - 1)
    args = config, weights, layer.place(config, 0), inputs, x
    return layer.run_layer(*args, cache=cache)[0]

  got = run(cache, [-1, 0, 1, 2, 3])
  want = run(tuple(kv[:, 1:] for kv in cache), [0, 1, 2, 3])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_gates_are_sums_in_float32():
  """Of many tokens, in bfloat16: there a sum stands still at 256."""
  fed_BTF = jnp.ones((1, 2048, 3), jnp.bfloat16)
  run = lambda gate_F: layer.times_mask(fed_BTF, gate_F).sum(dtype=jnp.float32)
  found_F = jax.grad(run)(jnp.ones(3))
  np.testing.assert_array_equal(found_F, [2048] * 3)
  assert layer.times_mask(fed_BTF, jnp.ones(3)).dtype == jnp.bfloat16


@pytest.mark.parametrize("unit", ["K", "F"])
def test_an_absent_half_passes_the_stream_on(unit):
  config = small.option("plain")
  weights = small.random_params(config)["layer_0"]
  gone = {"K": ("q", "k", "v", "o"), "F": ("gate", "up", "down")}[unit]
  weights = {n: w for n, w in weights.items() if n not in gone}
  x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
  inputs = layer.attention_inputs(config, 5)
  args = config, weights, layer.place(config, 0), inputs, x
  masks = {"K": np.ones(4, bool), "F": np.ones(24, bool)}
  out, tap = layer.run_half(unit, *args, masks)
  np.testing.assert_array_equal(out, x)
  assert tap.fed == {unit: None}
  assert tap.cache is None
