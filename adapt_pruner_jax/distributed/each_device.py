"""What each device does alone with its rows, and how its sums are added up.

A walk over minibatches that runs in here needs no device but its own: weights
are gathered once, before it, and what it sums is reduced once, behind it, each
device then holding a part of the sum.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import sharding

PIECE = 1 << 27  # bytes that are added up at once
Axes = tuple[str, ...]  # of the mesh; () = there is one device


def row_axes(mesh: Mesh | None, rows: int) -> Axes:
  """The mesh axes that rows are cut over: all of them where that divides.

  Else those of a batch; devices along `tensor` then do the same work.
  """
  if mesh is None or mesh.size == 1:
    return ()
  whole = rows % mesh.size == 0
  return sharding.MESH_AXES if whole else sharding.BATCH


def run(
  fn: Callable,
  mesh: Mesh | None,
  axes: Axes,
  minibatches: Any,
  whole: Any,
  sums: Any,
) -> tuple[Any, Any]:
  """`fn(minibatches, whole)` on each device; within `jit`.

  Args:
    fn: gives arrays with its rows, and sums over its rows.
    mesh: the devices.
    axes: from `row_axes`.
    minibatches: arrays [M, B, ...], of which each device gets its rows.
    whole: arrays that each device gets all of, weights among them.
    sums: shapes of the sums.

  Returns:
    The arrays [M, B, ...], and the sums over all rows, cut by `cut_sum`.
  """
  if not axes:
    return fn(minibatches, whole)

  def alone(minibatches, whole):
    made, found = fn(minibatches, whole)
    return made, jax.tree.map(lambda x: add_up(x, mesh, axes), found)

  rows = PartitionSpec(None, axes)
  call = jax.shard_map(
    alone,
    mesh=mesh,
    in_specs=(rows, PartitionSpec()),
    out_specs=(rows, jax.tree.map(lambda x: _spec(x.shape, mesh, axes), sums)),
    check_vma=False,
  )
  return call(minibatches, whole)


def add_up(x: jax.Array, mesh: Mesh, axes: Axes) -> jax.Array:
  """The sum over devices of each one's `x`, of which it keeps its part.

  A large one is added up in pieces, since XLA may give each device all of a sum
  before it takes its part.
  """
  parts = parts_of(mesh, axes)
  dim = _cut_dim(x.shape, parts)
  if dim is None:
    return jax.lax.psum(x, axes)
  own = x.shape[dim] // parts
  pieces = min(-(-x.size * x.dtype.itemsize // PIECE), own)
  pieces = next(n for n in range(pieces, own + 1) if own % n == 0)
  before, behind = x.shape[:dim], x.shape[dim + 1 :]
  cut = x.reshape(*before, parts, pieces, own // pieces, *behind)

  def one(i):
    piece = jax.lax.dynamic_index_in_dim(cut, i, dim + 1, keepdims=False)
    piece = piece.reshape(*before, -1, *behind)
    where = {"scatter_dimension": dim, "tiled": True}
    return jax.lax.psum_scatter(piece, axes, **where)

  if pieces == 1:
    return one(0)
  found = jax.lax.map(one, jnp.arange(pieces))
  return jnp.moveaxis(found, 0, dim).reshape(*before, own, *behind)


def total(x: jax.Array, mesh: Mesh) -> jax.Array:
  """The sum over the first dim, one of each device; within `jit`.

  Args:
    x: [N, ...], cut over the devices that a batch is cut over.
    mesh: the devices.

  Returns:
    The sum, cut as those of `run` are.
  """
  if len(x) == 1:
    return x[0]
  axes = sharding.BATCH
  return jax.shard_map(
    lambda x: add_up(x[0], mesh, axes),
    mesh=mesh,
    in_specs=PartitionSpec(axes),
    out_specs=_spec(x.shape[1:], mesh, axes),
    check_vma=False,
  )(x)


def cut_sum(
  shape: Sequence[int], mesh: Mesh | None, axes: Axes
) -> NamedSharding | None:
  """Where the sums of a stack of layers lie, [L, ...]; None = anywhere.

  Each sum is cut along the first dim that divides; whole if none does.
  """
  if mesh is None:
    return None
  if not axes or len(shape) < 2:
    return sharding.replicated(mesh)
  return NamedSharding(mesh, PartitionSpec(None, *_spec(shape[1:], mesh, axes)))


def _spec(shape: Sequence[int], mesh: Mesh, axes: Axes) -> PartitionSpec:
  dim = _cut_dim(shape, parts_of(mesh, axes))
  return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, axes)


def _cut_dim(shape: Sequence[int], parts: int) -> int | None:
  """The first that divides: parts along another one do not lie together."""
  return next((i for i, size in enumerate(shape) if size % parts == 0), None)


def parts_of(mesh: Mesh | None, axes: Axes) -> int:
  """How many parts rows are cut into along these axes of the mesh."""
  return math.prod(mesh.shape[a] for a in axes) if axes else 1
