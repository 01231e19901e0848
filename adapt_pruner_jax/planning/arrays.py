"""Abstract arrays: how large they are, and where they lie on a mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery

Bytes = dict[str, int]  # by what they hold, on the fullest device


def weight_dtype(config: Config) -> jnp.dtype:
  """`Config.weight_dtype`, as a dtype."""
  return jnp.dtype(config.weight_dtype())


def model_bytes(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> int:
  """Bytes on one device of a model's parameters."""
  return size(placed(model_config.abstract_params(config, dtype), mesh))


def size(tree: Any) -> int:
  """Bytes on one device of abstract arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding.memory_kind != placement.HOST
  )


def streamed(stacked: Any) -> Any:
  """`stacked_params` whose layers lie in the host's memory."""

  def moved(x):
    where = placement.streamed(x.sharding, x.ndim)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return stacked | {"layers": jax.tree.map(moved, stacked["layers"])}


def stacked_params(full: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> Any:
  """Makes what `surgery.expand` gives, as abstract arrays."""
  wide = surgery.dense(full)
  sizes = wide.sizes(0)
  layers = {}
  for name in model_config.layer_names(wide):
    shape = (full.num_layers, *axes.shape(name, sizes))
    where = sharding.param_sharding(name, shape, mesh, stacked=True)
    layers[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  params = model_config.abstract_params(wide, dtype)
  outer = {name: params[name] for name in model_config.outer_names(wide)}
  return placed(outer, mesh) | {"layers": layers}


def placed(tree: Any, mesh: Mesh) -> Any:
  """Gives parameters the shardings that they have on a mesh."""
  return with_shardings(tree, sharding.param_shardings(tree, mesh))


def with_shardings(tree: Any, shardings: Any) -> Any:
  """Gives abstract arrays these shardings."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def float32_params(config: ModelConfig) -> Any:
  """Makes a model's parameters as they are trained, as abstract arrays."""
  return model_config.abstract_params(config, jnp.float32)


def temporary(compiled: Any) -> int:
  """Bytes that a program needs beyond its arguments."""
  found = compiled.memory_analysis()
  made = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.temp_size_in_bytes + max(made, 0)
