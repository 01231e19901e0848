"""Rotary position embeddings (Su et al., arXiv 2104.09864)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding; kinds as in Transformers' `rope_type`."""

  theta: float = 10_000.0
  kind: str = "default"  # default | linear | llama3
  factor: float = 1.0
  low_freq_factor: float = 1.0  # llama3 only, as the two below
  high_freq_factor: float = 4.0
  original_context: int = 8192
  partial: float = 1.0  # share of the head that is rotated


RopeTables = tuple[jax.Array, jax.Array]  # cos and sin


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """How far each rotated pair of channels turns a position.

  `llama3` slows the low frequencies down and blends those in between
  (Transformers' modeling_rope_utils, `_compute_llama3_parameters`).

  Args:
    rope: which kind.
    head_dim: H, of which R = int(H * rope.partial) channels are rotated.

  Returns:
    Radians a position, float32 [R/2].
  """
  rotated = int(head_dim * rope.partial)
  exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
  frequency = 1.0 / np.power(np.float32(rope.theta), exponent)
  if rope.kind == "default":
    return frequency
  if rope.kind == "linear":
    return frequency / np.float32(rope.factor)
  assert rope.kind == "llama3", rope.kind
  wavelength = 2 * np.pi / frequency
  low = rope.original_context / rope.low_freq_factor
  high = rope.original_context / rope.high_freq_factor
  smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  blended = (1 - smooth) * frequency / rope.factor + smooth * frequency
  slowed = np.where(wavelength > low, frequency / rope.factor, frequency)
  between = (wavelength <= low) & (wavelength >= high)
  return np.where(between, blended, slowed).astype(np.float32)


def rope_tables(
  rope: Rope, head_dim: int, positions_BT: jax.Array
) -> RopeTables:
  """Cosine and sine of the rotary angles.

  Args:
    rope, head_dim: as `rope_frequencies`'s.
    positions_BT: of the tokens, from 0.

  Returns:
    Two arrays, float32 [B, T, R].
  """
  frequency = rope_frequencies(rope, head_dim)
  angle = positions_BT[..., None].astype(jnp.float32) * frequency
  angle_BTR = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle_BTR), jnp.sin(angle_BTR)


def rotate(x_BTNH: jax.Array, tables: RopeTables) -> jax.Array:
  """Turns the first R channels of each head; r is paired with r + R/2.

  Args:
    x_BTNH: queries or keys.
    tables: from `rope_tables`, [B or 1, T, R].

  Returns:
    The turned heads, in the dtype of `x_BTNH`.
  """
  cos, sin = (table[:, :, None].astype(x_BTNH.dtype) for table in tables)
  turned, rest = jnp.split(x_BTNH, [cos.shape[-1]], axis=-1)
  half1, half2 = jnp.split(turned, 2, axis=-1)
  turned = turned * cos + jnp.concatenate([-half2, half1], axis=-1) * sin
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
