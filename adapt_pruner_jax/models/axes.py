"""Dim letters, and the one table that says which dims a parameter has.

  B batch            T query position     S key position     L layers
  D residual width   H head_dim           V vocabulary
  K KV heads of this layer                G query heads per KV head
  N = K * G query heads                   F MLP width of this layer
  X experts of a layer, each an MLP of width F
  S width of an expert that all tokens see    O one, the gate of that
  I channels of what a layer is told of a token    R = L * I

A model may have layers of a second kind, whose KV groups are Z.
With wide heads (`WideHeads`):
  Z KV heads of this layer                J query heads per KV head
  P channels of a head
With a gated delta net in place of attention (`delta_net`):
  Z key heads of this layer               A value heads per key head
  U channels of a key                     Y channels of a value
  C taps of its convolutions

The residual width has three letters, by place: D in front of a layer, M between
its attention and its MLP, E behind it. They only differ in models cut by
SliceGPT; everywhere else M = E = D, and activations just say D.

Everything that depends on the meaning of a dimension is derived from `AXES`:
shapes, initial values, sharding, the pruning gather, the sum of Taylor scores,
the reshape to and from HuggingFace tensors, the weight-decay mask.

K and F are the *unit letters*: a layer's KV groups and its MLP channels are
what can be pruned. Per-layer data about units is always a dict
{"K": ..., "F": ...}. A key head of a gated delta net, with the value heads that
it serves, is a KV group of its layer: a unit of letter K, whose dim in the
table is Z, since stacked layers may have other numbers of both, as is a KV head
of a layer with wide heads. In a layer of
experts a unit of letter F is one channel in each of them, of each expert
another one: indices are int [X, f] there, masks bool [X, F].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AXES = {
  "embedding": "VD",
  "final_norm": "E",
  "final_norm_bias": "E",
  "lm_head": "EV",
  "lm_head_bias": "V",
  "told": "VR",  # what layers are told of each token, one after the other
  "told_proj": "DR",
  "told_norm": "I",
  # one set a layer
  "attn_norm": "D",
  "attn_norm_bias": "D",
  "q": "DKGH",
  "k": "DKH",
  "v": "DKH",
  "o": "KGHM",
  "q_bias": "KGH",
  "k_bias": "KH",
  "v_bias": "KH",
  "o_bias": "M",
  "q_norm": "H",
  "k_norm": "H",
  "q_norm_all": "KGH",  # over all heads together (OLMo 2)
  "k_norm_all": "KH",
  "sinks": "KG",  # score of a key that says nothing (gpt-oss)
  "q_gate": "DKGH",  # of what each head says
  "q_gate_bias": "KGH",
  "wide_q": "DZJP",
  "wide_k": "DZP",
  "wide_v": "DZP",
  "wide_o": "ZJPM",
  "wide_q_norm": "P",
  "wide_k_norm": "P",
  "delta_q": "DZU",
  "delta_k": "DZU",
  "delta_v": "DZAY",
  "delta_conv_q": "ZUC",
  "delta_conv_k": "ZUC",
  "delta_conv_v": "ZAYC",
  "delta_gate": "DZAY",  # of what each value head says
  "delta_beta": "DZA",  # how much is learned of a token
  "delta_decay": "DZA",  # how much is forgotten at it, as the two below
  "delta_decay_bias": "ZA",
  "delta_log_rate": "ZA",
  "delta_norm": "Y",
  "delta_o": "ZAYM",
  "attn_post_norm": "M",
  "attn_shortcut": "DM",
  "mlp_norm": "M",
  "mlp_norm_bias": "M",
  "gate": "MF",
  "up": "MF",
  "down": "FE",
  "gate_bias": "F",
  "up_bias": "F",
  "down_bias": "E",
  "xielu_positive": "O",
  "xielu_negative": "O",
  "xielu_beta": "O",
  "xielu_eps": "O",
  "router": "MX",
  "router_bias": "X",
  "router_scale": "M",  # of its input, where that has a norm of its own
  "expert_scale": "X",  # of what each says
  "moe_norm": "M",
  "moe_post_norm": "E",
  "moe_gate": "XMF",
  "moe_up": "XMF",
  "moe_down": "XFE",
  "moe_gate_bias": "XF",
  "moe_up_bias": "XF",
  "moe_down_bias": "XE",
  "shared_gate": "MS",
  "shared_up": "MS",
  "shared_down": "SE",
  "shared_open": "MO",  # how much it counts
  "shared_post_norm": "E",
  "mlp_post_norm": "E",
  "mlp_shortcut": "ME",
  "told_gate": "EI",
  "told_out": "IE",
  "told_post_norm": "E",
  "out_scale": "O",  # of the stream behind the layer
}

BATCH = ("data", "fsdp", "expert")  # mesh axes that cut B
RESIDUAL = "DME"
UNITS = "KF"
QUERIES = "GJ"  # query heads of a KV group
LETTERS = {"K": "K", "Z": "K", "F": "F"}  # of the dims that are units
# Parameters of a layer with a gated delta net, with wide heads, and of one with
# other attention.
DELTA = tuple(name for name in AXES if name.startswith("delta_"))
WIDE = tuple(name for name in AXES if name.startswith("wide_"))
ATTENTION = ("q", "q_gate", "k", "v", "o", "q_bias", "q_gate_bias", "k_bias")
ATTENTION += ("v_bias", "o_bias", "q_norm", "k_norm")
ATTENTION += ("q_norm_all", "k_norm_all", "sinks")
# Of a layer that is told something of each token.
TOLD = ("told_gate", "told_out", "told_post_norm")
# Of outside the layers, for that.
TOLD_OUTER = ("told", "told_proj", "told_norm")
# What a layer does not have that uses the keys and values of one before it.
KEYS_VALUES = ("k", "v", "k_norm", "wide_k", "wide_v", "wide_k_norm")
# Of an expert that all tokens see.
SHARED = ("shared_gate", "shared_up", "shared_down")
# Of experts with norms of their own.
EXPERT_NORMS = ("router_scale", "expert_scale", "moe_norm", "moe_post_norm")
# What the activation of an MLP with `xielu` is made with.
XIELU = tuple(name for name in AXES if name.startswith("xielu_"))
# The matrices whose salience makes up the score of a unit; an MLP may have no
# gate, an attention has no delta net. Biases and norms never enter a score.
SCORED = {
  "K": (
    *("q", "k", "v", "o", "q_gate", "delta_q", "delta_k", "delta_v"),
    *("delta_gate", "delta_beta", "delta_decay", "delta_o"),
    *("wide_q", "wide_k", "wide_v", "wide_o"),
  ),
  "F": ("gate", "up", "down", "moe_gate", "moe_up", "moe_down"),
}

Params = dict[str, Any]


def shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Shape of a parameter.

  Args:
    name: a key of `AXES`.
    sizes: of each letter that it has.
  """
  return tuple(sizes[letter] for letter in AXES[name])


