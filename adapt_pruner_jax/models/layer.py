"""The one driver of a layer: training, scoring, refits and generation use it.

A layer has two halves, named by the letter of their units: attention (K, KV
groups) and the MLP (F, channels). A half is two steps around the matrix that it
writes to the residual stream with, `o` or `down`: `read` makes its input of the
stream, whose channels belong to units, and `write` puts that into the stream. A
unit that is masked in between is removed, exactly.

Layers are plain dicts of weights. Sizes come from the weights, everything else
from a config, so that equal layers share an executable and the layers of a
stacked model (`surgery.dense`) can be scanned over: their `Place` is traced
then.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from adapt_pruner_jax.models import axes, delta_net, experts
from adapt_pruner_jax.models.arithmetic import ACTIVATIONS, project, xielu
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.heads import (
  heads,
  keys_and_values,
  norm,
  room,
  stream,
)
from adapt_pruner_jax.models.kernels import AUTO, Kernel
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.remat import BETWEEN, FRONT, read_by

# The matrix that each half writes with, and those that it reads with.
HALVES = {
  "o": ("q", "q_gate", "k", "v"),
  "wide_o": ("wide_q", "wide_k", "wide_v"),
  "delta_o": (
    *("delta_q", "delta_k", "delta_v"),
    *("delta_gate", "delta_beta", "delta_decay"),
  ),
  "down": ("gate", "up"),
  "moe_down": (),  # what experts read with is theirs, see `refit_experts`
}
WRITERS = {"K": "o", "F": "down"}  # by unit
OTHERS = {"K": ("wide_o", "delta_o"), "F": ("moe_down",)}  # instead of these
NAMES = {"K": "attn", "F": "mlp"}  # how parameters of a half begin

# Keys and values, [B, S, K, H] each; or what a gated delta net keeps.
Cache = tuple[jax.Array, jax.Array] | delta_net.Before


class Place(NamedTuple):
  """Where a layer stands, as far as its function depends on it."""

  window: jax.Array | int  # positions that its queries see; 0 = all
  rope: jax.Array | int  # which of `AttentionInputs.ropes`
  kind: jax.Array | int = 0  # 1 = the second, as of `ModelConfig.kinds`
  reuses: jax.Array | int = 0  # 1 = has the keys and values of one before it


class Tap(NamedTuple):
  """What running a layer, or a half of it, lets a caller see.

  Attributes:
    fed: {"K": [B, T, K, G, H], "F": [B, T, F]}: the inputs of `o` and `down`
      before masks, [B, T, Z, A, Y] of a delta net, of experts as
      `experts.Routed`; None where a half is absent, or only known to be of
      either kind, no entry where it was not run.
    between: what is between the halves, see `stream`; None after just one
      half.
    cache: the layer's keys and values, new ones in their columns; None where
      there is no attention.
  """

  fed: dict[str, jax.Array | None]
  between: jax.Array | None = None
  cache: Cache | None = None


def place(config: ModelConfig, index: int) -> Place:
  """The place of layer `index`, known when the program is compiled."""
  window = config.window[index] if config.window else 0
  kind, reuses = int(config.is_second(index)), config.reuses
  again = reuses[index] if reuses else 0
  return Place(window, config.rope_ids()[index], kind, again)


def places(config: ModelConfig) -> Place:
  """The places of all layers to scan over, int32 [L] each."""
  window_L = np.array(config.window or (0,) * config.num_layers, np.int32)
  rope_L = np.array(config.rope_ids(), np.int32)
  again_L = np.array(config.reuses or (0,) * config.num_layers, np.int32)
  return Place(window_L, rope_L, np.array(config.kinds(), np.int32), again_L)


def attention_inputs(
  config: ModelConfig,
  positions: jax.Array | int,
  segments: jax.Array | None = None,
  kernel: Kernel = AUTO,
) -> AttentionInputs:
  """What attention knows about rows that are read from their beginning.

  Args:
    config: of the model.
    positions: int [B or 1, T], each token's place in its document; or T, for
      rows that are one document each.
    segments: int [B, T], the documents of packed rows; None = one a row.
    kernel: which implementation is asked for, on which devices.

  Returns:
    The inputs, with a rotary table for each rope of the model.
  """
  if isinstance(positions, int):
    positions = jnp.arange(positions)[None]
  ropes = config.rope_tables(positions)
  return AttentionInputs(positions, ropes, segments, kernel=kernel)


def run_layer(
  config: ModelConfig,
  weights: Params,
  place: Place,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array, Tap]:
  """Runs both halves of a layer.

  Args:
    config: of the model; its sizes of layers do not matter here.
    weights: the layer's parameters, without a leading layer dim.
    place: from `place`, or one of `places` inside a scan.
    inputs: what attention knows about the rows.
    x_BTD: the residual stream in front of the layer.
    masks: {"K": bool [K], "F": bool [F] or [X, F]}, the units that count;
      None, or no entry = all.
    cache: keys and values of the columns of `inputs.cached`.

  Returns:
    The residual stream behind the layer, [B, T, E], and what there is to see.
  """
  args = config, weights, place, inputs
  x_BTD = checkpoint_name(x_BTD, FRONT)
  mid_BTM, mixed = run_half("K", *args, x_BTD, masks, cache)
  mid_BTM = checkpoint_name(mid_BTM, BETWEEN)
  out_BTE, channels = run_half("F", *args, mid_BTM, masks)
  return out_BTE, Tap(mixed.fed | channels.fed, mid_BTM, mixed.cache)


def run_half(
  unit: str,
  config: ModelConfig,
  weights: Params,
  place: Place,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array, Tap]:
  """Runs the attention (unit K) or the MLP (F) of a layer.

  An absent half passes the stream on; an output bias and SliceGPT's shortcut
  are still applied.

  Args:
    unit: "K" or "F".
    config, weights, place, inputs: as `run_layer`'s.
    x_BTD: the residual stream in front of the half.
    masks, cache: as `run_layer`'s.

  Returns:
    The residual stream behind the half, and what there is to see.
  """
  if unit == "K" and "o" in weights and writer_of("K", weights) != "o":
    return _either(config, weights, place, inputs, x_BTD, masks)
  if unit == "K":
    x_BTD = carry(config, weights, place, inputs, x_BTD, masks)
  fed, cache = read(unit, config, weights, place, inputs, x_BTD, masks, cache)
  counted = fed
  if fed is not None and masks is not None and unit in masks:
    if isinstance(fed, experts.Routed):
      counted = experts.masked(fed, masks[unit])
    else:
      counted = times_mask(fed, masks[unit])
  y_BTD = write(unit, config, weights, x_BTD, counted)
  return y_BTD, Tap({unit: fed}, cache=cache)


def _either(config, weights, place, inputs, x_BTD, masks):
  """`run_half` of a layer of either kind, as the place says.

  Stacked layers have the parameters of both.
  """

  def without(others):
    own = {n: w for n, w in weights.items() if n not in others}
    args = config, own, place, inputs
    return lambda x_BTD: run_half("K", *args, x_BTD, masks)[0]

  others = axes.WIDE if config.wide_heads else axes.DELTA
  kinds = without(axes.ATTENTION), without(others)
  y_BTD = jax.lax.cond(place.kind == 1, *kinds, x_BTD)
  return y_BTD, Tap({"K": None})


def times_mask(fed: jax.Array, mask_U: jax.Array) -> jax.Array:
  """What `read` gives, times a mask of units or numbers in its place.

  These may be more, where another kind of layer has more units. Where they are
  float32 so is the product, and with it sums over tokens in their gradients.
  """
  mask_U = mask_U[: fed.shape[2]].reshape(-1, *(1,) * (fed.ndim - 3))
  wide = jnp.promote_types(fed.dtype, mask_U.dtype)
  return (fed.astype(wide) * mask_U.astype(wide)).astype(fed.dtype)


def read(
  unit: str,
  config: ModelConfig,
  weights: Params,
  place: Place,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array | experts.Routed | experts.Shared | None, Cache | None]:
  """What the units of a half make of the stream: the input of `o` or `down`.

  Args:
    unit, config, weights, place, inputs, x_BTD, cache: as `run_half`'s.
    masks: units that count, for a norm over all heads together; what the
      masked ones say is not zeroed here.

  Returns:
    [B, T, K, G, H] or of the second kind's letters, [B, T, F] or what experts
    made, None if
    the half is absent; and what the layer caches, None of an MLP.
  """
  if unit == "F" and "shared_down" in weights and not count(unit, weights):
    h_BTD = experts.normed(config, weights, x_BTD)
    return experts.Shared(experts.shared(config, weights, h_BTD)), None
  if not count(unit, weights):
    return None, None
  if unit == "F":
    return _channels(config, weights, x_BTD, inputs.kernel.cutting), None
  if "delta_o" in weights:
    h_BTD = norm(config, weights, "attn_norm", x_BTD)
    # With a prefix, a row is one document and one way to go on from it.
    segments_BT = None if inputs.prefix else inputs.segments
    args = weights, config.norm_eps, h_BTD, segments_BT
    return delta_net.heads(*args, cache)
  weights, place = _of_kind(config, weights, place)
  return heads(config, weights, place, inputs, x_BTD, masks, cache)


def _of_kind(config, weights, place):
  """Weights and place of an attention whose heads may be of either size."""
  if "wide_o" in weights:
    weights = {n.removeprefix("wide_"): w for n, w in weights.items()}
    return weights, place._replace(window=0, rope=0, kind=1)
  if config.wide_heads:  # the kind says who sees whom, and how they turn
    place = place._replace(window=max(config.window), rope=1, kind=0)
  return weights, place


def carry(
  config: ModelConfig,
  weights: Params,
  place: Place,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
  """Hands an attention's keys and values on, to layers without their own.

  They replace what an earlier layer of the kind has handed on.

  Args:
    config, weights, place, inputs, masks: as `run_half`'s.
    x_BTD: what is in front of the attention.

  Returns:
    The same, with them in front of the residual stream (`carried`).
  """
  weights, place = _of_kind(config, weights, place)
  if not config.reuses or "k" not in weights:
    return x_BTD
  k_v = keys_and_values(config, weights, place, inputs, x_BTD, masks)
  if k_v[0].shape[2] != config.reused_groups[place.kind]:
    return x_BTD  # pruned: it is none that others use
  new = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in k_v], axis=-1)
  here = room(config, place.kind)
  new = jnp.where(place.reuses == 1, x_BTD[..., here], new)
  return x_BTD.at[..., here].set(new.astype(x_BTD.dtype))


def write(
  unit: str,
  config: ModelConfig,
  weights: Params,
  x_BTD: jax.Array,
  fed: jax.Array | experts.Routed | experts.Shared | None,
) -> jax.Array:
  """Writes what units have made to the residual stream.

  Args:
    unit: "K" or "F".
    config, weights: as `run_layer`'s.
    x_BTD: the residual stream in front of the half.
    fed: as `read` gives it, masked or not; None = no units.

  Returns:
    The residual stream behind the half.
  """
  half, bias = NAMES[unit], f"{WRITERS[unit]}_bias"
  writer = writer_of(unit, weights)
  front_BTD, x_BTD = x_BTD, stream(config, x_BTD)
  y_BTD = None
  if isinstance(fed, experts.Routed):
    biases_XE = weights.get("moe_down_bias")
    y_TE = experts.write(fed, weights["moe_down"], biases_XE)
    y_TE = norm(config, weights, "moe_post_norm", y_TE)
    if fed.beside_TE is not None:
      y_TE = y_TE + fed.beside_TE
    y_BTD = y_TE.reshape(*x_BTD.shape[:2], -1)
  elif isinstance(fed, experts.Shared):
    y_BTD = fed.said_TE.reshape(*x_BTD.shape[:2], -1)
  elif fed is not None:
    equation = {"K": "btkgh,kghd->btd", "F": "btf,fd->btd"}[unit]
    y_BTD = project(equation, fed, weights[writer])
  if config.residual:
    x_BTD = x_BTD @ weights[f"{half}_shortcut"]
  if bias in weights:
    y_BTD = weights[bias] if y_BTD is None else y_BTD + weights[bias]
  if y_BTD is not None:
    y_BTD = norm(config, weights, f"{half}_post_norm", y_BTD)
    if config.residual_scale != 1:
      y_BTD *= jnp.asarray(config.residual_scale, y_BTD.dtype)
    x_BTD = x_BTD + y_BTD
  if unit == "F" and "told_out" in weights:
    told_BTI = front_BTD[..., : config.told]
    x_BTD = x_BTD + _hear(config, weights, x_BTD, told_BTI)
  if unit == "F" and "out_scale" in weights:
    x_BTD *= jax.lax.stop_gradient(weights["out_scale"])  # is not trained
  if config.parallel and unit == "K":
    return jnp.concatenate([front_BTD, x_BTD], axis=-1)
  if carried := sum(config.carried()):
    front_BTC = front_BTD[..., :carried].astype(x_BTD.dtype)
    if unit == "F" and config.told:
      front_BTC = _next_told(config, front_BTC)
    return jnp.concatenate([front_BTC, x_BTD], axis=-1)
  return x_BTD


def _hear(config, weights, x_BTE, told_BTI):
  """What a layer makes of what it is told of each token."""
  h_BTI = project("bte,ei->bti", x_BTE, weights["told_gate"])
  h_BTI = ACTIVATIONS[config.activation](h_BTI) * told_BTI
  y_BTE = project("bti,ie->bte", h_BTI, weights["told_out"])
  return norm(config, weights, "told_post_norm", y_BTE)


def _next_told(config, front_BTC):
  """What is carried, with what the next layer is told at its front."""
  here, ends = config.told, config.told * config.told_layers
  parts = front_BTC[..., here:ends], front_BTC[..., :here]
  return jnp.concatenate([*parts, front_BTC[..., ends:]], axis=-1)


def count(unit: str, weights: Params) -> int:
  """Units of a half of a layer; 0 = it is absent."""
  if unit == "F" and "moe_down" in weights:
    return weights["moe_down"].shape[1]
  writer = writer_of(unit, weights)
  return weights[writer].shape[0] if writer in weights else 0


def writer_of(unit: str, weights: Params) -> str:
  """The matrix that a half of this layer writes with."""
  others = (name for name in OTHERS[unit] if name in weights)
  return next(others, WRITERS[unit])


# ---- MLP ---------------------------------------------------------------------


def _channels(config, weights, x_BTD, mesh):
  """The MLP's activations, [B, T, F], or what its experts make of them."""
  w, c = weights, config
  if c.experts:
    return experts.read(c, w, experts.normed(c, w, x_BTD), mesh)
  h_BTD = norm(c, w, "mlp_norm", x_BTD)
  up_BTF = read_by("btd,df->btf", h_BTD, w["up"])
  if c.gate_up_bias:
    up_BTF = up_BTF + w["up_bias"]
  if c.activation == "xielu":
    return xielu(up_BTF, *(w[name] for name in axes.XIELU))
  if not c.gated:
    return ACTIVATIONS[c.activation](up_BTF)
  gate_BTF = read_by("btd,df->btf", h_BTD, w["gate"])
  if c.gate_up_bias:
    gate_BTF = gate_BTF + w["gate_bias"]
  return ACTIVATIONS[c.activation](gate_BTF) * up_BTF
