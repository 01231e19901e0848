"""The attention of a layer, from the residual stream to the input of `o`."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.arithmetic import layer_norm, rms_norm
from adapt_pruner_jax.models.attention import AttentionInputs, attend, chosen
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.kernels import KERNELS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.remat import read_by
from adapt_pruner_jax.models.rope import RopeTables, query_scale, rotate


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
    name = "attn_norm" if config.shared_norm else name
  elif name in ("attn_norm", "mlp_norm"):
    x = stream(config, x)
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


def stream(config: ModelConfig, x: jax.Array) -> jax.Array:
  """The residual stream itself, at any place.

  Between the halves of a layer whose MLP reads what is in front of the
  attention, both are handed on, side by side: what is in front, and the stream.
  Other models carry more in front of it (`ModelConfig.carried`).

  Args:
    config: as `run_layer`'s.
    x: in front of a half or behind it, [B, T, D] or [B, T, 2 D].
  """
  beside = config.parallel or any(config.carried())
  return x[..., -config.hidden_size :] if beside else x


def heads(
  config: ModelConfig,
  weights: Params,
  place: Any,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None,
  cache: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """What the heads say, [B, T, K, G, H], and the keys and values.

  Args:
    config, weights, place, inputs, x_BTD, masks, cache: as `layer.run_half`'s.
  """
  rope = _rope(inputs.ropes, place.rope)
  h_BTD = norm(config, weights, "attn_norm", x_BTD)
  q_BTKGH = _queries(config, weights, rope, h_BTD, masks)
  kv = _seen(config, weights, place, rope, x_BTD, h_BTD, masks)
  if config.rope.query_growth:
    scale_BT = query_scale(config.rope, inputs.positions)
    q_BTKGH *= scale_BT[..., None, None, None].astype(q_BTKGH.dtype)
  if cache is not None:
    update = jax.lax.dynamic_update_slice_in_dim
    pairs = zip(cache, kv, strict=True)
    kv = [update(old, new, inputs.column, axis=1) for old, new in pairs]
  sinks_KG = weights.get("sinks")
  said_BTKGH = _attend(config, place, inputs, sinks_KG, q_BTKGH, *kv)
  if config.attn_gate:
    gate_BTKGH = read_by("btd,dkgh->btkgh", h_BTD, weights["q_gate"])
    if config.qkv_bias:
      gate_BTKGH += weights["q_gate_bias"]
    said_BTKGH *= jax.nn.sigmoid(gate_BTKGH)
  return said_BTKGH, tuple(kv)


def _attend(config, place, inputs, sinks_KG, q_BTKGH, k_BSKH, v_BSKH):
  """`attend` with the window of a place.

  A kernel must know its window when it is compiled: in a scan over layers that
  differ in it there is one kernel for each, and the place chooses.
  """
  softcap = config.attn_softcap
  how = {"scale": config.attn_scale or config.head_dim**-0.5}
  how |= {"softcap": softcap, "sinks_KG": sinks_KG}

  def seeing(window):
    return lambda *heads: attend(*heads, inputs, window, **how)

  heads, windows = (q_BTKGH, k_BSKH, v_BSKH), sorted(set(config.window))
  if not any(windows):
    return seeing(0)(*heads)
  kernel, _ = chosen(
    q_BTKGH, inputs, windows[-1], softcap, sinks_KG is not None
  )
  if isinstance(place.window, int) or kernel not in KERNELS:
    return seeing(place.window)(*heads)
  which = jnp.searchsorted(np.array(windows), place.window)
  return jax.lax.switch(which, [seeing(w) for w in windows], *heads)


def _rope(ropes: tuple[RopeTables, ...], which: jax.Array | int) -> RopeTables:
  if len(ropes) == 1 or isinstance(which, int):
    return ropes[which if isinstance(which, int) else 0]
  return jax.tree.map(lambda *tables: jnp.stack(tables)[which], *ropes)


def keys_and_values(
  config: ModelConfig,
  weights: Params,
  place: Any,
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  masks: Mapping[str, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of the tokens, [B, T, K, H] each.

  Args:
    config, weights, place, inputs, x_BTD, masks: as of `heads`.
  """
  h_BTD = norm(config, weights, "attn_norm", x_BTD)
  rope = _rope(inputs.ropes, place.rope)
  return _keys_values(config, weights, rope, h_BTD, masks)


def _seen(config, weights, place, rope, x_BTD, h_BTD, masks):
  """The layer's own keys and values, or those of one before it."""
  if "k" not in weights:
    return _given(config, weights, place, x_BTD)
  own = _keys_values(config, weights, rope, h_BTD, masks)
  if not config.reuses:
    return own
  given = _given(config, weights, place, x_BTD)
  if given[0].shape != own[0].shape:  # no layer here uses those of another
    return own
  again = place.reuses == 1
  return [jnp.where(again, *pair) for pair in zip(given, own, strict=True)]


def _given(config, weights, place, x_BTD):
  """Keys and values that another layer has handed on."""
  shape = *x_BTD.shape[:2], -1, weights["o"].shape[2]
  parts = jnp.split(x_BTD[..., room(config, place.kind)], 2, axis=-1)
  return tuple(part.reshape(shape) for part in parts)


def room(config: ModelConfig, kind: int) -> slice:
  """Where a stream carries the keys, then values, of layers of a kind."""
  begin, size = sum(config.carried()[: 1 + kind]), config.carried()[1 + kind]
  return slice(begin, begin + size)


def _queries(config, weights, rope, h_BTD, masks):
  """Rotated queries, [B, T, K, G, H]."""
  w, c = weights, config
  q_BTKGH = read_by("btd,dkgh->btkgh", h_BTD, w["q"])
  if c.qkv_bias:
    q_BTKGH = q_BTKGH + w["q_bias"]
  if c.qk_norm == "head" and not c.qk_norm_late:
    q_BTKGH = norm(c, w, "q_norm", q_BTKGH)
  elif c.qk_norm == "all":
    q_BTKGH = _norm_all(c, w["q_norm_all"], q_BTKGH, masks)
  B, T, K, G, H = q_BTKGH.shape
  q_BTNH = rotate(q_BTKGH.reshape(B, T, K * G, H), rope)
  q_BTKGH = q_BTNH.reshape(q_BTKGH.shape)
  return norm(c, w, "q_norm", q_BTKGH) if c.qk_norm_late else q_BTKGH


def _keys_values(config, weights, rope, h_BTD, masks):
  """Rotated keys, and values, [B, T, K, H] each."""
  w, c = weights, config
  k_BTKH = read_by("btd,dkh->btkh", h_BTD, w["k"])
  # Without a matrix of their own, values are made as keys are.
  v_BTKH = read_by("btd,dkh->btkh", h_BTD, w["v"]) if "v" in w else k_BTKH
  if c.qkv_bias:
    k_BTKH, v_BTKH = k_BTKH + w["k_bias"], v_BTKH + w["v_bias"]
  if c.v_norm:
    v_BTKH = rms_norm(v_BTKH, jnp.ones((), v_BTKH.dtype), c.norm_eps)
  if c.qk_norm == "head" and not c.qk_norm_late:
    k_BTKH = norm(c, w, "k_norm", k_BTKH)
  elif c.qk_norm == "all":
    k_BTKH = _norm_all(c, w["k_norm_all"], k_BTKH, masks)
  k_BTKH = rotate(k_BTKH, rope)
  return norm(c, w, "k_norm", k_BTKH) if c.qk_norm_late else k_BTKH, v_BTKH


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
