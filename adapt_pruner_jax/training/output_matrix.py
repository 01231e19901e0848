"""The output matrix: cut along V over all devices, and multiplied.

Losses over a large vocabulary (`output_loss`) move tokens, not the matrix. A
vocabulary that does not divide is padded with tokens that nobody says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes, decoder
from adapt_pruner_jax.models.model_config import ModelConfig

# Mesh axes that cut V, the first the coarsest.
CUT = ("tensor", "fsdp", "data", "expert")
NOBODY = -1e30  # the logit of padding; -inf would make nan of 0 * inf


class Placed(NamedTuple):
  """An output matrix, padded and cut along V."""

  matrix: jax.Array


def place(
  config: ModelConfig, matrix: jax.Array | Placed, mesh: Mesh | None
) -> Placed:
  """The output matrix as losses take it.

  They do it themselves; done in front of a loop it is done once.

  Args:
    config: of the model.
    matrix: [V, D] tied, else [D, V], cut as `sharding.param_sharding` says; or
      one that has been placed.
    mesh: the devices; None = wherever the matrix is.
  """
  if isinstance(matrix, Placed) or mesh is None or mesh.size == 1:
    return matrix if isinstance(matrix, Placed) else Placed(matrix)
  axis = _axis(config)
  pad = [(0, 0), (0, 0)]
  pad[axis] = 0, _padding(config, mesh)
  matrix = jnp.pad(matrix, pad)
  for spec in _way(config, mesh):
    matrix = constrain(matrix, spec, mesh)
  return Placed(matrix)


def logits(
  config: ModelConfig, mesh: Mesh | None, matrix: Placed, x_BTD: jax.Array
) -> jax.Array:
  """Logits float32 [B, T, V] of tokens few enough for that.

  Args:
    config, mesh: as of `loss`.
    matrix: in the dtype of `x_BTD`; V has its padding.
    x_BTD: the stream behind the final norm.
  """
  return finish(config, product(config, mesh, matrix, x_BTD))


def cut(config: ModelConfig, gradient: jax.Array, mesh: Mesh | None):
  """The gradient of a placed matrix, cut like it."""
  return constrain(gradient, _along(_axis(config), CUT), mesh)


def taken_back(
  config: ModelConfig, gradient: jax.Array, mesh: Mesh | None
) -> jax.Array:
  """The gradient of a placed matrix, cut as the matrix was before."""
  if mesh is None or mesh.size == 1:
    return gradient
  for spec in reversed(_way(config, mesh)):
    gradient = constrain(gradient, spec, mesh)
  axis = _axis(config)
  return jax.lax.slice_in_dim(gradient, 0, config.vocab_size, axis=axis)


def _axis(config: ModelConfig) -> int:
  return 0 if config.tied else 1


def _along(axis: int, names: tuple[str, ...]) -> PartitionSpec:
  return PartitionSpec(*(names if i == axis else None for i in range(2)))


def _padding(config: ModelConfig, mesh: Mesh) -> int:
  return -config.vocab_size % mesh.size


def _way(config: ModelConfig, mesh: Mesh) -> list[PartitionSpec]:
  """How the padded matrix is cut, from how it is stored to all along V.

  In steps of one kind each, as XLA makes the matrix whole in between
  otherwise: each device drops some of its own, or parts change places.
  """
  name, axis = decoder.output_name(config), _axis(config)
  sizes = config.sizes()
  inputs = "D" if config.tied else "E"
  sizes[inputs] += config.head_bias
  padded = sizes | {"V": sizes["V"] + _padding(config, mesh)}
  stored, wanted = (
    sharding.param_sharding(name, axes.shape(name, s), mesh).spec
    for s in (sizes, padded)
  )
  return [stored, wanted, _along(axis, CUT[:2]), _along(axis, CUT)]


def constrain(x: jax.Array, spec: PartitionSpec, mesh: Mesh | None):
  """Within `jit`: an array where it belongs; as it is on one device."""
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def product(
  config: ModelConfig, mesh: Mesh | None, matrix: Placed, x_BTD: jax.Array
) -> jax.Array:
  """Products with a placed matrix; arguments as of `logits`."""
  x_BTD = constrain(x_BTD, PartitionSpec(), mesh)
  raw_BTV = decoder.product(config, matrix.matrix, x_BTD)
  return constrain(raw_BTV, PartitionSpec(None, None, CUT), mesh)


def finish(config: ModelConfig, raw_BTV: jax.Array) -> jax.Array:
  """Logits of products with a placed matrix."""
  logits_BTV = decoder.finish(config, raw_BTV)
  if raw_BTV.shape[-1] == config.vocab_size:
    return logits_BTV
  real_V = jnp.arange(raw_BTV.shape[-1]) < config.vocab_size
  return jnp.where(real_V, logits_BTV, NOBODY)


def used_with(
  config: ModelConfig,
  matrix: jax.Array | Placed,
  x_BTD: jax.Array,
  mesh: Mesh | None,
) -> Placed:
  """The matrix placed, in the dtype of what it is multiplied by."""
  cast = jax.tree.map(lambda m: m.astype(x_BTD.dtype), matrix)
  return place(config, cast, mesh)
