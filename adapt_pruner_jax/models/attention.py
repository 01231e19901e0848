"""Attention of grouped queries, and who sees whom.

Who sees whom is data (`AttentionInputs` and a layer's window), never a ready
mask: a kernel wants positions and segments, and a mask of all queries and keys
would have T x S numbers. `attend` makes the mask of a block of queries at a
time.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models.arithmetic import project, soft_cap
from adapt_pruner_jax.models.rope import RopeTables

BLOCKS = 4  # of queries, at most
SMALLEST_BLOCK = 64  # queries
HIDDEN = -1e30  # score of a key that is not seen


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["positions", "ropes", "segments", "cached", "column"],
  meta_fields=["prefix"],
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
  """

  positions: jax.Array
  ropes: tuple[RopeTables, ...]
  segments: jax.Array | None = None
  cached: jax.Array | None = None
  column: jax.Array | int = 0
  prefix: bool = False


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  inputs: AttentionInputs,
  window: jax.Array | int = 0,
  *,
  scale: float,
  softcap: float = 0.0,
) -> jax.Array:
  """What the heads say: softmax(scale q k^T) v over the keys that each sees.

  Query heads of a group are stacked along the queries, which makes large
  products: on a CPU twice as fast as `jax.nn.dot_product_attention`. Queries
  are taken in blocks, so that what causality hides from a whole block is not
  computed.

  Args:
    q_BTKGH: rotated queries, by the KV group that they attend with.
    k_BSKH: rotated keys; those of the queries' own tokens (S = T), or, with
      `inputs.cached`, the columns of the cache.
    v_BSKH: values.
    inputs: who sees whom.
    window: positions a query sees, its own included; 0 = all. May be traced.
    scale: of q k^T.
    softcap: of the scaled scores; 0 = none.

  Returns:
    [B, T, K, G, H], the input of `o`, in the values' dtype.
  """
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
  cached = inputs.cached is not None
  q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  size = T if cached else max(SMALLEST_BLOCK, -(-T // BLOCKS))
  said = []
  for start in range(0, T, size):
    end = min(start + size, T)
    keys = S if cached else end
    said.append(
      _attend(
        q_BKGTH[:, :, :, start:end],
        k_BKSH[:, :, :keys],
        v_BKSH[:, :, :keys],
        seen(inputs, window, start, end),
        scale,
        softcap,
      )
    )
  return jnp.concatenate(said, axis=3).transpose(0, 3, 1, 2, 4)


def seen(
  inputs: AttentionInputs, window: jax.Array | int, start: int, end: int
) -> jax.Array:
  """Which keys the queries in columns [start, end) see, bool [B or 1, t, s].

  Args:
    inputs: who sees whom.
    window: as `attend`'s.
    start, end: columns of the queries.

  Returns:
    A row for each query; keys are all columns of the cache or, without one,
    those in front of `end`: what is behind is never seen.
  """
  unlimited = isinstance(window, int) and window == 0
  here = inputs.positions[:, start:end, None]
  if inputs.cached is not None:
    there = inputs.cached[:, None, :]
    seen_Bts = (here >= there) & (there >= 0)
  else:
    there = inputs.positions[:, None, :end]
    seen_Bts = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
  if not unlimited:
    seen_Bts &= (here - there < window) | (window == 0)
  if inputs.segments is not None:
    other_B1s = inputs.segments[:, None, :end]
    same_Bts = inputs.segments[:, start:end, None] == other_B1s
    seen_Bts &= (same_Bts | (other_B1s == 0)) if inputs.prefix else same_Bts
  return seen_Bts


def _attend(q_BKGTH, k_BKSH, v_BKSH, seen_BTS, scale, softcap):
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  q_BKRH = q_BKGTH.reshape(B, K, G * T, H)
  scores_BKRS = project("bkrh,bksh->bkrs", q_BKRH, k_BKSH, jnp.float32)
  scores_BKGTS = soft_cap(scores_BKRS.reshape(B, K, G, T, S) * scale, softcap)
  scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, HIDDEN)
  # The softmax's division waits until the values are summed: H numbers then,
  # not S.
  largest = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
  weight_BKGTS = jnp.exp(scores_BKGTS - largest)
  total_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
  weight_BKRS = weight_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
  y_BKRH = project("bkrs,bksh->bkrh", weight_BKRS, v_BKSH, jnp.float32)
  y_BKGTH = y_BKRH.reshape(B, K, G, T, H) / total_BKGT1
  return y_BKGTH.astype(v_BKSH.dtype)
