"""Half layers, each in the two steps around the matrix that it writes with.

Attention writes to the residual stream with `o`, the MLP with `down`. What such
a matrix is fed belongs to units: heads, and MLP channels. `refit` and
`curvature` look at a model this way, in dense coordinates (`surgery.dense`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.models.arithmetic import rms_norm
from adapt_pruner_jax.models.attention import attention_mask
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Block
from adapt_pruner_jax.models.model_config import ModelConfig

# The matrix that each half writes with, and those that it reads with.
HALVES = {"o": ("q", "k", "v"), "down": ("gate", "up")}
WRITERS = {"K": "o", "F": "down"}  # by unit

Place = tuple[jax.Array, jax.Array]  # a layer's attention window, its rope


def places(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """The `Place` of all layers, int32 [L] each."""
  window_L = np.array(config.window or (0,) * config.num_layers, np.int32)
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
  block = Block(config, config.kv_groups[0], config.ffn_widths[0])
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
    y_BTC = y_BTC.reshape(
      *x_BTD.shape[:2],
      config.kv_groups[0],
      config.queries_per_group,
      config.head_dim,
    )
    method = Block.add_attention
  block = Block(config, config.kv_groups[0], config.ffn_widths[0])
  return block.apply({"params": layer}, x_BTD, y_BTC, method=method)
