"""`ModelConfig`: all that shapes a model's function, and what follows from it.

Shapes and numbers of parameters are derived from a config and `axes.AXES`,
without any array.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.rope import (
  Rope,
  RopeTables,
  rope_tables,
  rotated_channels,
)
from adapt_pruner_jax.models.second_kinds import DeltaNet, WideHeads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that shapes the function.

  A layer without KV groups has no attention, one of width 0 no MLP, one with
  neither is not there: it passes its input on (a down or output bias would
  still add).
  """

  family: str  # a row of hf.families.FAMILIES
  vocab_size: int
  hidden_size: int
  queries_per_group: int
  head_dim: int
  kv_groups: tuple[int, ...]  # of each layer
  ffn_widths: tuple[int, ...]  # of each layer
  norm_eps: float
  rope: Rope
  context: int  # longest sequence the model was made for
  tied: bool  # the output matrix is the embedding
  qkv_bias: bool = False
  o_bias: bool = False
  gate_up_bias: bool = False
  down_bias: bool = False
  activation: str = "silu"  # a key of `arithmetic.ACTIVATIONS`
  gated: bool = True  # the MLP has a gate beside `up`
  parallel: bool = False  # the MLP reads what is in front of the attention
  norm: str = "rms"  # rms | layer (which takes the mean away)
  norm_bias: bool = False  # of layer norms
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
  nope: tuple[int, ...] = ()  # 1 = a layer without rotary embeddings; () = none
  # Residual widths (D, M, E) of each layer in a model cut by SliceGPT; () = D
  # throughout and no shortcut matrices. Norms go on dividing by D.
  residual: tuple[tuple[int, int, int], ...] = ()
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  attn_gate: bool = False  # what heads say times a sigmoid of the input
  # 1 = a layer with a gated delta net in place of attention, whose key heads
  # are then its KV groups; () = none.
  delta: tuple[int, ...] = ()
  delta_net: DeltaNet | None = None
  qk_norm_late: bool = False  # behind the rotation, of each head
  experts: int = 0  # X, MLPs of which each token sees some; 0 = one MLP
  experts_per_token: int = 0
  router_norm: bool = False  # weights of a token's experts add up to one
  router_loss: float = 0.0  # what the balance of experts counts for
  router_loss_on: bool = False  # whether it counts in training at all
  expert_bias: bool = False  # of the router and of all matrices of experts
  # Experts' gates are clamped from above, what they open from both sides, and
  # the sigmoid in between has a factor (gpt-oss); 0 = an ordinary gate.
  swiglu_limit: float = 0.0
  swiglu_alpha: float = 0.0
  attn_sinks: bool = False  # each head may look at nothing
  shared_width: int = 0  # of an expert that all tokens see
  # That expert and the others have norms of their own, in front and behind, and
  # the router has one too; else there is a gate of what all tokens see.
  expert_norms: bool = False
  shared_norm: bool = False  # of parallel halves: one in front of both
  head_bias: bool = False  # of the output matrix
  # 1 = a layer with `wide_heads`, which then see all and turn by `rope`, where
  # the others have windows and turn by `local_rope`; () = none.
  wide: tuple[int, ...] = ()
  wide_heads: WideHeads | None = None
  v_norm: bool = False  # of each value, without a weight
  out_scale: bool = False  # the stream behind a layer is scaled
  # 1 = a layer with the keys and values of the last one of its kind that has
  # its own; () = none.
  reuses: tuple[int, ...] = ()
  reused_groups: tuple[int, int] = (0, 0)  # KV groups of those; 0 = none
  told: int = 0  # I, channels of what each layer is told of a token
  told_layers: int = 0  # of the original, as many as are told something

  @property
  def num_layers(self) -> int:
    """L, layers without units included."""
    return len(self.kv_groups)

  def sizes(self, layer: int | None = None) -> dict[str, int]:
    """Size of each dim letter.

    Args:
      layer: which one's; None = those outside the layers. Of the kind of layer
        that it is not, the largest.
    """
    sizes = {
      "V": self.vocab_size,
      "G": self.queries_per_group,
      "H": self.head_dim,
      "X": self.experts,
      "S": self.shared_width,
      "O": 1,
      "I": self.told,
      "R": self.told * self.told_layers,
    }
    sizes |= {
      "D": self.hidden_size,
      "M": self.hidden_size,
      "E": self.hidden_size,
    }
    if net := self.delta_net:
      sizes |= {"A": net.values_per_key, "U": net.key_dim}
      sizes |= {"Y": net.value_dim, "C": net.taps}
    if heads := self.wide_heads:
      sizes |= {"J": heads.queries_per_group, "P": heads.head_dim}
    if layer is not None:
      here, F = self.is_second(layer), self.ffn_widths[layer]
      own = {"Z" if here else "K": self.kv_groups[layer]}
      sizes |= {"K": self.most_groups(0), "Z": self.most_groups(1), "F": F}
      sizes |= own
      if self.residual:
        sizes |= dict(zip("DME", self.residual[layer], strict=True))
    elif self.residual:
      sizes |= {"D": self.residual[0][0], "E": self.residual[-1][2]}
    return sizes

  def has_one_norm(self) -> bool:
    """Whether a layer's halves read one norm, `attn_norm`."""
    return self.parallel and self.shared_norm

  def is_delta(self, layer: int) -> bool:
    """Whether a layer has a gated delta net in place of attention."""
    return bool(self.delta and self.delta[layer])

  def kinds(self) -> tuple[int, ...]:
    """1 for each layer of the second kind: a gated delta net, or wide heads."""
    return self.delta or self.wide or (0,) * self.num_layers

  def is_second(self, layer: int) -> bool:
    """Whether a layer is of the second kind, as of `kinds`."""
    return bool(self.kinds()[layer])

  def most_groups(self, kind: int) -> int:
    """KV groups of the layer of a kind that has the most.

    Args:
      kind: 1 = of layers of the second kind, 0 = of the others.
    """
    pairs = zip(self.kv_groups, self.kinds(), strict=True)
    return max((k for k, here in pairs if here == kind), default=0)

  def group(self, layer: int) -> tuple[int, int]:
    """What a KV group of a layer has: heads, and channels of each.

    Of a gated delta net, those of its values.
    """
    if self.is_delta(layer):
      return self.delta_net.values_per_key, self.delta_net.value_dim
    sizes = self.wide_heads if self.is_second(layer) else self
    return sizes.queries_per_group, sizes.head_dim

  def heads(self) -> tuple[int, ...]:
    """Query heads of each layer, or value heads of its gated delta net."""
    return tuple(k * self.group(i)[0] for i, k in enumerate(self.kv_groups))

  def head_channels(self) -> tuple[int, ...]:
    """Channels of all heads of each layer, which its `o` reads."""
    return tuple(n * self.group(i)[1] for i, n in enumerate(self.heads()))

  def carried(self) -> tuple[int, int, int]:
    """Channels that ride in front of the residual stream, side by side.

    What layers are told of a token, and keys and values that layers of either
    kind use again.
    """
    heads = self.head_dim, self.wide_heads.head_dim if self.wide_heads else 0
    first, second = (
      2 * k * size for k, size in zip(self.reused_groups, heads, strict=True)
    )
    return self.told * self.told_layers, first, second

  def stream_width(self) -> int:
    """Channels that layers hand on: the residual stream, and what it carries.

    A model cut by SliceGPT has its own, see `residual`.
    """
    return self.hidden_size + sum(self.carried())

  def is_held(self, layer: int) -> bool:
    """Whether a layer's KV groups are tied to those of other layers.

    It uses the keys and values of another one, or others use its own.
    """
    pairs = [*zip(self.reuses, self.kinds(), strict=False)]
    kind = self.kinds()[layer]
    if (1, kind) not in pairs:
      return False
    own = [i for i, pair in enumerate(pairs) if pair == (0, kind)]
    return bool(self.reuses[layer]) or layer == own[-1]

  def units(self) -> dict[str, tuple[int, ...]]:
    """Units of each layer by their letter: {"K": [L], "F": [L]}."""
    return {"K": self.kv_groups, "F": self.ffn_widths}

  def with_units(self, units: Mapping[str, tuple[int, ...]]) -> "ModelConfig":
    """This model with other sizes.

    Args:
      units: as `units` gives them.
    """
    return dataclasses.replace(
      self, kv_groups=units["K"], ffn_widths=units["F"]
    )

  def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
    """The model with these layers only, in this order."""
    of_layers = ("kv_groups", "ffn_widths", "window", "nope", "residual")
    of_layers += ("delta", "wide", "reuses")
    fields = {name: getattr(self, name) for name in of_layers}
    return dataclasses.replace(
      self, **{n: tuple(x[i] for i in layers if x) for n, x in fields.items()}
    )

  def rope_tables(self, positions_BT: jax.Array) -> tuple[RopeTables, ...]:
    """Rotary tables of each distinct rope; layers choose by `rope_ids`.

    Args:
      positions_BT: of the tokens, from 0.

    Returns:
      (cosine, sine) of each, float32 [B, T, R].
    """
    ropes = self.ropes()
    sizes = [self.head_dim] * len(ropes)
    if self.wide_heads:
      sizes[0] = self.wide_heads.head_dim
    return tuple(
      rope_tables(rope, size, positions_BT)
      for rope, size in zip(ropes, sizes, strict=True)
    )

  def ropes(self) -> tuple[Rope, ...]:
    """The distinct ropes of the model, at least one."""
    local = (self.local_rope,) if self.local_rope else ()
    share = (rotated_channels(self.rope, self.head_dim) + 0.5) / self.head_dim
    still = Rope(kind="none", partial=share)
    return (self.rope, *local, *(still,) * any(self.nope))

  def rope_ids(self) -> tuple[int, ...]:
    """Which of `rope_tables` each layer uses, [L]."""
    ids = [0] * self.num_layers
    if self.local_rope is not None and self.window:
      ids = [int(bool(w)) for w in self.window]
    for i, still in enumerate(self.nope):
      ids[i] = len(self.ropes()) - 1 if still else ids[i]
    return tuple(ids)


