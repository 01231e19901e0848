"""Half layers, each in the two steps around the matrix that it writes with.

Attention writes to the residual stream with `o`, the MLP with `down`. What such
a matrix is fed belongs to units: heads, and MLP channels. `refit` and
`curvature` look at a model this way, in dense coordinates (`surgery.dense`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax import axes
from adapt_pruner_jax.attention import attention_mask
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import Block, ModelConfig
from adapt_pruner_jax.ops import rms_norm

# The matrix that each half writes with, and those that it reads with.
HALVES = {"o": ("q", "k", "v"), "down": ("gate", "up")}
WRITERS = {"K": "o", "F": "down"}  # by unit

LEAST = 1e-5  # ridge of a channel over its energy, for float32

Place = tuple[jax.Array, jax.Array]  # a layer's attention window, its rope


def check(config: ModelConfig) -> None:
  """Raises a UserError for a model that is not made of such halves."""
  if config.norm_order != "pre" or config.qk_norm == "all":
    why = (
      f"the family {config.family} norms what its matrices write, which "
      "least squares does not see"
    )
  elif config.residual:
    why = "SliceGPT changes the residual width"
  else:
    return
  raise UserError(
    f"this model cannot be refitted: {why}; use --config.prune.refit=none "
    "--config.prune.method=adapt, as --config=configs/paper.py does"
  )


def places(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """The `Place` of all layers, int32 [L] each."""
  window_L = np.array(config.window or (0,) * config.L, np.int32)
  return window_L, np.array(config.rope_ids(), np.int32)


def fed(
  config: ModelConfig, name: str, layer: Params, place: Place, x_BTD: jax.Array
) -> jax.Array:
  """What matrix `name` of a layer multiplies, [B, T, C], in its dtype.

  Args:
    x_BTD: the residual stream in front of the half.
  """
  x_BTD = x_BTD.astype(layer[name].dtype)
  for writer, norm in (("o", "attn_norm"), ("down", "mlp_norm")):
    if name in HALVES[writer]:
      eps, offset = config.norm_eps, config.norm_offset
      return rms_norm(x_BTD, layer[norm], eps, offset)
  block = Block(config, config.K[0], config.F[0])
  call = partial(block.apply, {"params": layer})
  if name == "down":
    return call(x_BTD, method=Block.hidden)
  B, T, _ = x_BTD.shape
  window, rope_id = place
  rows_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  seen_BNTS = None
  if any(config.window):
    seen_BNTS = attention_mask(rows_BT, None, window)
  tables = config.rope_tables(rows_BT)
  rope = jax.tree.map(lambda *t: jnp.stack(t)[rope_id], *tables)
  qkv = call(x_BTD, rope, method=Block.qkv)
  return call(*qkv, seen_BNTS, method=Block.attend).reshape(B, T, -1)


def add(
  config: ModelConfig,
  name: str,
  layer: Params,
  x_BTD: jax.Array,
  y_BTC: jax.Array,
) -> jax.Array:
  """The stream behind a half whose matrix `o` or `down` is fed y."""
  method = Block.add_mlp
  if name == "o":
    y_BTC = y_BTC.reshape(*x_BTD.shape[:2], config.K[0], config.G, config.H)
    method = Block.add_attention
  block = Block(config, config.K[0], config.F[0])
  return block.apply({"params": layer}, x_BTD, y_BTC, method=method)


def as_matrix(name: str, weight: jax.Array) -> jax.Array:
  """A weight as [inputs, outputs]."""
  reads = axes.AXES[name][0] in axes.RESIDUAL
  cut = 1 if reads else weight.ndim - 1
  return weight.reshape(int(np.prod(weight.shape[:cut])), -1)


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum to float32 at full precision."""
  return jnp.einsum(
    equation,
    x,
    y,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def factor(gram_CC: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cholesky factor of a Gram matrix with its ridge, scaled: (L, scale_C).

  gram + ridge * (median of its diagonal) * I = diag(scale) L L^T diag(scale),
  L L^T with a unit diagonal. The median, because in large models a few channels
  are a thousand times larger than the rest; these get a ridge of LEAST times
  their own energy, without which float32 could not tell them apart. Channels
  that are always zero do not count in the median; they have scale 1.
  """
  diagonal_C = jnp.diagonal(gram_CC)
  live_C = diagonal_C > 0
  median = jnp.nanmedian(jnp.where(live_C, diagonal_C, jnp.nan))
  ridge_C = jnp.maximum(ridge * median, LEAST * diagonal_C)
  scale_C = jnp.where(live_C, jnp.sqrt(diagonal_C + ridge_C), 1)
  scaled_CC = gram_CC / scale_C[:, None] / scale_C[None]
  scaled_CC = jnp.fill_diagonal(scaled_CC, 1.0, inplace=False)
  return jnp.linalg.cholesky(scaled_CC), scale_C


def solve(
  lower_CC: jax.Array, scale_C: jax.Array, right_CE: jax.Array
) -> jax.Array:
  """Solves with what `factor` returns, [C, E]."""
  scaled_CE = right_CE / scale_C[:, None]
  solved_CE = jax.scipy.linalg.cho_solve((lower_CC, True), scaled_CE)
  return solved_CE / scale_C[:, None]
