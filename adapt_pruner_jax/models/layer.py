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

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.models import axes, experts
from adapt_pruner_jax.models.arithmetic import (
  ACTIVATIONS,
  layer_norm,
  project,
  rms_norm,
)
from adapt_pruner_jax.models.attention import (
  AttentionInputs,
  attend,
  chosen,
)
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.kernels import AUTO, KERNELS, Kernel
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import RopeTables, query_scale, rotate

# The matrix that each half writes with, and those that it reads with.
HALVES = {"o": ("q", "k", "v"), "down": ("gate", "up")}
WRITERS = {"K": "o", "F": "down"}  # by unit
NAMES = {"K": "attn", "F": "mlp"}  # how parameters of a half begin

Cache = tuple[jax.Array, jax.Array]  # keys and values, [B, S, K, H] each


class Place(NamedTuple):
  """Where a layer stands, as far as its function depends on it."""

  window: jax.Array | int  # positions that its queries see; 0 = all
  rope: jax.Array | int  # which of `AttentionInputs.ropes`


class Tap(NamedTuple):
  """What running a layer, or a half of it, lets a caller see.

  Attributes:
    fed: {"K": [B, T, K, G, H], "F": [B, T, F]}: the inputs of `o` and `down`
      before masks, of experts as `experts.Routed`; None where a half is absent,
      no entry where it was not run.
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
  return Place(window, config.rope_ids()[index])


def places(config: ModelConfig) -> Place:
  """The places of all layers to scan over, int32 [L] each."""
  window_L = np.array(config.window or (0,) * config.num_layers, np.int32)
  return Place(window_L, np.array(config.rope_ids(), np.int32))


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
  mid_BTM, heads = run_half("K", *args, x_BTD, masks, cache)
  out_BTE, channels = run_half("F", *args, mid_BTM, masks)
  return out_BTE, Tap(heads.fed | channels.fed, mid_BTM, heads.cache)


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
  fed, cache = read(unit, config, weights, place, inputs, x_BTD, masks, cache)
  counted = fed
  if fed is not None and masks is not None and unit in masks:
    if isinstance(fed, experts.Routed):
      counted = experts.masked(fed, masks[unit])
    else:
      counted = fed * spread_mask(masks[unit], fed)
  y_BTD = write(unit, config, weights, x_BTD, counted)
  return y_BTD, Tap({unit: fed}, cache=cache)


def spread_mask(mask_U: jax.Array, fed: jax.Array) -> jax.Array:
  """A mask of units, to multiply what `read` gives with."""
  return mask_U.reshape(-1, *(1,) * (fed.ndim - 3)).astype(fed.dtype)


def read(
  unit: str,
  config: ModelConfig,
  weights: Params,
  place: Place,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array | experts.Routed | None, Cache | None]:
  """What the units of a half make of the stream: the input of `o` or `down`.

  Args:
    unit, config, weights, place, inputs, x_BTD, cache: as `run_half`'s.
    masks: units that count, for a norm over all heads together; what the
      masked ones say is not zeroed here.

  Returns:
    [B, T, K, G, H] or [B, T, F] or what experts made, None if the half is
    absent; and the layer's keys and values, None of an MLP.
  """
  if not count(unit, weights):
    return None, None
  if unit == "F":
    return _channels(config, weights, x_BTD, inputs.kernel.cutting), None
  return _heads(config, weights, place, inputs, x_BTD, masks, cache)


def write(
  unit: str,
  config: ModelConfig,
  weights: Params,
  x_BTD: jax.Array,
  fed: jax.Array | experts.Routed | None,
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
  front_BTD, x_BTD = x_BTD, stream(config, x_BTD)
  y_BTD = None
  if isinstance(fed, experts.Routed):
    y_BTD = experts.write(fed, weights["moe_down"])
    y_BTD = y_BTD.reshape(*x_BTD.shape[:2], -1)
  elif fed is not None:
    equation = {"K": "btkgh,kghd->btd", "F": "btf,fd->btd"}[unit]
    y_BTD = project(equation, fed, weights[WRITERS[unit]])
  if config.residual:
    x_BTD = x_BTD @ weights[f"{half}_shortcut"]
  if bias in weights:
    y_BTD = weights[bias] if y_BTD is None else y_BTD + weights[bias]
  if y_BTD is not None:
    y_BTD = norm(config, weights, f"{half}_post_norm", y_BTD)
    if config.residual_scale != 1:
      y_BTD *= jnp.asarray(config.residual_scale, y_BTD.dtype)
    x_BTD = x_BTD + y_BTD
  if config.parallel and unit == "K":
    return jnp.concatenate([front_BTD, x_BTD], axis=-1)
  return x_BTD


def stream(config: ModelConfig, x: jax.Array) -> jax.Array:
  """The residual stream itself, at any place.

  Between the halves of a layer whose MLP reads what is in front of the
  attention, both are handed on, side by side: what is in front, and the stream.

  Args:
    config: as `run_layer`'s.
    x: in front of a half or behind it, [B, T, D] or [B, T, 2 D].
  """
  return x[..., -config.hidden_size :] if config.parallel else x


def count(unit: str, weights: Params) -> int:
  """Units of a half of a layer; 0 = it is absent."""
  if unit == "F" and "moe_down" in weights:
    return weights["moe_down"].shape[1]
  writer = WRITERS[unit]
  return weights[writer].shape[0] if writer in weights else 0


def norm(
  config: ModelConfig, weights: Params, name: str, x: jax.Array
) -> jax.Array:
  """Norms with a parameter of the model; without it nothing is done.

  Args:
    config: as `run_layer`'s.
    weights: of the layer, or those outside the layers.
    name: of the parameter.
    x: normed over its last axis; the residual stream in front of a half for the
      norm in front of it.
  """
  if config.parallel and name == "mlp_norm":
    x = x[..., : config.hidden_size]
  if name not in weights:
    return x
  if config.norm == "layer":
    bias = weights.get(f"{name}_bias")
    eps, offset = config.norm_eps, config.norm_offset
    return layer_norm(x, weights[name], bias, eps, offset)
  sliced = config.residual and axes.AXES[name] in axes.RESIDUAL
  width = config.hidden_size if sliced else None
  eps, offset = config.norm_eps, config.norm_offset
  return rms_norm(x, weights[name], eps, offset, width)


# ---- Attention ---------------------------------------------------------------


def _heads(config, weights, place, inputs, x_BTD, masks, cache):
  """What the heads say, [B, T, K, G, H], and the keys and values."""
  rope = _rope(inputs.ropes, place.rope)
  q_BTKGH, *kv = _qkv(config, weights, rope, x_BTD, masks)
  if config.rope.query_growth:
    scale_BT = query_scale(config.rope, inputs.positions)
    q_BTKGH *= scale_BT[..., None, None, None].astype(q_BTKGH.dtype)
  if cache is not None:
    update = jax.lax.dynamic_update_slice_in_dim
    pairs = zip(cache, kv, strict=True)
    kv = [update(old, new, inputs.column, axis=1) for old, new in pairs]
  return _attend(config, place, inputs, q_BTKGH, *kv), tuple(kv)


def _attend(config, place, inputs, q_BTKGH, k_BSKH, v_BSKH):
  """`attend` with the window of a place.

  A kernel must know its window when it is compiled: in a scan over layers that
  differ in it there is one kernel for each, and the place chooses.
  """
  scale, softcap = (
    config.attn_scale or config.head_dim**-0.5,
    config.attn_softcap,
  )

  def seeing(window):
    return lambda *heads: attend(
      *heads, inputs, window, scale=scale, softcap=softcap
    )

  heads, windows = (q_BTKGH, k_BSKH, v_BSKH), sorted(set(config.window))
  if not any(windows):
    return seeing(0)(*heads)
  kernel, _ = chosen(q_BTKGH, inputs, windows[-1], softcap)
  if isinstance(place.window, int) or kernel not in KERNELS:
    return seeing(place.window)(*heads)
  which = jnp.searchsorted(np.array(windows), place.window)
  return jax.lax.switch(which, [seeing(w) for w in windows], *heads)


def _rope(ropes: tuple[RopeTables, ...], which: jax.Array | int) -> RopeTables:
  if len(ropes) == 1 or isinstance(which, int):
    return ropes[which if isinstance(which, int) else 0]
  return jax.tree.map(lambda *tables: jnp.stack(tables)[which], *ropes)


def _qkv(config, weights, rope, x_BTD, masks):
  """Rotated queries [B, T, K, G, H] and keys, and values [B, T, K, H]."""
  w, c = weights, config
  h_BTD = norm(c, w, "attn_norm", x_BTD)
  q_BTKGH = project("btd,dkgh->btkgh", h_BTD, w["q"])
  k_BTKH = project("btd,dkh->btkh", h_BTD, w["k"])
  v_BTKH = project("btd,dkh->btkh", h_BTD, w["v"])
  if c.qkv_bias:
    q_BTKGH, k_BTKH = q_BTKGH + w["q_bias"], k_BTKH + w["k_bias"]
    v_BTKH = v_BTKH + w["v_bias"]
  if c.qk_norm == "head":
    q_BTKGH = norm(c, w, "q_norm", q_BTKGH)
    k_BTKH = norm(c, w, "k_norm", k_BTKH)
  elif c.qk_norm == "all":
    q_BTKGH = _norm_all(c, w["q_norm_all"], q_BTKGH, masks)
    k_BTKH = _norm_all(c, w["k_norm_all"], k_BTKH, masks)
  B, T, K, G, H = q_BTKGH.shape
  q_BTNH = rotate(q_BTKGH.reshape(B, T, K * G, H), rope)
  return q_BTNH.reshape(q_BTKGH.shape), rotate(k_BTKH, rope), v_BTKH


def _norm_all(config, scale, x_BTKH, masks):
  """Norm over all heads of a position together, those that `masks` leave."""
  width = None
  if masks is not None:
    mask_K = masks["K"].astype(x_BTKH.dtype)
    x_BTKH *= mask_K.reshape(-1, *(1,) * (x_BTKH.ndim - 3))
    heads = jnp.maximum(jnp.sum(masks["K"]), 1)
    width = heads * math.prod(x_BTKH.shape[3:])
  flat = x_BTKH.reshape(*x_BTKH.shape[:2], -1)
  normed = rms_norm(flat, scale.reshape(-1), config.norm_eps, width=width)
  return normed.reshape(x_BTKH.shape)


# ---- MLP ---------------------------------------------------------------------


def _channels(config, weights, x_BTD, mesh):
  """The MLP's activations, [B, T, F], or what its experts make of them."""
  w, c = weights, config
  h_BTD = norm(c, w, "mlp_norm", x_BTD)
  if c.experts:
    return experts.read(c, w, h_BTD, mesh)
  up_BTF = project("btd,df->btf", h_BTD, w["up"])
  if c.gate_up_bias:
    up_BTF = up_BTF + w["up_bias"]
  if not c.gated:
    return ACTIVATIONS[c.activation](up_BTF)
  gate_BTF = project("btd,df->btf", h_BTD, w["gate"])
  if c.gate_up_bias:
    gate_BTF = gate_BTF + w["gate_bias"]
  return ACTIVATIONS[c.activation](gate_BTF) * up_BTF