def to_json(config: ModelConfig) -> dict:
  """The config as plain values, for `from_json`."""
  return dataclasses.asdict(config)


# What `to_json` wrote before 0.2: the dim letters.
OLD_NAMES = {
  "V": "vocab_size",
  "D": "hidden_size",
  "G": "queries_per_group",
  "H": "head_dim",
  "K": "kv_groups",
  "F": "ffn_widths",
}


def from_json(fields: dict) -> ModelConfig:
  """Inverse of `to_json`, also after JSON made lists of the tuples."""

  def tuples(value: Any) -> Any:
    return (
      tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
    )

  fields = {
    OLD_NAMES.get(name, name): tuples(value) for name, value in fields.items()
  }
  for name in ("rope", "local_rope"):
    if fields[name] is not None:
      of_rope = fields[name].items()
      fields[name] = Rope(**{n: tuples(value) for n, value in of_rope})
  if fields.get("delta_net"):  # earlier versions did not write it
    fields["delta_net"] = DeltaNet(**fields["delta_net"])
  if fields.get("wide_heads"):
    fields["wide_heads"] = WideHeads(**fields["wide_heads"])
  return ModelConfig(**fields)


def layer_names(config: ModelConfig, layer: int | None = None) -> list[str]:
  """Names of the parameters of a layer.

  Args:
    config: of the model.
    layer: which one; None = one with all the parameters that the family has,
      those of both kinds of layer.
  """
  mixer = []
  if layer is None or not config.is_second(layer):
    mixer += _attention_names(config)
  if config.wide_heads and (layer is None or config.is_second(layer)):
    no_v = not config.wide_heads.has_v
    mixer += [n for n in axes.WIDE if not (no_v and n == "wide_v")]
  if config.delta_net and (layer is None or config.is_delta(layer)):
    mixer += axes.DELTA
  has_o_bias = config.o_bias and "o" in mixer
  mlp = ["gate"] * config.gated + ["up", "down"]
  if config.activation == "xielu":
    mlp += axes.XIELU
  if config.experts:
    mlp = ["router", "moe_gate", "moe_up", "moe_down"]
    biases = ("router_bias", "moe_gate_bias", "moe_up_bias", "moe_down_bias")
    mlp += biases * config.expert_bias
    mlp += axes.EXPERT_NORMS * config.expert_norms
  mlp += ["gate_bias"] * (config.gate_up_bias and config.gated)
  mlp += ["up_bias"] * config.gate_up_bias
  shared = axes.SHARED if config.shared_width else ()
  if shared:
    shared += ("shared_post_norm" if config.expert_norms else "shared_open",)
  before = config.norm_order != "post"
  after = config.norm_order != "pre"
  mixer += ["attn_norm"] * before + ["attn_post_norm"] * after
  front = "attn_norm" if config.has_one_norm() else "mlp_norm"
  mlp += [front] * before + ["mlp_post_norm"] * after
  mixer += ["attn_norm_bias"] * config.norm_bias
  mlp += [f"{front}_bias"] * config.norm_bias
  if layer is not None:
    mixer = mixer if config.kv_groups[layer] else []
    if config.reuses and config.reuses[layer]:
      mixer = [n for n in mixer if n not in axes.KEYS_VALUES]
    # A shared expert goes on where the others have no channels.
    kept = [n for n in mlp if n.startswith("mlp_")] if shared else []
    mlp = mlp if config.ffn_widths[layer] else kept
  shortcuts = ["attn_shortcut", "mlp_shortcut"] * bool(config.residual)
  biases = ["o_bias"] * has_o_bias + ["down_bias"] * config.down_bias
  last = ["out_scale"] * config.out_scale + [*axes.TOLD] * bool(config.told)
  return [*dict.fromkeys(mixer + mlp + [*shared] + biases + shortcuts + last)]


