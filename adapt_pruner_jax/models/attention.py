"""Attention of grouped queries, and who sees whom."""

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models.arithmetic import project, soft_cap

BLOCKS = 4  # of queries, at most
SMALLEST_BLOCK = 64  # queries
HIDDEN = -1e30  # score of a key that is not seen


def attention_mask(
  positions_BT: jax.Array, segments_BT: jax.Array | None, window: jax.Array
) -> jax.Array:
  """Who sees whom, bool [B, 1, T, S]: causal, same segment, within `window`.

  Args:
    positions_BT: position of each token in the row; they only grow.
    segments_BT: document number of each token, or None for one document a row.
    window: keys a query sees, itself included; 0 = all. May be traced.
  """
  distance = positions_BT[:, :, None] - positions_BT[:, None, :]
  seen = (distance >= 0) & ((distance < window) | (window == 0))
  if segments_BT is not None:
    seen &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return seen[:, None]


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BNTS: jax.Array | None,
  scale: float,
  softcap: float = 0.0,
) -> jax.Array:
  """What the heads say, [B, T, K, G, H]: the input of `o`.

  Query heads of a group are stacked along the queries, which makes large
  products: on a CPU twice as fast as `jax.nn.dot_product_attention`. Queries
  are taken in blocks, so that what a causal mask hides from a whole block is
  not computed.

  Args:
    mask_BNTS: from `attention_mask`; None is plain causal. Where S = T it must
      hide the keys behind each query's column, which are not looked at.
    scale: of q k^T.
    softcap: of the scaled scores; 0 = none.
  """
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
  if mask_BNTS is None:
    mask_BNTS = jnp.tri(T, dtype=bool)[None, None]
  q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  size = max(SMALLEST_BLOCK, -(-T // BLOCKS)) if S == T else T
  said = []
  for start in range(0, T, size):
    end = min(start + size, T)
    seen = end if S == T else S
    said.append(
      _attend(
        q_BKGTH[:, :, :, start:end],
        k_BKSH[:, :, :seen],
        v_BKSH[:, :, :seen],
        mask_BNTS[:, :, start:end, :seen],
        scale,
        softcap,
      )
    )
  return jnp.concatenate(said, axis=3).transpose(0, 3, 1, 2, 4)


def _attend(q_BKGTH, k_BKSH, v_BKSH, mask_BNTS, scale, softcap):
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  q_BKRH = q_BKGTH.reshape(B, K, G * T, H)
  scores_BKRS = project("bkrh,bksh->bkrs", q_BKRH, k_BKSH, jnp.float32)
  scores_BKGTS = soft_cap(scores_BKRS.reshape(B, K, G, T, S) * scale, softcap)
  scores_BKGTS = jnp.where(mask_BNTS[:, :, None], scores_BKGTS, HIDDEN)
  # The softmax's division waits until the values are summed: H numbers then,
  # not S.
  largest = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
  weight_BKGTS = jnp.exp(scores_BKGTS - largest)
  total_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
  weight_BKRS = weight_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
  y_BKRH = project("bkrs,bksh->bkrh", weight_BKRS, v_BKSH, jnp.float32)
  y_BKGTH = y_BKRH.reshape(B, K, G, T, H) / total_BKGT1
  return y_BKGTH.astype(v_BKSH.dtype)
