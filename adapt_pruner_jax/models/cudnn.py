"""cuDNN's flash attention, of packed rows too.

The one place that uses private names of JAX for attention: its public function
takes one length a row, and the layout of packed rows only has a door inside.
"""

import jax
import jax.numpy as jnp

TOKENS_A_DOCUMENT = 64  # at least, on average: what `packed` has room for


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  window: int,
  scale: float,
) -> jax.Array:
  """Causal attention within the documents of each row, [B, T, N, H].

  Args:
    q_BTNH, k_BSKH, v_BSKH: float16 or bfloat16; head n attends with n // (N/K).
    segments_BT: the documents, see `packed`; None = one a row.
    window: positions that a query sees, its own included; 0 = all.
    scale: of q k^T.
  """
  from jax._src.cudnn import fused_attention_stablehlo as private

  kinds = private.MaskType
  lengths_BM = offsets_BM = None
  if segments_BT is not None:
    lengths_BM, offsets_BM = packed(segments_BT, room(segments_BT.shape[1]))
  return private.dot_product_attention(
    *(q_BTNH, k_BSKH, v_BSKH, None, None),
    *(lengths_BM, lengths_BM, offsets_BM, offsets_BM),
    scale=scale,
    mask_type=kinds.CAUSAL if lengths_BM is None else kinds.PADDING_CAUSAL,
    sliding_window_length=window or None,
  )


def room(length: int) -> int:
  """Documents that a row of so many tokens may have."""
  return max(2, length // TOKENS_A_DOCUMENT)


def documents(segments_BT: jax.Array) -> jax.Array:
  """Documents of the row that has most of them."""
  return jnp.sum(_starts(segments_BT), axis=1).max()


def packed(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Where the documents of packed rows are, as cuDNN wants to know it.

  Args:
    segments_BT: equal numbers side by side are a document.
    most: documents of a row; there must not be more.

  Returns:
    int32 lengths [B, most] and first columns [B, most + 1]; -1 behind the last.
  """
  T = segments_BT.shape[1]
  find = lambda new_T: jnp.nonzero(new_T, size=most + 1, fill_value=T)[0]
  first_BM = jax.vmap(find)(_starts(segments_BT)).astype(jnp.int32)
  lengths_BM = first_BM[:, 1:] - first_BM[:, :-1]
  lengths_BM = jnp.where(lengths_BM > 0, lengths_BM, -1)
  return lengths_BM, jnp.where(first_BM < T, first_BM, -1)


def _starts(segments_BT):
  new_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
  return jnp.pad(new_BT, ((0, 0), (1, 0)), constant_values=True)
