"""The embedding, looked up where it lies."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes, told
from adapt_pruner_jax.models.axes import BATCH, Params
from adapt_pruner_jax.models.model_config import ModelConfig


def embed(
  config: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  mesh: Mesh | None,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """The residual stream in front of the first layer, [B, T, D].

  Each device looks up the part of the table that it has, for all rows that the
  others of its group have; then parts are exchanged for rows. What moves is
  tokens: a table is never whole on a device, nor is its gradient.

  Args:
    config: of the model.
    params: those outside the layers, or more, cut as
      `sharding.param_sharding` says.
    tokens_BT: token ids, rows cut over `BATCH`.
    mesh: the devices; None = wherever the tables are.
    dtype: of the stream; default the embedding's.
  """
  dtype = dtype or params["embedding"].dtype

  def looked_up(name: str) -> jax.Array:
    table = params[name]
    if mesh is None or mesh.size == 1:
      return table[tokens_BT].astype(dtype)
    return _exchanged(name, table, tokens_BT, mesh, dtype)

  x_BTD, scale = looked_up("embedding"), config.embed_scale
  if scale != 1:
    x_BTD *= jnp.asarray(scale, dtype)
  rows_BTR = looked_up("told") if config.told else None
  around = axes.TOLD_OUTER[1:] if config.told else ()
  outer = {name: params[name].astype(dtype) for name in around}
  return told.in_front(config, outer, rows_BTR, x_BTD)


def _exchanged(name, table, tokens_BT, mesh, dtype) -> jax.Array:
  spec = sharding.param_sharding(name, table.shape, mesh).spec
  of_V, of_D = (*spec, None, None)[:2]
  rows = tokens_BT.shape[0]
  shards = placement.batch_shards(mesh)
  tokens_BT = jnp.pad(tokens_BT, ((0, -rows % shards), (0, 0)))

  def local(table, tokens_BT):
    if "fsdp" in (of_V, of_D):
      tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", tiled=True)
    x_BTD = _own(table, tokens_BT, of_V).astype(dtype)
    if of_V == "tensor":
      x_BTD = jax.lax.psum(x_BTD, "tensor")
    if of_V == "fsdp":
      x_BTD = jax.lax.psum_scatter(x_BTD, "fsdp", tiled=True)
    if of_D == "fsdp":
      x_BTD = jax.lax.all_to_all(x_BTD, "fsdp", 0, 2, tiled=True)
    if of_D == "tensor":
      x_BTD = jax.lax.all_gather(x_BTD, "tensor", axis=2, tiled=True)
    return x_BTD

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(spec, PartitionSpec(BATCH)),
    out_specs=PartitionSpec(BATCH),
    check_vma=False,
  )
  return run(table, tokens_BT)[:rows]


def _own(table, tokens_BT, of_V) -> jax.Array:
  """Rows of this device's part of the table; 0 where another has the token."""
  if of_V is None:
    return table[tokens_BT]
  number = table.shape[0]
  own_BT = tokens_BT - number * jax.lax.axis_index(of_V)
  mine_BT = (own_BT >= 0) & (own_BT < number)
  x_BTD = table[jnp.where(mine_BT, own_BT, 0)]
  return jnp.where(mine_BT[..., None], x_BTD, 0)