def _attention_names(config: ModelConfig) -> list[str]:
  gate = config.attn_gate
  names = ["q", *["q_gate"] * gate, "k", "v", "o"]
  if config.qkv_bias:
    names += ["q_bias", *["q_gate_bias"] * gate, "k_bias", "v_bias"]
  names += ["sinks"] * config.attn_sinks
  return (
    names
    + {
      "": [],
      "head": ["q_norm", "k_norm"],
      "all": ["q_norm_all", "k_norm_all"],
    }[config.qk_norm]
  )


def outer_names(config: ModelConfig) -> list[str]:
  """Names of the parameters outside the layers."""
  norm = ["final_norm"] + ["final_norm_bias"] * config.norm_bias
  head = ["lm_head"] * (not config.tied) + ["lm_head_bias"] * config.head_bias
  told = axes.TOLD_OUTER if config.told else ()
  return ["embedding", *norm, *head, *told]


def param_shapes(config: ModelConfig) -> dict:
  """The tree of parameters with shapes, tuples of int, in place of arrays."""
  sizes = config.sizes()
  tree = {n: axes.shape(n, sizes) for n in outer_names(config)}
  for i in range(config.num_layers):
    sizes = config.sizes(i)
    tree[axes.layer_name(i)] = {
      n: axes.shape(n, sizes) for n in layer_names(config, i)
    }
  return tree


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
  """The tree of parameters as `jax.ShapeDtypeStruct`s of one dtype."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, dtype),
    param_shapes(config),
    is_leaf=lambda s: isinstance(s, tuple),
  )


def count_params(config: ModelConfig) -> int:
  """Number of parameters; a tied output matrix counts once."""
  shapes = jax.tree.leaves(
    param_shapes(config), is_leaf=lambda s: isinstance(s, tuple)
  )
  return sum(math.prod(s) for s in shapes)


def unit_cost(config: ModelConfig, layer: int = 0) -> dict[str, int]:
  """Number of parameters that go with a unit of a layer.

  Returns:
    {"K": of one KV group, "F": of one MLP channel, or one in each expert}.
  """
  one = config.with_layers([layer]).with_units({"K": (1,), "F": (1,)})
  cost = dict.fromkeys(axes.UNITS, 0)
  for name in layer_names(one, 0):
    if unit := axes.unit_of(name):
      cost[unit] += math.prod(axes.shape(name, one.sizes(0)))
  return cost
