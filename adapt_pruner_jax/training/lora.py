"""LoRA: low-rank adapters beside frozen params, and merging them into these.

While they are trained, the product of both factors is never made: x goes
through the frozen matrix, and through one factor and then the other.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.arithmetic import Int8, LowRank
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig

LORA_NAMES = (
  *("q", "q_gate", "k", "v", "o", "gate", "up", "down"),
  *("wide_q", "wide_k", "wide_v", "wide_o"),
  *("delta_q", "delta_k", "delta_v", "delta_gate", "delta_o"),
)


def init_lora(
  config: ModelConfig, rank: int, key: jax.Array, mesh: Mesh
) -> dict[str, Any]:
  """Adapters that change nothing yet (arXiv 2106.09685), float32.

  One {"a": [in..., rank], "b": [rank, out...]} for each matrix of each layer;
  `a` is random, `b` zero.

  Args:
    config: of the model.
    rank: of the adapters.
    key: of the random numbers.
    mesh: where the adapters lie, cut as their matrices are.
  """
  abstract, placed = abstract_adapters(config, rank, mesh)

  def build(key):
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(key, len(leaves))
    drawn = [
      jax.random.normal(k, x.shape) / math.sqrt(math.prod(x.shape[:-1]))
      for k, x in zip(keys, leaves, strict=True)
    ]
    return {
      layer: {
        name: {"a": f["a"], "b": jnp.zeros_like(f["b"])}
        for name, f in factors.items()
      }
      for layer, factors in tree.unflatten(drawn).items()
    }

  return jax.jit(build, out_shardings=placed)(key)


def beside(
  weights: Params, factors: dict[str, Any], lora_alpha: float
) -> Params:
  """A layer's weights with its adapters beside them, to be computed with.

  Args:
    weights: of the layer, frozen; maybe from `in_int8`.
    factors: its adapters, {"q": {"a": ..., "b": ...}, ...}.
    lora_alpha: what is added is a b times lora_alpha / rank.
  """

  def pair(name: str, factor: dict) -> LowRank:
    scale, matrix = lora_alpha / factor["b"].shape[0], weights[name]
    if isinstance(matrix, dict):
      matrix = Int8(**matrix)
    return LowRank(matrix, factor["a"], factor["b"] * scale)

  return weights | {name: pair(name, f) for name, f in factors.items()}


def merge_lora(
  params: Params, adapters: dict[str, Any], lora_alpha: float
) -> Params:
  """Params with a @ b * (lora_alpha / rank) added, in the params' dtype."""

  def merged(weight, factor):
    scale = lora_alpha / factor["b"].shape[0]
    delta = jnp.tensordot(factor["a"], factor["b"], axes=1) * scale
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

  new = dict(params)
  for layer, factors in adapters.items():
    changed = {n: merged(params[layer][n], f) for n, f in factors.items()}
    new[layer] = params[layer] | changed
  return new


# ---- A frozen base in eight bits ---------------------------------------------


def in_int8(params: Params, mesh: Mesh) -> Params:
  """Params whose adapted matrices are {"int8": ..., "scale": ...} each.

  Of each output the largest weight is 127 (as the frozen base of arXiv
  2305.14314 has blocks). Merging is into the params that this was made of.

  Args:
    params: of a model; arrays, or shapes, which give shapes with shardings.
    mesh: where they lie.
  """

  def one(name: str, w: Any) -> dict[str, Any]:
    make = partial(_quantised, name)
    letters, made = part_letters(name), jax.eval_shape(make, w)
    where = {
      part: NamedSharding(mesh, sharding.spec(letters[part], x.shape, mesh))
      for part, x in made.items()
    }
    if isinstance(w, jax.ShapeDtypeStruct):
      return {
        part: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[part])
        for part, x in made.items()
      }
    return jax.jit(make, out_shardings=where)(w)

  new = dict(params)
  for layer, weights in params.items():
    if layer.startswith("layer_"):
      frozen = {n: one(n, weights[n]) for n in LORA_NAMES if n in weights}
      new[layer] = weights | frozen
  return new


def _quantised(name: str, w: jax.Array) -> dict[str, jax.Array]:
  inputs = tuple(range(len(factor_letters(name)["a"]) - 1))
  w = w.astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), axis=inputs) / 127
  parts = jnp.round(w / jnp.where(scale > 0, scale, 1))
  return {"int8": parts.astype(jnp.int8), "scale": scale}


def part_letters(name: str) -> dict[str, str]:
  """The dims of all that a matrix may be stored as: factors, eight bits."""
  factors = factor_letters(name)
  return factors | {"int8": axes.AXES[name], "scale": factors["b"][1:]}


# ---- Shapes ------------------------------------------------------------------


def factor_letters(name: str) -> dict[str, str]:
  """The dims of both factors of a matrix, R the rank: {"a": "DR", ...}."""
  letters = axes.AXES[name]
  # The residual width D is the side where a matrix reads, or writes.
  cut = 1 if letters[0] in axes.RESIDUAL else len(letters) - 1
  return {"a": letters[:cut] + "R", "b": "R" + letters[cut:]}


def abstract_adapters(
  config: ModelConfig, rank: int, mesh: Mesh
) -> tuple[Any, Any]:
  """The adapter tree as shapes, and as shardings."""
  shapes, placed = {}, {}
  for i in range(config.num_layers):
    layer = axes.layer_name(i)
    sizes = config.sizes(i) | {"R": rank}
    shapes[layer], placed[layer] = {}, {}
    for name in LORA_NAMES:
      if name not in model_config.layer_names(config, i):
        continue  # this half of the layer is gone
      pair = factor_letters(name)
      shape = {f: tuple(sizes[x] for x in pair[f]) for f in pair}
      shapes[layer][name] = {
        f: jax.ShapeDtypeStruct(shape[f], jnp.float32) for f in pair
      }
      placed[layer][name] = {
        f: NamedSharding(mesh, sharding.spec(pair[f], shape[f], mesh))
        for f in pair
      }
  return shapes, placed
