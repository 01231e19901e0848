"""Inverses of large Gram matrices on many devices, by one small program.

XLA unrolls Cholesky and triangular solves for TPUs into n / 128 steps of
different shapes: for n = 2048 the compiler takes minutes, for 14336 it does not
end, and every device works on the whole matrix. Here blocked Gauss-Jordan
elimination takes n / block equal steps, whose body is compiled once, on rows
cut over all devices of the mesh: 2 n^3 operations, all of them in products of
matrices. It does not pivot: the matrices are positive definite, with a unit
diagonal and a ridge (`linear_algebra.scaled`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.pruning.float32_product import product

BLOCK = 256  # rows that a step eliminates
SMALL = 32  # of which so many at a time
ROWS = PartitionSpec(sharding.MESH_AXES, None)

_dot = partial(product, "ij,jk->ik")


def wanted(mesh: Mesh | None) -> bool:
  """Whether to eliminate on these devices, rather than to factor.

  CPUs and a single GPU have a Cholesky factorisation of a library's.
  """
  if mesh is None:
    return False
  platform = mesh.devices.flat[0].platform
  return platform == "tpu" or (platform != "cpu" and mesh.size > 1)


def inverse_blocks(
  matrix_CC: jax.Array, width: int, mesh: Mesh, block: int = BLOCK
) -> jax.Array:
  """Square blocks on the diagonal of an inverse, [C // width, width, width].

  Args:
    matrix_CC: positive definite, with a unit diagonal.
    width: of a block; 1 = the diagonal alone.
    mesh: over all of whose devices the rows are cut.
    block: rows that a step eliminates.
  """
  C = len(matrix_CC)

  def pick(inverse_RN):
    rows = len(inverse_RN)
    first = jax.lax.axis_index(sharding.MESH_AXES) * rows
    row_R1 = first + jnp.arange(rows)[:, None]
    columns_RJ = row_R1 // width * width + jnp.arange(width)
    # Rows behind the last are padding, whose blocks nobody asks for.
    columns_RJ = jnp.minimum(columns_RJ, inverse_RN.shape[1] - 1)
    return jnp.take_along_axis(inverse_RN, columns_RJ, axis=1)

  found_NJ = _eliminated(matrix_CC, mesh, block, pick)
  found_CJ = sharding.whole(found_NJ, mesh)[:C]
  return found_CJ.reshape(C // width, width, width)


def solve(
  matrix_CC: jax.Array,
  rights: dict[str, jax.Array],
  mesh: Mesh,
  block: int = BLOCK,
) -> dict[str, jax.Array]:
  """matrix^-1 right of each, [C, E], with a step of iterative refinement.

  Args:
    matrix_CC: positive definite, with a unit diagonal.
    rights: right-hand sides [C, E]; the matrix is inverted once.
    mesh: over all of whose devices the rows are cut.
    block: rows that a step eliminates.
  """
  C = len(matrix_CC)
  inverse_NN = _eliminated(matrix_CC, mesh, block, lambda rows: rows)
  N = len(inverse_NN)
  padded_NN = _padded(matrix_CC, N, mesh)

  def times(matrix_NN, right_NE):
    # Rows stay cut; what they are multiplied with is whole.
    return cut(_dot(matrix_NN, sharding.whole(right_NE, mesh)), mesh)

  def one(right_CE):
    right_NE = cut(jnp.pad(right_CE, ((0, N - C), (0, 0))), mesh)

    def step(_, found_NE):
      left_NE = right_NE - times(padded_NN, found_NE)
      return found_NE + times(inverse_NN, left_NE)

    # From nothing, then once more: one body to compile.
    found_NE = jax.lax.fori_loop(0, 2, step, jnp.zeros_like(right_NE))
    return sharding.whole(found_NE, mesh)[:C]

  return {n: one(right_CE) for n, right_CE in rights.items()}


def inverse(matrix_CC: jax.Array) -> jax.Array:
  """Of a small positive definite matrix, on one device.

  With a step of Newton's method, which takes back what elimination without
  pivots loses to LAPACK.
  """
  inverse_CC = rough_inverse(matrix_CC)
  left_CC = jnp.eye(len(matrix_CC)) - _dot(matrix_CC, inverse_CC)
  return inverse_CC + _dot(inverse_CC, left_CC)


def rough_inverse(matrix_CC: jax.Array) -> jax.Array:
  """Of a small positive definite matrix, as elimination leaves it."""
  C = len(matrix_CC)
  if C <= SMALL:
    return jax.lax.fori_loop(0, C, _eliminate_row, matrix_CC)
  padded = _with_ones(matrix_CC, -(-C // SMALL) * SMALL)

  def step(k, a):
    return _eliminate(a, k * SMALL, SMALL)

  return jax.lax.fori_loop(0, len(padded) // SMALL, step, padded)[:C, :C]


def _eliminated(matrix_CC, mesh, block, pick):
  """What `pick` takes of the rows of an inverse on each device, [N, ...]."""
  C, devices = len(matrix_CC), mesh.size
  # A device has whole blocks; few rows make small ones.
  block = min(block, SMALL << (-(-C // devices // SMALL) - 1).bit_length())
  size = -(-C // (devices * block)) * devices * block

  def local(a_RN):
    step = partial(_eliminate_cut, block=block)
    return pick(jax.lax.fori_loop(0, size // block, step, a_RN))

  run = jax.shard_map(
    local, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
  )
  return run(_padded(matrix_CC, size, mesh))


def _eliminate_cut(k, a_RN, *, block):
  """Step k on the rows of one device; within `shard_map`."""
  at, rows = k * block, len(a_RN)
  mine = jax.lax.axis_index(sharding.MESH_AXES) == at // rows
  own = jax.lax.dynamic_slice_in_dim(a_RN, at % rows, block, 0)
  pivots = jax.lax.psum(jnp.where(mine, own, 0), sharding.MESH_AXES)
  a_RN, new = _reduced(a_RN, pivots, at)
  own = jax.lax.dynamic_slice_in_dim(a_RN, at % rows, block, 0)
  new = jnp.where(mine, new, own)
  return jax.lax.dynamic_update_slice_in_dim(a_RN, new, at % rows, 0)


def _eliminate(a_NN, at, block):
  """Eliminates rows [at, at + block) of a matrix on one device."""
  pivots = jax.lax.dynamic_slice_in_dim(a_NN, at, block, 0)
  a_NN, new = _reduced(a_NN, pivots, at)
  return jax.lax.dynamic_update_slice_in_dim(a_NN, new, at, 0)


def _reduced(a, pivots, at):
  """Rows without the columns of the pivots, and the pivots' own new rows."""
  block = len(pivots)
  inner = inverse(jax.lax.dynamic_slice_in_dim(pivots, at, block, 1))
  put = jax.lax.dynamic_update_slice_in_dim
  columns = jax.lax.dynamic_slice_in_dim(a, at, block, 1)
  new = put(_dot(inner, pivots), inner, at, 1)
  return put(a, jnp.zeros_like(columns), at, 1) - _dot(columns, new), new


def _eliminate_row(k, a_CC):
  """As `_eliminate`, of one row; comparisons compile to less than slices."""
  here = jnp.arange(len(a_CC)) == k
  row = jax.lax.dynamic_slice_in_dim(a_CC, k, 1, 0)
  pivot = 1 / jax.lax.dynamic_slice_in_dim(row, k, 1, 1)
  row = jnp.where(here[None], pivot, row * pivot)
  column = jax.lax.dynamic_slice_in_dim(a_CC, k, 1, 1)
  a_CC = jnp.where(here[None], 0, a_CC) - column * row
  return jnp.where(here[:, None], row, a_CC)


def cut(matrix: jax.Array, mesh: Mesh) -> jax.Array:
  """Rows over all devices."""
  return jax.lax.with_sharding_constraint(matrix, NamedSharding(mesh, ROWS))


def _padded(matrix_CC, size, mesh):
  return cut(_with_ones(matrix_CC, size), mesh)


def _with_ones(matrix_CC, size):
  """Padded with the rows of an identity."""
  C = len(matrix_CC)
  padded = jnp.pad(matrix_CC, ((0, size - C), (0, size - C)))
  at = jnp.arange(size)
  ones = (at[:, None] == at[None]) & (at[None] >= C)
  return jnp.where(ones, jnp.ones((), matrix_CC.dtype), padded)
