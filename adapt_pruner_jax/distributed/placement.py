"""Arrays of the host on the devices: rows cut over them, the rest on all."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed.sharding import BATCH, replicated

HOST = "pinned_host"  # the kind of memory that a device reads by itself


def fetched(tree: Any) -> Any:
  """Within `jit`: what lies in the host's memory, on the device."""

  def one(x: jax.Array) -> jax.Array:
    if jax.typeof(x).memory_space != jax.memory.Space.Host:
      return x
    return jax.device_put(x, jax.memory.Space.Device)

  return jax.tree.map(one, tree)


def has_host_memory(mesh: Mesh) -> bool:
  """Whether programs may keep arrays there: those of TPUs."""
  return mesh.devices.flat[0].platform == "tpu"


def hosted_options(mesh: Mesh) -> dict[str, str] | None:
  """What XLA is told of programs that put arrays away: not to write loops down
  twice, which it does to move the arrays of the next turn meanwhile."""
  if not has_host_memory(mesh):
    return None
  return {"xla_tpu_pipeline_memory_host_transfers": "false"}


def put_away(x: jax.Array) -> jax.Array:
  """Within `jit`: in the host's memory, from which `taken_out` brings it."""
  return jax.device_put(_plain(x), jax.memory.Space.Host)


def put_at(i: jax.Array, all_: jax.Array, one: jax.Array) -> jax.Array:
  """Within `jit`: `all_` with `one` at its i-th place, wherever it lies."""
  if jax.typeof(all_).memory_space == jax.memory.Space.Host:
    one = put_away(one)
  return jax.lax.dynamic_update_index_in_dim(all_, one, i, 0)


def taken_out(x: jax.Array, now: Any) -> tuple[jax.Array, Any]:
  """Within `jit`: what was put away, on the device, and `now`; it does not take
  the device's memory before `now` is there."""
  x, now = jax.lax.optimization_barrier((x, now))
  return _plain(fetched(x)), now


def _plain(x: jax.Array) -> jax.Array:
  """In the order of its dims: of two orders, XLA would make a copy of all that
  was put away."""
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def streamed(where: NamedSharding, rank: int) -> NamedSharding:
  """Where stacked layers' parameter lies to be fetched: matrices in the host's
  memory, from which a TPU cannot slice vectors."""
  return where.with_memory_kind(HOST) if rank > 2 else where


def batch_shards(mesh: Mesh) -> int:
  """How many parts a batch is cut into."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """First dim (rows) over all devices but those of `tensor`."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def rows_here(batch: int, mesh: Mesh) -> tuple[int, ...]:
  """Which of so many rows the devices of this process have."""
  cut = batch_sharding(mesh).addressable_devices_indices_map((batch,))
  mine = {row for (at,) in cut.values() for row in range(batch)[at]}
  return tuple(sorted(mine))


def place_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """A host array cut by rows; each process needs to have its own."""
  cut = batch_sharding(mesh)
  return jax.make_array_from_callback(rows.shape, cut, lambda at: rows[at])


def cut_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Within `jit`: rows over the devices, as `batch_sharding` says."""
  return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Host arrays, the same in every process, on all devices."""
  where = replicated(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, where, lambda at: x[at]),
    tree,
  )


def minibatches(
  tokens_NT: np.ndarray, batch: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Samples in order as [M, B, T] and which rows are real, bool [M, B].

  The last minibatch may be short, as the authors' is. Rows that only fill a
  minibatch, or the devices, are repeated samples marked False.
  """
  return replicate(_filled(tokens_NT, batch, mesh), mesh)


def passes(
  tokens_NT: np.ndarray, batch: int, mesh: Mesh, most: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  """`minibatches` on the host, in equal parts of so many of them at most.

  Those that only fill the last part have no real row.
  """
  tokens_MBT, valid_MB = _filled(tokens_NT, batch, mesh)
  number = -(-len(tokens_MBT) // most)
  M = -(-len(tokens_MBT) // number)
  more = number * M - len(tokens_MBT)
  last_MBT = np.repeat(tokens_MBT[-1:], more, axis=0)
  tokens_MBT = np.concatenate([tokens_MBT, last_MBT])
  valid_MB = np.pad(valid_MB, ((0, more), (0, 0)))
  return [
    (tokens_MBT[i : i + M], valid_MB[i : i + M])
    for i in range(0, number * M, M)
  ]


def together(batch: int, samples: int, mesh: Mesh) -> int:
  """How many samples go through the devices at once: `batch`, or the least
  multiple of it that gives each device as many rows.

  Never so many that the last of all samples would be fewer.
  """
  more = math.lcm(batch, mesh.size)
  return batch if samples % more else more


def padded_rows(batch: int, mesh: Mesh) -> int:
  """Rows of a minibatch, a multiple of what the mesh cuts it into."""
  shards = batch_shards(mesh)
  return -(-batch // shards) * shards


def _filled(
  tokens_NT: np.ndarray, batch: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
  N, T = tokens_NT.shape
  batch = min(batch, N)
  M = -(-N // batch)
  index = np.full((M, padded_rows(batch, mesh)), -1)
  index[:, :batch] = np.arange(M * batch).reshape(M, batch)
  index[index >= N] = -1
  valid_MB = index >= 0
  tokens_MBT = np.asarray(tokens_NT, np.int32)[np.where(valid_MB, index, 0)]
  return tokens_MBT, valid_MB
