"""Attention of grouped queries, and who sees whom.

Who sees whom is data (`AttentionInputs` and a layer's window), never a ready
mask: a kernel wants positions and segments, and a mask of all queries and keys
would have T x S numbers. `attend` is the one function, `kernels.choose` says by
which implementation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models import cudnn, kernels
from adapt_pruner_jax.models.arithmetic import project, soft_cap
from adapt_pruner_jax.models.kernels import AUTO, Kernel
from adapt_pruner_jax.models.rope import RopeTables

# Of queries, at most; each is multiplied with the keys before its end.
SPANS = 4
SHORTEST_SPAN = 64  # queries
BLOCK = 128  # queries of a span at a time, where memory counts
HIDDEN = -1e30  # score of a key that is not seen


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["positions", "ropes", "segments", "cached", "column"],
  meta_fields=["prefix", "kernel"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class AttentionInputs:
  """What attention knows about the rows of a batch; the same in all layers.

  A token sees itself and the tokens of its segment in columns before its own,
  as far as its layer's window reaches. With a cache it sees the cache's columns
  whose position is not above its own.

  Attributes:
    positions: int [B or 1, T], at least 0: each token's place in its document,
      which windows are counted in. Within a segment they grow by one a column.
    ropes: tables of these positions, from `ModelConfig.rope_tables`.
    segments: int [B, T], which tokens belong together (the documents of a
      packed row); None = a row is one.
    cached: positions of the columns of a cache of keys and values, int [B, S];
      nobody sees those below 0. None = no cache.
    column: of the cache, where keys and values of these tokens go.
    prefix: all tokens also see those of segment 0 before them: several ways to
      go on from one prompt, each a segment, share a row.
    kernel: which implementation is asked for, on which devices.
  """

  positions: jax.Array
  ropes: tuple[RopeTables, ...]
  segments: jax.Array | None = None
  cached: jax.Array | None = None
  column: jax.Array | int = 0
  prefix: bool = False
  kernel: Kernel = AUTO


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  inputs: AttentionInputs,
  window: jax.Array | int = 0,
  *,
  scale: float,
  softcap: float = 0.0,
  sinks_KG: jax.Array | None = None,
) -> jax.Array:
  """What the heads say: softmax(scale q k^T) v over the keys that each sees.

  Args:
    q_BTKGH: rotated queries, by the KV group that they attend with.
    k_BSKH: rotated keys; those of the queries' own tokens (S = T), or, with
      `inputs.cached`, the columns of the cache.
    v_BSKH: values.
    inputs: who sees whom, and by which implementation.
    window: positions a query sees, its own included; 0 = all. May be traced.
    scale: of q k^T.
    softcap: of the scaled scores; 0 = none.
    sinks_KG: score of a key more that each head sees, which says nothing.

  Returns:
    [B, T, K, G, H], the input of `o`, in the values' dtype.
  """
  heads = q_BTKGH, k_BSKH, v_BSKH
  sinks = sinks_KG is not None
  name, _ = chosen(q_BTKGH, inputs, window, softcap, sinks)
  mesh, segments_BT = inputs.kernel.cutting, inputs.segments
  if name == "splash":
    return kernels.splash_attention(
      mesh, *heads, segments_BT, window, scale, softcap
    )
  xla = partial(
    _attend,
    inputs=inputs,
    window=window,
    scale=scale,
    softcap=softcap,
    sinks_KG=sinks_KG,
  )
  if name != "cudnn":
    return xla(*heads, blocks=name == "blocks")
  fast = lambda *heads: kernels.cudnn_attention(
    mesh, *heads, segments_BT, window, scale
  )
  if segments_BT is None:
    return fast(*heads)
  fits = cudnn.documents(segments_BT) <= cudnn.room(segments_BT.shape[1])
  return jax.lax.cond(fits, fast, partial(xla, blocks=True), *heads)


def chosen(
  q_BTKGH: jax.Array,
  inputs: AttentionInputs,
  window: jax.Array | int = 0,
  softcap: float = 0.0,
  sinks: bool = False,
) -> tuple[str, str]:
  """Which implementation `attend` takes, and why; as `kernels.choose`."""
  if inputs.cached is not None:
    return "plain", "keys come from a cache"
  packed = inputs.segments is not None
  case = kernels.case_of(
    inputs.kernel, q_BTKGH, window, softcap, packed, inputs.prefix
  )
  return kernels.choose(inputs.kernel.name, case._replace(sinks=sinks))


def seen(
  inputs: AttentionInputs,
  window: jax.Array | int,
  start: jax.Array | int,
  size: int,
  keys: int,
) -> jax.Array:
  """Which keys the queries in some columns see, bool [B or 1, size, keys].

  Args:
    inputs: who sees whom.
    window: as `attend`'s.
    start: the first column of the queries; may be traced.
    size: how many queries; beyond the last one nothing that they see counts.
    keys: those of the first so many columns; ignored with a cache, whose
      columns are all keys.
  """

  def queries(x_BT):
    return jax.lax.dynamic_slice_in_dim(x_BT, start, size, axis=1)[..., None]

  unlimited = isinstance(window, int) and window == 0
  here = queries(inputs.positions)
  if inputs.cached is not None:
    there = inputs.cached[:, None, :]
    seen_Bts = (here >= there) & (there >= 0)
  else:
    there = inputs.positions[:, None, :keys]
    columns_t = start + jnp.arange(size)
    seen_Bts = (columns_t[:, None] >= jnp.arange(keys))[None]
  if not unlimited:
    seen_Bts &= (here - there < window) | (window == 0)
  if inputs.segments is not None:
    other_B1s = inputs.segments[:, None, :keys]
    same_Bts = queries(inputs.segments) == other_B1s
    seen_Bts &= (same_Bts | (other_B1s == 0)) if inputs.prefix else same_Bts
  return seen_Bts


def _attend(
  q_BTKGH,
  k_BSKH,
  v_BSKH,
  inputs,
  window,
  scale,
  softcap,
  sinks_KG=None,
  blocks=False,
):
  """`attend` by XLA.

  Query heads of a group are stacked along the queries, which makes large
  products: on a CPU twice as fast as `jax.nn.dot_product_attention`. Queries
  are taken in spans, so that what causality hides from a whole span is not
  computed, and with `blocks` in blocks of a span.
  """
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
  cached = inputs.cached is not None
  span = T if cached else max(SHORTEST_SPAN, -(-T // SPANS))
  if blocks:
    span = -(-span // BLOCK) * BLOCK
    inputs, q_BTKGH = _whole_blocks(inputs, q_BTKGH)
  q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

  def one(keys, start, q_BKGtH):
    seen_Bts = seen(inputs, window, start, q_BKGtH.shape[3], keys)
    kv = k_BKSH[:, :, :keys], v_BKSH[:, :, :keys]
    return _weigh(q_BKGtH, *kv, seen_Bts, scale, softcap, sinks_KG)

  said = []
  for start in range(0, T, span):
    end = min(start + span, q_BKGTH.shape[3])
    keys = S if cached else min(end, T)
    part = q_BKGTH[:, :, :, start:end]
    if blocks:
      said.append(_in_blocks(partial(one, keys), start, part))
    else:
      said.append(one(keys, start, part))
  return jnp.concatenate(said, axis=3).transpose(0, 3, 1, 2, 4)[:, :T]


def _whole_blocks(inputs, q_BTKGH):
  """Padded behind the last column; those queries are cut off again."""
  rest = -q_BTKGH.shape[1] % BLOCK
  widen = lambda x: jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2))
  segments = inputs.segments
  return dataclasses.replace(
    inputs,
    positions=widen(inputs.positions),
    segments=None if segments is None else widen(segments),
  ), widen(q_BTKGH)


def _in_blocks(one, start, q_BKGTH):
  """`one(first column, queries)` of a block after the other.

  The backward pass computes each once more, in place of keeping its scores.
  """
  B, K, G, T, H = q_BKGTH.shape
  q_BKGntH = q_BKGTH.reshape(B, K, G, T // BLOCK, BLOCK, H)
  starts_n = start + BLOCK * jnp.arange(T // BLOCK)
  once_more = jax.checkpoint(lambda xs: one(*xs))
  y_nBKGtH = jax.lax.map(once_more, (starts_n, jnp.moveaxis(q_BKGntH, 3, 0)))
  return jnp.moveaxis(y_nBKGtH, 0, 3).reshape(q_BKGTH.shape)


def _weigh(q_BKGTH, k_BKSH, v_BKSH, seen_BTS, scale, softcap, sinks_KG):
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  q_BKRH = q_BKGTH.reshape(B, K, G * T, H)
  scores_BKRS = project("bkrh,bksh->bkrs", q_BKRH, k_BKSH, jnp.float32)
  scores_BKGTS = soft_cap(scores_BKRS.reshape(B, K, G, T, S) * scale, softcap)
  scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, HIDDEN)
  # The softmax's division waits until the values are summed: H numbers then,
  # not S.
  largest = scores_BKGTS.max(axis=-1, keepdims=True)
  if sinks_KG is not None:
    sinks_KG11 = sinks_KG.astype(jnp.float32)[..., None, None]
    largest = jnp.maximum(largest, sinks_KG11)
  largest = jax.lax.stop_gradient(largest)
  weight_BKGTS = jnp.exp(scores_BKGTS - largest)
  total_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
  if sinks_KG is not None:
    total_BKGT1 += jnp.exp(sinks_KG11 - largest)
  weight_BKRS = weight_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
  y_BKRH = project("bkrs,bksh->bkrh", weight_BKRS, v_BKSH, jnp.float32)
  y_BKGTH = y_BKRH.reshape(B, K, G, T, H) / total_BKGT1
  return y_BKGTH.astype(v_BKSH.dtype)
