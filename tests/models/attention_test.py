"""Attention and who sees whom, by hand and against jax.nn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import attention
from tests import small


def attention_by_hand(config, q_TKGH, k_SKH, v_SKH, seen_TS):
  """One head and one query at a time, in float64."""
  out = np.zeros(q_TKGH.shape)
  scale = config.attn_scale or config.head_dim**-0.5
  for t, k, g in np.ndindex(q_TKGH.shape[:3]):
    keys = np.flatnonzero(seen_TS[t])
    score = k_SKH[keys, k].astype(np.float64) @ q_TKGH[t, k, g] * scale
    if config.attn_softcap:
      score = config.attn_softcap * np.tanh(score / config.attn_softcap)
    share = np.exp(score - score.max())
    out[t, k, g] = share / share.sum() @ v_SKH[keys, k]
  return out


def heads(T: int) -> list[np.ndarray]:
  """Queries [1, T, 4, 2, 4], keys and values [1, T, 4, 4]."""
  rng = np.random.default_rng(0)
  sizes = (1, T, 4, 2, 4), (1, T, 4, 4), (1, T, 4, 4)
  return [rng.normal(size=size).astype(np.float32) * 2 for size in sizes]


def inputs_of(T: int, segments=None) -> attention.AttentionInputs:
  return attention.AttentionInputs(jnp.arange(T)[None], (), segments)


# One block of queries, and three of which the last is short.
@pytest.mark.parametrize("T", [7, 150])
@pytest.mark.parametrize("option", ["plain", "sandwich", "scales"])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(option, window, T):
  config = small.option(option)
  q, k, v = heads(T)
  assert q.shape[3:] == (config.queries_per_group, config.head_dim)
  got = attention.attend(
    *(q, k, v),
    inputs_of(T),
    window or 0,
    scale=config.attn_scale or config.head_dim**-0.5,
    softcap=config.attn_softcap,
  )
  distance = np.arange(T)[:, None] - np.arange(T)
  seen = (distance >= 0) & (distance < (window or T))
  want = attention_by_hand(config, q[0], k[0], v[0], seen)
  np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [7, 150])
def test_attention_has_the_gradients_of_jax(T):
  q, k, v = heads(T)
  segments = np.arange(T)[None] // 40
  inputs = inputs_of(T, segments)
  mask = attention.seen(inputs, 0, 0, T)[:, None]

  def ours(q, k, v):
    return attention.attend(q, k, v, inputs, scale=0.3)

  def theirs(q, k, v):
    q = q.reshape(1, T, 8, 4)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.3)
    return y.reshape(1, T, 4, 2, 4)

  loss = lambda f: lambda *qkv: jnp.sum(jnp.sin(f(*qkv)))
  got = jax.grad(loss(ours), argnums=(0, 1, 2))(q, k, v)
  want = jax.grad(loss(theirs), argnums=(0, 1, 2))(q, k, v)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [2, jnp.int32(2)])
def test_who_sees_whom(window):
  # Two documents; in the second the window hides the first of three.
  segments = np.array([[1, 1, 2, 2, 2]])
  got = attention.seen(inputs_of(5, segments), window, 0, 5)
  want = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(got[0], want)
  # A block of queries, and a window of 0 positions, which is none.
  got = attention.seen(inputs_of(5, segments), window * 0, 3, 4)
  np.testing.assert_array_equal(got[0], [[0, 0, 1, 1]])


def test_who_sees_whom_in_a_cache():
  # Padding, two old tokens, two new ones, and columns that are still empty.
  inputs = dataclasses.replace(
    inputs_of(4), positions=jnp.array([[2, 3]]), cached=jnp.arange(6)[None] - 1
  )
  got = attention.seen(inputs, 0, 0, 2)[0]
  want = [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]
  np.testing.assert_array_equal(got, want)
  got = attention.seen(inputs, 2, 0, 2)[0]
  want = [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
  np.testing.assert_array_equal(got, want)


def test_who_sees_a_prefix():
  segments = np.array([[0, 0, 1, 2, 2]])
  inputs = dataclasses.replace(
    inputs_of(5, segments),
    positions=jnp.array([[0, 1, 2, 2, 3]]),
    prefix=True,
  )
  want = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 1, 0, 1, 0],
    [1, 1, 0, 1, 1],
  ]
  np.testing.assert_array_equal(attention.seen(inputs, 0, 0, 5)[0], want)
  got = attention.seen(inputs, 2, 0, 5)[0]
  want = [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
  np.testing.assert_array_equal(got[2:], want)
