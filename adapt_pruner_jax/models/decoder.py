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

from adapt_pruner_jax.models import attention as attention_
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.arithmetic import (
  ACTIVATIONS,
  project,
  rms_norm,
  soft_cap,
)
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  outer_names,
)
from adapt_pruner_jax.models.rope import RopeTables, rotate


def init_params(
  config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> Params:
  """Random parameters: N(0, 0.02), norms one, biases zero."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(Decoder(config).init)
  params = init(key, tokens)["params"]
  return jax.tree.map(lambda x: x.astype(dtype), params)


class Block(nn.Module):
  """One decoder layer with K KV groups and an MLP of width F.

  Made of two halves, each of two steps with an activation in between that
  belongs to units: heads (`attend` -> `add_attention`) and MLP channels
  (`hidden` -> `add_mlp`).
  """

  config: ModelConfig
  K: int
  F: int
  index: int = 0  # which layer; only matters where layers differ otherwise

  def setup(self) -> None:
    c = self.config
    # The names depend on the sizes of this block, not on those of the config.
    here = dataclasses.replace(
      c,
      kv_groups=(self.K,),
      ffn_widths=(self.F,),
      window=(),
      residual=c.residual[self.index : self.index + 1],
    )
    sizes = here.sizes(0)
    self.weight = {
      name: self.param(name, _initializer(name, c), axes.shape(name, sizes))
      for name in layer_names(here, 0)
    }

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: RopeTables,
    mask_BNTS: jax.Array | None,
    masks: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """The residual stream after this layer.

    Args:
      x_BTD: the residual stream before it.
      rope: this layer's, from `ModelConfig.rope_tables`.
      mask_BNTS: from `attention.attention_mask`; None is plain causal.
      masks: {"K": bool [K], "F": bool [F]}: units that count. Masking a
        head's output or an MLP activation is removing it, exactly.
    """
    x_BTD = self.attention(x_BTD, rope, mask_BNTS, masks)
    return self.mlp(x_BTD, masks)

  def attention(self, x_BTD, rope, mask_BNTS, masks=None):
    """Residual stream after the attention half."""
    if not self.K:
      return self.add_attention(x_BTD, None)
    y_BTKGH = self.attend(*self.qkv(x_BTD, rope, masks), mask_BNTS)
    if masks is not None:
      y_BTKGH *= masks["K"][:, None, None].astype(y_BTKGH.dtype)
    return self.add_attention(x_BTD, y_BTKGH)

  def mlp(self, x_BTD, masks=None):
    """Residual stream after the MLP half."""
    if not self.F:
      return self.add_mlp(x_BTD, None)
    y_BTF = self.hidden(x_BTD)
    if masks is not None:
      y_BTF *= masks["F"].astype(y_BTF.dtype)
    return self.add_mlp(x_BTD, y_BTF)

  def qkv(self, x_BTD, rope, masks=None):
    """Rotated queries [B, T, K, G, H] and keys, and values [B, T, K, H].

    `masks` only matters for a norm over all heads together.
    """
    w, c = self.weight, self.config
    h_BTD = self._norm("attn_norm", x_BTD)
    q_BTKGH = project("btd,dkgh->btkgh", h_BTD, w["q"])
    k_BTKH = project("btd,dkh->btkh", h_BTD, w["k"])
    v_BTKH = project("btd,dkh->btkh", h_BTD, w["v"])
    if c.qkv_bias:
      q_BTKGH, k_BTKH = q_BTKGH + w["q_bias"], k_BTKH + w["k_bias"]
      v_BTKH = v_BTKH + w["v_bias"]
    B, T = x_BTD.shape[:2]
    if c.qk_norm == "head":
      q_BTKGH, k_BTKH = (
        self._norm("q_norm", q_BTKGH),
        self._norm("k_norm", k_BTKH),
      )
    elif c.qk_norm == "all":
      q_BTKGH = self._norm_all("q_norm_all", q_BTKGH, masks)
      k_BTKH = self._norm_all("k_norm_all", k_BTKH, masks)
    q_BTNH = rotate(
      q_BTKGH.reshape(B, T, self.K * c.queries_per_group, c.head_dim), rope
    )
    return q_BTNH.reshape(q_BTKGH.shape), rotate(k_BTKH, rope), v_BTKH

  def attend(self, q_BTKGH, k_BSKH, v_BSKH, mask_BNTS):
    """What the heads say, [B, T, K, G, H], see `attention.attend`."""
    c = self.config
    scale = c.attn_scale or c.head_dim**-0.5
    qkv = q_BTKGH, k_BSKH, v_BSKH
    return attention_.attend(*qkv, mask_BNTS, scale, c.attn_softcap)

  def add_attention(self, x_BTD, y_BTKGH):
    """Adds what the heads say (None = no heads) to the residual stream."""
    y_BTD = None
    if y_BTKGH is not None:
      y_BTD = project("btkgh,kghd->btd", y_BTKGH, self.weight["o"])
    return self._add("attn", "o_bias", x_BTD, y_BTD)

  def hidden(self, x_BTD):
    """The MLP's activations [B, T, F]: the input of `down`."""
    w, c = self.weight, self.config
    h_BTD = self._norm("mlp_norm", x_BTD)
    gate_BTF = project("btd,df->btf", h_BTD, w["gate"])
    up_BTF = project("btd,df->btf", h_BTD, w["up"])
    if c.gate_up_bias:
      gate_BTF, up_BTF = gate_BTF + w["gate_bias"], up_BTF + w["up_bias"]
    return ACTIVATIONS[c.activation](gate_BTF) * up_BTF

  def add_mlp(self, x_BTD, y_BTF):
    """Adds the MLP's output (None = no channels) to the residual stream."""
    y_BTD = None
    if y_BTF is not None:
      y_BTD = project("btf,fd->btd", y_BTF, self.weight["down"])
    return self._add("mlp", "down_bias", x_BTD, y_BTD)

  def _add(self, half, bias, x_BTD, y_BTD):
    w, c = self.weight, self.config
    if c.residual:
      x_BTD = x_BTD @ w[f"{half}_shortcut"]
    if bias in w:
      y_BTD = w[bias] if y_BTD is None else y_BTD + w[bias]
    if y_BTD is None:
      return x_BTD
    if f"{half}_post_norm" in w:
      y_BTD = self._norm(f"{half}_post_norm", y_BTD)
    if c.residual_scale != 1:
      y_BTD *= jnp.asarray(c.residual_scale, y_BTD.dtype)
    return x_BTD + y_BTD

  def _norm(self, name, x):
    """`x` normed by parameter `name`, or as it is if there is none."""
    if name not in self.weight:
      return x
    c = self.config
    sliced = c.residual and axes.AXES[name] in axes.RESIDUAL
    width = c.hidden_size if sliced else None
    return rms_norm(x, self.weight[name], c.norm_eps, c.norm_offset, width)

  def _norm_all(self, name, x_BTKH, masks):
    """Norm over all heads of a position together, those that `masks` leave."""
    width = None
    if masks is not None:
      mask_K = masks["K"].astype(x_BTKH.dtype)
      x_BTKH *= mask_K.reshape(-1, *(1,) * (x_BTKH.ndim - 3))
      heads = jnp.maximum(jnp.sum(masks["K"]), 1)
      width = heads * math.prod(x_BTKH.shape[3:])
    flat = x_BTKH.reshape(*x_BTKH.shape[:2], -1)
    scale = self.weight[name].reshape(-1)
    eps = self.config.norm_eps
    return rms_norm(flat, scale, eps, width=width).reshape(x_BTKH.shape)


class Decoder(nn.Module):
  """The whole model; `layer_0` ... `layer_{L-1}` may differ in K and F."""

  config: ModelConfig
  remat: bool = False

  def setup(self) -> None:
    c = self.config
    self.weight = {
      name: self.param(name, _initializer(name, c), axes.shape(name, c.sizes()))
      for name in outer_names(c)
    }
    block = nn.remat(Block) if self.remat else Block
    self.layer = [
      block(c, c.kv_groups[i], c.ffn_widths[i], i) for i in range(c.num_layers)
    ]

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = self.weight["embedding"][tokens_BT]
    scale = self.config.embed_scale
    return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits in float32, [B, T, V]."""
    c = self.config
    width = c.hidden_size if c.residual else None
    x_BTD = rms_norm(
      x_BTD, self.weight["final_norm"], c.norm_eps, c.norm_offset, width
    )
    if c.tied:
      equation, matrix = "btd,vd->btv", self.weight["embedding"]
    else:
      equation, matrix = "btd,dv->btv", self.weight["lm_head"]
    logits_BTV = project(equation, x_BTD, matrix, jnp.float32)
    if c.logit_scale != 1:
      logits_BTV *= c.logit_scale
    return soft_cap(logits_BTV, c.final_softcap)

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
    c = self.config
    rows_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if positions_BT is None:
      positions_BT = rows_BT
    ropes = c.rope_tables(positions_BT)
    mask = partial(attention_.attention_mask, rows_BT, segments_BT)
    x_BTD = self.embed(tokens_BT)
    stream = [x_BTD]
    for i, layer in enumerate(self.layer):
      window = c.window[i] if c.window else 0
      plain = segments_BT is None and not window
      rope = ropes[c.rope_ids()[i]]
      x_BTD = layer(x_BTD, rope, None if plain else mask(window))
      stream.append(x_BTD)
    return self.head(x_BTD), stream


def _initializer(name: str, config: ModelConfig):
  if "norm" in name:
    return nn.initializers.constant(1.0 - config.norm_offset)
  if name.endswith("bias"):
    return nn.initializers.zeros
  return nn.initializers.normal(0.02)
