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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adapt_pruner_jax import attention, axes
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.ops import ACTIVATIONS, project, rms_norm, soft_cap
from adapt_pruner_jax.rope import Rope, RopeTables, rope_tables, rotate


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that shapes the function; letters as in `axes`.

  A layer with K = 0 has no attention, one with F = 0 no MLP, one with neither
  is not there: it passes its input on (a down or output bias would still add).
  """

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
  gate_up_bias: bool = False
  down_bias: bool = False
  activation: str = "silu"  # silu | gelu_tanh
  norm_order: str = "pre"  # pre | post | sandwich, around each half layer
  norm_offset: float = 0.0  # added to norm weights (Gemma: 1)
  qk_norm: str = ""  # "" | head (each head) | all (over all heads together)
  attn_scale: float = 0.0  # of q k^T; 0 = H ** -0.5
  attn_softcap: float = 0.0  # 0 = none
  final_softcap: float = 0.0
  embed_scale: float = 1.0
  residual_scale: float = 1.0  # of what each half layer adds
  logit_scale: float = 1.0
  window: tuple[int, ...] = ()  # keys each layer sees; 0 or () = all
  local_rope: Rope | None = None  # of the layers with a window, if another
  # Residual widths (D, M, E) of each layer in a model cut by SliceGPT; () = D
  # throughout and no shortcut matrices. Norms go on dividing by D.
  residual: tuple[tuple[int, int, int], ...] = ()
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  @property
  def L(self) -> int:
    return len(self.K)

  def sizes(self, layer: int | None = None) -> dict[str, int]:
    """Size of each dim letter; without `layer` those outside the layers."""
    sizes = {"V": self.V, "G": self.G, "H": self.H}
    sizes |= {"D": self.D, "M": self.D, "E": self.D}
    if layer is not None:
      sizes |= {"K": self.K[layer], "F": self.F[layer]}
      if self.residual:
        sizes |= dict(zip("DME", self.residual[layer], strict=True))
    elif self.residual:
      sizes |= {"D": self.residual[0][0], "E": self.residual[-1][2]}
    return sizes

  def units(self) -> dict[str, tuple[int, ...]]:
    return {"K": self.K, "F": self.F}

  def rope_tables(self, positions_BT: jax.Array) -> tuple[RopeTables, ...]:
    """Tables of each distinct rope; layers choose by `rope_ids`."""
    ropes = (self.rope, self.local_rope) if self.local_rope else (self.rope,)
    return tuple(rope_tables(rope, self.H, positions_BT) for rope in ropes)

  def rope_ids(self) -> tuple[int, ...]:
    """Which of `rope_tables` each layer uses, [L]."""
    local = self.local_rope is not None and self.window
    return tuple(int(bool(w)) for w in self.window) if local else (0,) * self.L


def to_json(config: ModelConfig) -> dict:
  return dataclasses.asdict(config)


def from_json(fields: dict) -> ModelConfig:
  """Inverse of `to_json`, also after JSON made lists of the tuples."""

  def tuples(value: Any) -> Any:
    return (
      tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
    )

  fields = {name: tuples(value) for name, value in fields.items()}
  for name in ("rope", "local_rope"):
    if fields[name] is not None:
      fields[name] = Rope(**fields[name])
  return ModelConfig(**fields)


def layer_names(config: ModelConfig, layer: int | None = None) -> list[str]:
  """Names of the parameters of a layer; without `layer`, of a full one."""
  attention, mlp = ["q", "k", "v", "o"], ["gate", "up", "down"]
  attention += ["q_bias", "k_bias", "v_bias"] * config.qkv_bias
  attention += {
    "": [],
    "head": ["q_norm", "k_norm"],
    "all": ["q_norm_all", "k_norm_all"],
  }[config.qk_norm]
  mlp += ["gate_bias", "up_bias"] * config.gate_up_bias
  before = config.norm_order != "post"
  after = config.norm_order != "pre"
  attention += ["attn_norm"] * before + ["attn_post_norm"] * after
  mlp += ["mlp_norm"] * before + ["mlp_post_norm"] * after
  if layer is not None:
    attention = attention if config.K[layer] else []
    mlp = mlp if config.F[layer] else []
  shortcuts = ["attn_shortcut", "mlp_shortcut"] * bool(config.residual)
  biases = ["o_bias"] * config.o_bias + ["down_bias"] * config.down_bias
  return attention + mlp + biases + shortcuts


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
      n: axes.shape(n, sizes) for n in layer_names(config, i)
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
  shapes = jax.tree.leaves(
    param_shapes(config), is_leaf=lambda s: isinstance(s, tuple)
  )
  return sum(math.prod(s) for s in shapes)


def unit_cost(config: ModelConfig) -> dict[str, int]:
  """Parameters of one KV group (K) and of one MLP channel (F)."""
  sizes = config.sizes() | {"K": 1, "F": 1}
  cost = dict.fromkeys(axes.UNITS, 0)
  for name in layer_names(config):
    if unit := axes.unit_of(name):
      cost[unit] += math.prod(axes.shape(name, sizes))
  return cost


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
      K=(self.K,),
      F=(self.F,),
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
    q_BTNH = rotate(q_BTKGH.reshape(B, T, self.K * c.G, c.H), rope)
    return q_BTNH.reshape(q_BTKGH.shape), rotate(k_BTKH, rope), v_BTKH

  def attend(self, q_BTKGH, k_BSKH, v_BSKH, mask_BNTS):
    """What the heads say, [B, T, K, G, H], see `attention.attend`."""
    c = self.config
    scale = c.attn_scale or c.H**-0.5
    qkv = q_BTKGH, k_BSKH, v_BSKH
    return attention.attend(*qkv, mask_BNTS, scale, c.attn_softcap)

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
    width = c.D if sliced else None
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
    self.layer = [block(c, c.K[i], c.F[i], i) for i in range(c.L)]

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = self.weight["embedding"][tokens_BT]
    scale = self.config.embed_scale
    return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits in float32, [B, T, V]."""
    c = self.config
    width = c.D if c.residual else None
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
    mask = partial(attention.attention_mask, rows_BT, segments_BT)
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
