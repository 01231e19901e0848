"""Shapes, counts and the pieces of the decoder; whole families: hf tests."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import (
  arithmetic,
  axes,
  decoder,
  model_config,
)
from adapt_pruner_jax.models.rope import Rope, rope_frequencies
from tests import small


@pytest.mark.parametrize("option", small.OPTIONS)
def test_init_has_the_shapes_and_number_of_params(option):
  config = small.option(option)
  params = jax.eval_shape(
    lambda: decoder.Decoder(config).init(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
  )["params"]
  assert jax.tree.map(lambda x: x.shape, params) == model_config.param_shapes(
    config
  )
  sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
  assert model_config.count_params(config) == sum(sizes)


def test_counts_of_published_models():
  # SmolLM2-135M and Qwen2.5-0.5B, as counted by Transformers.
  smol = dataclasses.replace(small.SMOLLM2_135M, tied=True)
  assert model_config.count_params(smol) == 134_515_008
  qwen = dataclasses.replace(
    smol,
    vocab_size=151936,
    hidden_size=896,
    queries_per_group=7,
    kv_groups=(2,) * 24,
    ffn_widths=(4864,) * 24,
    qkv_bias=True,
  )
  assert model_config.count_params(qwen) == 494_032_768


@pytest.mark.parametrize("option", small.OPTIONS)
def test_unit_cost_is_what_a_unit_less_saves(option):
  config = small.option(option)
  size = model_config.count_params(config)
  fewer_K = dataclasses.replace(config, kv_groups=(3, *config.kv_groups[1:]))
  fewer_F = dataclasses.replace(config, ffn_widths=(24, 40, 16))
  cost = model_config.unit_cost(config)
  assert size - model_config.count_params(fewer_K) == cost["K"]
  assert size - model_config.count_params(fewer_F) == cost["F"]


@pytest.mark.parametrize("option", ["plain", "sandwich"])
@pytest.mark.parametrize("dtype, off", [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_is_near(option, dtype, off):
  config = small.option(option)
  params = small.random_params(config)
  tokens_BT = np.arange(20)[None]
  run = jax.jit(
    lambda p: decoder.Decoder(config).apply({"params": p}, tokens_BT)
  )
  exact, _ = run(params)
  near, stream = run(jax.tree.map(lambda x: x.astype(dtype), params))
  assert {str(x.dtype) for x in stream} == {dtype}
  largest = jnp.abs(exact).max()
  assert 0 < jnp.abs(near - exact).max() < off * largest


@pytest.mark.parametrize("option", small.OPTIONS)
def test_config_survives_json(option):
  config = small.option(option)
  fields = json.loads(json.dumps(model_config.to_json(config)))
  assert model_config.from_json(fields) == config


@pytest.mark.parametrize("halves", [("K",), ("F",), ("K", "F")])
def test_layer_without_units_passes_its_input_on(halves):
  units = {u: small.CONFIG.units()[u] for u in axes.UNITS}
  units |= {u: (units[u][0], 0, units[u][2]) for u in halves}
  config = small.CONFIG.with_units(units)
  params = small.random_params(config)
  left = set(params["layer_1"])
  assert left.isdisjoint(axes.SCORED[halves[0]])
  tokens = small.tokens(config, 2, 5)
  _, stream = decoder.Decoder(config).apply({"params": params}, tokens)
  if len(halves) == 2:
    assert not left
    np.testing.assert_array_equal(stream[1], stream[2])
  else:
    assert np.abs(stream[1] - stream[2]).max() > 1e-3


@pytest.mark.parametrize(
  "equation, x, w",
  [
    ("btd,df->btf", "btd", "df"),
    ("btd,dkgh->btkgh", "btd", "dkgh"),
    ("btkgh,kghd->btd", "btkgh", "kghd"),
    ("btd,vd->btv", "btd", "vd"),
  ],
)
def test_project_has_the_gradients_of_einsum(equation, x, w):
  rng = np.random.default_rng(0)
  size = dict(zip("btdfkghv", range(2, 10), strict=True))
  x, w = (
    rng.normal(size=[size[c] for c in n]).astype(np.float32) for n in (x, w)
  )
  loss = lambda f: lambda x, w: jnp.sum(jnp.sin(f(equation, x, w)))
  got = jax.grad(loss(arithmetic.project), argnums=(0, 1))(x, w)
  want = jax.grad(loss(jnp.einsum), argnums=(0, 1))(x, w)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_project_keeps_the_dtype_of_each_gradient():
  x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
  run = lambda x, w: arithmetic.project("btd,df->btf", x, w, jnp.float32)
  assert run(x, w).dtype == jnp.float32
  grads = jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1))(x, w)
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_llama3_rope_slows_low_frequencies_only():
  # As in Llama 3.2: wavelengths up to 2048 stay, from 8192 on take 32 times.
  rope = Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
  plain = rope_frequencies(Rope(500_000.0), 64)
  got = rope_frequencies(rope, 64)
  wavelength = 2 * np.pi / plain
  short, long = wavelength < 2048, wavelength > 8192
  np.testing.assert_array_equal(got[short], plain[short])
  np.testing.assert_allclose(got[long], plain[long] / 32, rtol=1e-6)
  between = ~short & ~long
  assert np.any(between)
  assert np.all(got[between] < plain[between])
  assert np.all(got[between] > plain[between] / 32)
