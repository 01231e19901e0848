"""Attention and who sees whom, by hand and against jax.nn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import attention, cudnn, kernels
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


@pytest.mark.slow
@pytest.mark.parametrize("T", [7, 150])
def test_attention_has_the_gradients_of_jax(T):
  q, k, v = heads(T)
  segments = np.arange(T)[None] // 40
  inputs = inputs_of(T, segments)
  mask = attention.seen(inputs, 0, 0, T, T)[:, None]

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
  got = attention.seen(inputs_of(5, segments), window, 0, 5, 5)
  want = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(got[0], want)
  # A block of queries, and a window of 0 positions, which is none.
  got = attention.seen(inputs_of(5, segments), window * 0, 3, 1, 4)
  np.testing.assert_array_equal(got[0], [[0, 0, 1, 1]])


def test_who_sees_whom_in_a_cache():
  # Padding, two old tokens, two new ones, and columns that are still empty.
  inputs = dataclasses.replace(
    inputs_of(4), positions=jnp.array([[2, 3]]), cached=jnp.arange(6)[None] - 1
  )
  got = attention.seen(inputs, 0, 0, 2, 6)[0]
  want = [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]
  np.testing.assert_array_equal(got, want)
  got = attention.seen(inputs, 2, 0, 2, 6)[0]
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
  np.testing.assert_array_equal(attention.seen(inputs, 0, 0, 5, 5)[0], want)
  got = attention.seen(inputs, 2, 0, 5, 5)[0]
  want = [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
  np.testing.assert_array_equal(got[2:], want)


# Packed rows, odd and even; windows, soft caps, one KV head, sizes of heads.
CASES = {
  "packed": {"T": 301, "K": 2, "G": 2, "H": 64, "packed": True},
  "window": {"T": 257, "K": 1, "G": 3, "H": 96, "packed": True, "window": 37},
  "soft cap": {
    "T": 300,
    "K": 2,
    "G": 1,
    "H": 128,
    "packed": True,
    "softcap": 5.0,
  },
  "large heads": {
    "T": 130,
    "K": 1,
    "G": 1,
    "H": 256,
    "packed": True,
    "window": 5,
  },
  "one document": {"T": 129, "K": 1, "G": 2, "H": 128, "packed": False},
}


def packed_case(T, K, G, H, packed, window=0, softcap=0.0):
  """Heads, what attention is told, and its settings."""
  rng = np.random.default_rng(0)
  sizes = (2, T, K, G, H), (2, T, K, H), (2, T, K, H)
  qkv = [rng.normal(size=size).astype(np.float32) for size in sizes]
  ends = np.array([[11, 100, 160], [1, 64, T]])[:, :, None]
  segments = (ends <= np.arange(T)).sum(1).astype(np.int32)
  starts = np.where(ends <= np.arange(T), ends, 0).max(1)
  positions = np.arange(T) - starts if packed else np.arange(T)[None]
  inputs = attention.AttentionInputs(
    positions.astype(np.int32), (), segments if packed else None
  )
  return qkv, inputs, {"window": window, "scale": H**-0.5, "softcap": softcap}


def assert_same(ours, plain, qkv):
  """Results and gradients."""
  weight = np.random.default_rng(1).normal(size=qkv[0].shape)

  def found(fn):
    loss = lambda *qkv: (lambda y: (jnp.sum(y * weight), y))(fn(*qkv))
    grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return y, *grads

  for got, want in zip(found(ours), found(plain), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def asking(inputs, name):
  kernel = kernels.Kernel(name, small.one_device())
  return dataclasses.replace(inputs, kernel=kernel)


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_plain(name):
  qkv, inputs, settings = packed_case(**CASES[name])
  run = lambda which: (
    lambda *qkv: attention.attend(*qkv, asking(inputs, which), **settings)
  )
  assert_same(run("blocks"), run("plain"), qkv)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_splash_equals_plain(name):
  qkv, inputs, settings = packed_case(**CASES[name])
  mesh = small.one_device()

  def splash(*qkv):
    segments = inputs.segments
    return kernels.splash_attention(
      mesh, *qkv, segments, **settings, interpret=True
    )

  def plain(*qkv):
    return attention.attend(*qkv, asking(inputs, "plain"), **settings)

  assert_same(splash, plain, qkv)


def test_blocks_keep_no_scores():
  """Of rows of T tokens, T a prime, nothing has T x T numbers or so."""
  T = 4099
  shapes = (1, T, 1, 2, 8), (1, T, 1, 8), (1, T, 1, 8)
  qkv = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  inputs = inputs_of(T)
  loss = lambda *qkv: attention.attend(*qkv, inputs, scale=1.0).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv).compile()
  bytes_used = compiled.memory_analysis().temp_size_in_bytes
  assert bytes_used < T * T  # a quarter of the scores of one head


def test_whose_choice():
  tpu = kernels.Case("TPU v5p", 8, 4096, 128)
  gpu = kernels.Case("NVIDIA H200", 8, 4096, 128, capability=9.0)
  cpu = kernels.Case("cpu", 8, 4096, 128)
  choose = kernels.choose
  assert choose("auto", tpu) == ("splash", "")
  assert choose("auto", gpu) == ("cudnn", "")
  assert choose("auto", cpu) == ("blocks", "")
  assert choose("auto", cpu._replace(length=1024)) == ("plain", "")
  assert choose("auto", kernels.Case("Trainium", 8, 4096, 128))[0] == "blocks"
  for name in ("plain", "blocks"):
    assert choose(name, tpu) == (name, "")
  for case in (gpu, cpu):
    name, why = choose("splash", case)
    assert (name, case.device in why) == ("blocks", True)
  assert choose("cudnn", tpu)[0] == "blocks"


@pytest.mark.parametrize(
  "device, changes, why",
  [
    ("TPU v5e", {"length": 127}, "128 tokens"),
    ("TPU v5e", {"window": None}, "window"),
    ("TPU v5e", {"prefix": True}, "prefix"),
    ("TPU v5e", {"shards": 0}, "devices"),
    ("TPU v5e", {"rows": 6, "shards": 4}, "6 row"),
    ("TPU v5e", {"sinks": True}, "sinks"),
    ("NVIDIA H200", {"softcap": 30.0}, "soft cap"),
    ("NVIDIA H200", {"dtype": "float32"}, "float32"),
    ("NVIDIA H200", {"head_size": 100}, "100"),
    ("NVIDIA A100", {"head_size": 256, "capability": 8.0}, "256"),
    ("NVIDIA A100", {"packed": True, "capability": 8.0}, "Hopper"),
  ],
)
def test_what_a_kernel_cannot_do_xla_does(device, changes, why):
  case = kernels.Case(device, 8, 4096, 128, capability=9.0)
  case = case._replace(**changes)
  name, reason = kernels.choose("auto", case)
  assert name == ("plain" if case.length < 1025 else "blocks")
  assert why in reason


@pytest.mark.parametrize("groups, own", [(4, 2), (3, 3)])
def test_groups_over_devices(groups, own):
  """Those of `tensor` share KV groups where they divide; else each has all."""
  mesh, seen = sharding.make_mesh(fsdp=4, tensor=2), []

  def local(q_BTKGH, k_BSKH):
    seen.append(q_BTKGH.shape)
    return q_BTKGH * jnp.sum(k_BSKH, (1, 3))[:, None, :, None, None]

  rng = np.random.default_rng(0)
  q, k = (
    rng.normal(size=(4, 5, groups, 2, 8)),
    rng.normal(size=(4, 5, groups, 8)),
  )
  run = jax.jit(functools.partial(kernels._on_each_device, local, mesh))
  np.testing.assert_allclose(run(q, k), local(q, k), rtol=1e-5)
  assert seen[0] == (1, 5, own, 2, 8)


def test_packed_rows_of_cudnn():
  segments = np.array([[1, 1, 1, 2, 0, 0], [3, 3, 3, 3, 3, 3]])
  lengths, firsts = cudnn.packed(segments, 4)
  np.testing.assert_array_equal(lengths, [[3, 1, 2, -1], [6, -1, -1, -1]])
  np.testing.assert_array_equal(
    firsts, [[0, 3, 4, -1, -1], [0, -1, -1, -1, -1]]
  )
  assert cudnn.documents(segments) == 3
  full, _ = cudnn.packed(np.array([[1, 2, 3]]), 3)
  np.testing.assert_array_equal(full, [[1, 1, 1]])


def test_cudnn_sees_what_plain_sees():
  """Its lengths and columns, read as its page says, against the mask."""
  T = 150
  _, inputs, _ = packed_case(**CASES["packed"] | {"T": T})
  lengths, firsts = map(np.asarray, cudnn.packed(inputs.segments, 8))
  want = attention.seen(inputs, 0, 0, T, T)
  for b in range(2):
    sees = np.zeros((T, T), bool)
    for first, length in zip(firsts[b], lengths[b], strict=False):
      here = slice(first, first + length) if length > 0 else slice(0)
      sees[here, here] = np.tri(max(length, 0))
    np.testing.assert_array_equal(sees, want[b])


def test_a_kernel_of_half_precision_keeps_its_own():
  """Forward and backward, also where products are to be float32's."""
  seen = []

  @jax.custom_vjp
  def attend(q, k, v, segments):
    return q * k + v

  def forward(q, k, v, segments):
    seen.append(jax.config.jax_default_matmul_precision)
    return q * k + v, (q, k)

  def backward(saved, dy):
    seen.append(jax.config.jax_default_matmul_precision)
    return dy * saved[1], dy * saved[0], dy, None

  attend.defvjp(forward, backward)
  heads = [jnp.full(3, x, jnp.bfloat16) for x in (2, 3, 4)]

  def total(*heads):
    run = kernels._as_it_is(attend)
    return run(*heads, jnp.ones(3, jnp.int32)).sum()

  with jax.default_matmul_precision("float32"):
    found = jax.grad(total, (0, 1, 2))(*heads)
  assert [float(x[0]) for x in found] == [3, 2, 1]
  assert seen == ["bfloat16", "bfloat16"]
