"""Rotary position embeddings (Su et al., arXiv 2104.09864)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding; kinds as in Transformers' `rope_type`.

  default | linear | llama3 | dynamic (longer rows turn more slowly) | yarn
  (Peng et al., arXiv 2309.00071) | longrope (Ding et al., arXiv 2402.13753) |
  proportional (some pairs of the whole head turn, the others stand still) |
  none (nothing turns).
  """

  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0  # llama3 only, as the one below
  high_freq_factor: float = 4.0
  original_context: int = 8192  # of llama3, dynamic, yarn, longrope
  partial: float = 1.0  # share of the head that is rotated
  beta_fast: float = 32.0  # yarn only, as the four below
  beta_slow: float = 1.0
  mscale: float = 0.0
  mscale_all_dim: float = 0.0
  truncate: bool = True
  attention_factor: float = 0.0  # of yarn, longrope; 0 = by their formulas
  short: tuple[float, ...] = ()  # longrope only: what each pair is slowed by
  long: tuple[float, ...] = ()  # the same in rows beyond `original_context`
  query_growth: float = 0.0  # beyond `original_context` (Ministral 3)


RopeTables = tuple[jax.Array, jax.Array]  # cos and sin


def rotated_channels(rope: Rope, head_dim: int) -> int:
  """R: how many channels of a head are rotated, the first ones."""
  share = 1.0 if rope.kind == "proportional" else rope.partial
  return int(head_dim * share)


def rope_frequencies(
  rope: Rope, head_dim: int, length: jax.Array | int = 0
) -> np.ndarray | jax.Array:
  """How far each rotated pair of channels turns a position.

  Numbers are those of Transformers' modeling_rope_utils.

  Args:
    rope: which kind.
    head_dim: H, of which R channels are rotated.
    length: of the rows, which dynamic and longrope depend on; may be traced.

  Returns:
    Radians a position, float32 [R/2], or [..., R/2] by the shape of `length`.
  """
  if rope.kind == "none":
    return np.zeros(rotated_channels(rope, head_dim) // 2, np.float32)
  plain = _powers(rope.theta, rotated_channels(rope, head_dim))
  if rope.kind == "default":
    return plain
  if rope.kind == "linear":
    return plain / np.float32(rope.factor)
  if rope.kind == "proportional":
    turning = np.arange(len(plain)) < int(rope.partial * head_dim // 2)
    return np.where(turning, plain, np.float32(0)) / np.float32(rope.factor)
  if rope.kind == "longrope":
    return _by_length(
      length, rope, *(plain / np.float32(by) for by in (rope.short, rope.long))
    )
  if rope.kind == "dynamic":
    return _dynamic(rope, plain, length)
  if rope.kind == "yarn":
    return _yarn(rope, plain)
  assert rope.kind == "llama3", rope.kind
  return _llama3(rope, plain)


def _powers(theta: float, rotated: int) -> np.ndarray:
  exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
  return 1.0 / np.power(np.float32(theta), exponent)


def _by_length(length, rope, short, long):
  """`short` up to the original context, `long` in rows beyond it."""
  if isinstance(length, int):
    return long if length > rope.original_context else short
  return jnp.where(length[..., None] > rope.original_context, long, short)


def _dynamic(rope, plain, length):
  """Theta grows with the row, from the original context on (NTK-aware)."""
  if isinstance(length, int) and length <= rope.original_context:
    return plain
  rotated = 2 * len(plain)
  beyond = jnp.maximum(jnp.asarray(length), rope.original_context)
  growth = rope.factor * beyond / rope.original_context - (rope.factor - 1)
  theta = rope.theta * growth ** (rotated / (rotated - 2))
  exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
  grown = 1.0 / theta[..., None] ** exponent
  return _by_length(length, rope, plain, grown)


def _yarn(rope, plain):
  """Slow pairs are slowed down, fast ones not, those between are blended."""
  rotated = 2 * len(plain)

  def pair_of(turns):  # the pair that turns so often within the context
    wave = math.log(rope.original_context / (turns * 2 * math.pi))
    return rotated * wave / (2 * math.log(rope.theta))

  low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotated - 1)
  high += 0.001 * (low == high)
  ramp = (np.arange(len(plain), dtype=np.float32) - low) / (high - low)
  kept = np.float32(1) - np.clip(ramp, 0, 1).astype(np.float32)
  return plain / np.float32(rope.factor) * (1 - kept) + plain * kept


def _llama3(rope, plain):
  """Slows the low frequencies down and blends those in between."""
  wavelength = 2 * np.pi / plain
  low = rope.original_context / rope.low_freq_factor
  high = rope.original_context / rope.high_freq_factor
  smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  blended = (1 - smooth) * plain / rope.factor + smooth * plain
  slowed = np.where(wavelength > low, plain / rope.factor, plain)
  between = (wavelength <= low) & (wavelength >= high)
  return np.where(between, blended, slowed).astype(np.float32)


def rope_scale(rope: Rope) -> float:
  """What cosine and sine are multiplied with (the attention factor)."""
  if rope.kind not in ("yarn", "longrope"):
    return 1.0
  if rope.attention_factor:
    return rope.attention_factor
  if rope.factor <= 1:
    return 1.0
  stretch = math.log(rope.factor)
  if rope.kind == "longrope":
    return math.sqrt(1 + stretch / math.log(rope.original_context))
  if rope.mscale and rope.mscale_all_dim:
    one, two = rope.mscale, rope.mscale_all_dim
    return (0.1 * one * stretch + 1) / (0.1 * two * stretch + 1)
  return 0.1 * stretch + 1


def rope_tables(
  rope: Rope, head_dim: int, positions_BT: jax.Array
) -> RopeTables:
  """Cosine and sine of the rotary angles.

  A kind that depends on the length takes that of each row by its largest
  position (Transformers: of the whole batch).

  Args:
    rope, head_dim: as `rope_frequencies`'s.
    positions_BT: of the tokens, from 0.

  Returns:
    Two arrays, float32 [B, T, R].
  """
  length = 0
  if rope.kind in ("dynamic", "longrope"):
    length = positions_BT.max(axis=1, keepdims=True) + 1
  frequency = rope_frequencies(rope, head_dim, length)
  angle = positions_BT[..., None].astype(jnp.float32) * frequency
  angle_BTR = jnp.concatenate([angle, angle], axis=-1)
  scale = rope_scale(rope)
  cos, sin = jnp.cos(angle_BTR), jnp.sin(angle_BTR)
  return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def query_scale(rope: Rope, positions_BT: jax.Array) -> jax.Array:
  """What queries are multiplied with: more, the further they reach back.

  1 + growth * log(1 + floor(position / original context)).

  Args:
    rope: whose `query_growth` is not 0.
    positions_BT: of the tokens, from 0.

  Returns:
    Float32 [B, T].
  """
  lengths_BT = positions_BT // rope.original_context
  return 1 + rope.query_growth * jnp.log1p(lengths_BT.astype(jnp.float32))


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
