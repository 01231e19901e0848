"""The decoder: `ModelConfig`, parameter counts, and the Flax modules.

A model is always the pair `(ModelConfig, params)`. Layers may differ in their
number of KV groups K and MLP width F; everything else is shared. Parameters are
a plain dict: {"embedding", "layer_0": {...}, ..., "final_norm", "lm_head"},
with the dims given by `axes.AXES`. Arithmetic is done in the dtype of the
parameters, norms, rotary angles, softmax and logits in float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax import axes
from adapt_pruner_jax.axes import Params


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding; kinds as in Transformers' `rope_type`."""

  theta: float = 10_000.0
  kind: str = "default"  # default | linear | llama3
  factor: float = 1.0
  low_freq_factor: float = 1.0  # llama3 only, as the two below
  high_freq_factor: float = 4.0
  original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that shapes the function; letters as in `axes`."""

  family: str  # a row of hf.families.FAMILIES
  V: int
  D: int
  G: int
  H: int
  K: tuple[int, ...]  # KV groups of each layer
  F: tuple[int, ...]  # MLP width of each layer
  norm_eps: float
  rope: Rope
  context: int  # longest sequence the model was made for
  tied: bool  # the output matrix is the embedding
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  window: tuple[int, ...] = ()  # keys each layer sees; 0 or () = all
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  @property
  def L(self) -> int:
    return len(self.K)

  def sizes(self, layer: int | None = None) -> dict[str, int]:
    """Size of each dim letter, those of `layer` included if it is given."""
    sizes = {"V": self.V, "D": self.D, "G": self.G, "H": self.H}
    if layer is not None:
      sizes |= {"K": self.K[layer], "F": self.F[layer]}
    return sizes

  def units(self) -> dict[str, tuple[int, ...]]:
    return {"K": self.K, "F": self.F}


def layer_names(config: ModelConfig) -> list[str]:
  """Names of the parameters of one layer."""
  names = ["attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"]
  names += ["q_bias", "k_bias", "v_bias"] * config.qkv_bias
  names += ["o_bias"] * config.o_bias
  names += ["gate_bias", "up_bias", "down_bias"] * config.mlp_bias
  return names


def outer_names(config: ModelConfig) -> list[str]:
  """Names of the parameters outside the layers."""
  return ["embedding", "final_norm"] + ["lm_head"] * (not config.tied)


def param_shapes(config: ModelConfig) -> dict:
  """The parameter tree with shapes in place of arrays."""
  sizes = config.sizes()
  tree = {n: axes.shape(n, sizes) for n in outer_names(config)}
  for i in range(config.L):
    sizes = config.sizes(i)
    tree[axes.layer_name(i)] = {
      n: axes.shape(n, sizes) for n in layer_names(config)
    }
  return tree


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
  """`param_shapes` as `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, dtype),
    param_shapes(config),
    is_leaf=lambda s: isinstance(s, tuple),
  )


def count_params(config: ModelConfig) -> int:
  """Number of parameters, each once: a tied matrix counts once."""
  cost = unit_cost(config)
  return fixed_params(config) + sum(
    sum(widths) * cost[u] for u, widths in config.units().items()
  )


def unit_cost(config: ModelConfig) -> dict[str, int]:
  """Parameters of one KV group (K) and of one MLP channel (F)."""
  sizes = config.sizes() | {"K": 1, "F": 1}
  cost = dict.fromkeys(axes.UNITS, 0)
  for name in layer_names(config):
    if unit := axes.unit_of(name):
      cost[unit] += math.prod(axes.shape(name, sizes))
  return cost


def fixed_params(config: ModelConfig) -> int:
  """Parameters that no unit owns: embeddings, norms, output biases."""
  sizes = config.sizes()
  outer = sum(math.prod(axes.shape(n, sizes)) for n in outer_names(config))
  layer = sum(
    math.prod(axes.shape(n, sizes))
    for n in layer_names(config)
    if axes.unit_of(n) is None
  )
  return outer + config.L * layer


def init_params(
  config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> Params:
  """Random parameters: N(0, 0.02), norms one, biases zero."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(Decoder(config).init)
  params = init(key, tokens)["params"]
  return jax.tree.map(lambda x: x.astype(dtype), params)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Angle per position of each pair of channels, float32 [H/2].

  `llama3` slows the low frequencies down and blends those in between
  (Transformers' modeling_rope_utils, `_compute_llama3_parameters`).
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
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
  config: ModelConfig, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the rotary angles, float32 [B, T, H]."""
  frequency = rope_frequencies(config.rope, config.H)
  angle = positions_BT[..., None].astype(jnp.float32) * frequency
  angle_BTH = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies rotary angles; channel h is paired with h + H/2."""
  cos, sin = (table[:, :, None].astype(x_BTNH.dtype) for table in rope)
  half1, half2 = jnp.split(x_BTNH, 2, axis=-1)
  return x_BTNH * cos + jnp.concatenate([-half2, half1], axis=-1) * sin


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  return scale_D * (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def attention_mask(
  positions_BT: jax.Array, segments_BT: jax.Array | None, window: jax.Array
) -> jax.Array:
  """Who sees whom, bool [B, 1, T, S]: causal, same segment, within `window`.

  Args:
    positions_BT: position of each token in the row; they only grow.
    segments_BT: document number of each token, or None for one document a row.
    window: number of keys a query sees, itself included; 0 = all. May be traced.
  """
  distance = positions_BT[:, :, None] - positions_BT[:, None, :]
  seen = (distance >= 0) & ((distance < window) | (window == 0))
  if segments_BT is not None:
    seen &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return seen[:, None]


class Block(nn.Module):
  """One decoder layer with K KV groups and an MLP of width F."""

  config: ModelConfig
  K: int
  F: int

  def setup(self) -> None:
    sizes = self.config.sizes() | {"K": self.K, "F": self.F}
    self.weight = {
      name: self.param(name, _initializer(name), axes.shape(name, sizes))
      for name in layer_names(self.config)
    }

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    mask_BNTS: jax.Array | None,
    masks: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """The residual stream after this layer.

    Args:
      x_BTD: the residual stream before it.
      rope: from `rope_tables`.
      mask_BNTS: from `attention_mask`; None is plain causal.
      masks: {"K": bool [K], "F": bool [F]}: units that count. Masking a
        head's output or an MLP activation is removing it, exactly.
    """
    x_BTD = self.attention(x_BTD, rope, mask_BNTS, masks)
    return self.mlp(x_BTD, masks)

  def attention(self, x_BTD, rope, mask_BNTS, masks=None):
    """Residual stream after the attention half."""
    w, c = self.weight, self.config
    h_BTD = rms_norm(x_BTD, w["attn_norm"], c.norm_eps)
    q = jnp.einsum("btd,dkgh->btkgh", h_BTD, w["q"])
    k = jnp.einsum("btd,dkh->btkh", h_BTD, w["k"])
    v = jnp.einsum("btd,dkh->btkh", h_BTD, w["v"])
    if c.qkv_bias:
      q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    B, T = x_BTD.shape[:2]
    q_BTNH = q.reshape(B, T, self.K * c.G, c.H)
    y_BTNH = jax.nn.dot_product_attention(
      rotate(q_BTNH, rope),
      rotate(k, rope),
      v,
      mask=mask_BNTS,
      is_causal=mask_BNTS is None,
    )
    y_BTKGH = y_BTNH.reshape(B, T, self.K, c.G, c.H)
    if masks is not None:
      y_BTKGH *= masks["K"][:, None, None].astype(y_BTKGH.dtype)
    y_BTD = jnp.einsum("btkgh,kghd->btd", y_BTKGH, w["o"])
    return x_BTD + (y_BTD + w["o_bias"] if c.o_bias else y_BTD)

  def mlp(self, x_BTD, masks=None):
    """Residual stream after the MLP half."""
    w, c = self.weight, self.config
    h_BTD = rms_norm(x_BTD, w["mlp_norm"], c.norm_eps)
    gate_BTF = h_BTD @ w["gate"]
    up_BTF = h_BTD @ w["up"]
    if c.mlp_bias:
      gate_BTF, up_BTF = gate_BTF + w["gate_bias"], up_BTF + w["up_bias"]
    y_BTF = nn.silu(gate_BTF) * up_BTF
    if masks is not None:
      y_BTF *= masks["F"].astype(y_BTF.dtype)
    y_BTD = y_BTF @ w["down"]
    return x_BTD + (y_BTD + w["down_bias"] if c.mlp_bias else y_BTD)


class Decoder(nn.Module):
  """The whole model; `layer_0` ... `layer_{L-1}` may differ in K and F."""

  config: ModelConfig
  remat: bool = False

  def setup(self) -> None:
    c = self.config
    self.weight = {
      name: self.param(name, _initializer(name), axes.shape(name, c.sizes()))
      for name in outer_names(c)
    }
    block = nn.remat(Block) if self.remat else Block
    self.layer = [block(c, k, f) for k, f in zip(c.K, c.F, strict=True)]

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    return self.weight["embedding"][tokens_BT]

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits in float32, [B, T, V]."""
    x_BTD = rms_norm(x_BTD, self.weight["final_norm"], self.config.norm_eps)
    if self.config.tied:
      equation, matrix = "btd,vd->btv", self.weight["embedding"]
    else:
      equation, matrix = "btd,dv->btv", self.weight["lm_head"]
    return jnp.einsum(
      equation, x_BTD, matrix, preferred_element_type=jnp.float32
    )

  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Logits [B, T, V] and the residual stream around each layer (L + 1).

    Args:
      tokens_BT: int token ids.
      segments_BT: document numbers of packed rows; None = one document a row.
      positions_BT: position of each token in its document; default 0, 1, ....
    """
    rows_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rope = rope_tables(
      self.config, rows_BT if positions_BT is None else positions_BT
    )
    mask = partial(attention_mask, rows_BT, segments_BT)
    x_BTD = self.embed(tokens_BT)
    stream = [x_BTD]
    for i, layer in enumerate(self.layer):
      window = self.config.window[i] if self.config.window else 0
      plain = segments_BT is None and not window
      x_BTD = layer(x_BTD, rope, None if plain else mask(window))
      stream.append(x_BTD)
    return self.head(x_BTD), stream


def _initializer(name: str):
  if name.endswith("norm"):
    return nn.initializers.ones
  if name.endswith("bias"):
    return nn.initializers.zeros
  return nn.initializers.normal(0.02)
