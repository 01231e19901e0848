"""What is before and behind the layers, of minibatches and stacked params."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import each_device, embedding
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import output_matrix


def embed(
  config: ModelConfig,
  stacked: Params,
  tokens_MBT: jax.Array,
  mesh: Mesh | None,
) -> jax.Array:
  """The stream in front of the first layer, [M, B, T, D]."""
  # Rows are cut in each minibatch, and so must lead.
  tokens_BMT = jnp.moveaxis(tokens_MBT, 1, 0)
  B, M, T = tokens_BMT.shape
  x_BXD = embedding.embed(config, stacked, tokens_BMT.reshape(B, M * T), mesh)
  return cut(jnp.moveaxis(x_BXD.reshape(B, M, T, -1), 0, 1), mesh)


def normed(config: ModelConfig, stacked: Params, x_BTD: jax.Array) -> jax.Array:
  """The stream behind the final norm."""
  own = {n: stacked[n] for n in model_config.outer_names(config)}
  return Decoder(config).apply({"params": own}, x_BTD, method=Decoder.normed)


def output(
  config: ModelConfig, stacked: Params, mesh: Mesh | None
) -> output_matrix.Placed:
  """The output matrix as `output_loss` takes it, for all minibatches."""
  return output_matrix.place(config, head_matrix(config, stacked), mesh)


def cut(
  x_MBTD: jax.Array, mesh: Mesh | None, axes: each_device.Axes | None = None
) -> jax.Array:
  """Rows of each minibatch over the devices.

  Args:
    x_MBTD: the minibatches.
    mesh: the devices.
    axes: of it; None = `each_device.row_axes`.
  """
  if mesh is None:
    return x_MBTD
  if axes is None:
    axes = each_device.row_axes(mesh, x_MBTD.shape[1])
  where = NamedSharding(mesh, PartitionSpec(None, axes))
  return jax.lax.with_sharding_constraint(x_MBTD, where)