def cut_of(name: str) -> str | None:
  """The letter of the dim that parameter `name` is cut along, or None."""
  return next((letter for letter in AXES[name] if letter in LETTERS), None)


def unit_of(name: str) -> str | None:
  """The unit letter that parameter `name` is cut along, or None."""
  letter = cut_of(name)
  return letter and LETTERS[letter]


def take(name: str, array: jax.Array, indices: Mapping[str, Any]) -> jax.Array:
  """Keeps some units of a parameter.

  Args:
    name: of the parameter.
    array: the parameter, of numpy or of JAX.
    indices: {"K": int [k], "F": int [f] or [X, f]}, the units to keep, in
      their order.

  Returns:
    The smaller array; `array` itself where it has no units.
  """
  unit = unit_of(name)
  if unit is None:
    return array
  library = np if isinstance(array, np.ndarray) else jnp
  units, axis = indices[unit], AXES[name].index(cut_of(name))
  if of_each_expert(name):
    return library.take_along_axis(array, _by_expert(name, units), axis)
  return library.take(array, units, axis=axis)


def of_each_expert(name: str) -> bool:
  """Whether there is one of these an expert."""
  return AXES[name][0] == "X" and len(AXES[name]) > 1


def _by_expert(name: str, units_XF: np.ndarray) -> np.ndarray:
  """Units of each expert, to index a parameter [X, ..] of them with."""
  others = [i for i, n in enumerate(AXES[name]) if n not in ("X", cut_of(name))]
  return np.expand_dims(units_XF, others)


def put(
  name: str, array: jax.Array, indices: Mapping[str, Any], sizes: Mapping
) -> jax.Array:
  """Inverse of `take`: scatters units into zeros.

  Args:
    name: of the parameter.
    array: what `take` has kept.
    indices: where its units go, as of `take`.
    sizes: of each letter, the full numbers of units.

  Returns:
    The larger array; `array` itself where it has no units.
  """
  unit = unit_of(name)
  if unit is None:
    return array
  axis = AXES[name].index(cut_of(name))
  full = list(array.shape)
  full[axis] = sizes[cut_of(name)]
  at = (slice(None),) * axis + (indices[unit],)
  if of_each_expert(name):
    at = tuple(np.ogrid[tuple(map(slice, array.shape))])
    at = (*at[:axis], _by_expert(name, indices[unit]), *at[axis + 1 :])
  if isinstance(array, np.ndarray):
    made = np.zeros(full, array.dtype)
    made[at] = array
    return made
  return jnp.zeros(full, array.dtype).at[at].set(array)


def mask(name: str, array: jax.Array, masks: Mapping[str, Any]) -> jax.Array:
  """Zeroes units of a parameter.

  Args:
    name: of the parameter.
    array: with all units.
    masks: {"K": bool [K], "F": bool [F] or [X, F]}, False where to zero; what
      is beyond the units of this kind of layer is not read.
  """
  if name == "moe_down_bias":  # no unit's, but there is none without units
    return array * masks["F"].any().astype(array.dtype)
  unit = unit_of(name)
  if unit is None:
    return array
  axis = AXES[name].index(cut_of(name))
  shape_ = [1] * array.ndim
  shape_[axis] = array.shape[axis]
  if of_each_expert(name):
    shape_[0] = len(array)
  mask_U = masks[unit][..., : array.shape[axis]]
  return array * mask_U.reshape(shape_).astype(array.dtype)


def layer_name(index: int) -> str:
  """Key of a layer in the tree of parameters."""
  return f"layer_{index}"


def map_named(fn: Callable, tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` with `fn(name, layer index, leaf, *rest leaves)`.

  Works on params and on any tree with params inside, such as Adam's moments.
  The layer index is None outside the layers, the name is None for a leaf that
  is not a parameter (a counter).
  """

  def one(path: Sequence, leaf: Any, *others: Any) -> Any:
    keys = [k for k in (getattr(p, "key", None) for p in path) if k is not None]
    name = keys[-1] if keys and keys[-1] in AXES else None
    inside = [k for k in keys if str(k).startswith("layer_")]
    index = int(inside[-1].removeprefix("layer_")) if inside else None
    return fn(name, index, leaf, *others)

  return jax.tree_util.tree_map_with_path(one, tree, *rest)
