"""Products of rows with the matrix of their group; those of a group are next
to each other.

By blocks of rows on a CPU, by JAX's Pallas kernels (megablox) on TPUs, where
XLA would multiply each row with all matrices, as on a CPU; elsewhere by XLA's
own `ragged_dot`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from adapt_pruner_jax.models.arithmetic import as_multiplied

MOST_ROWS = 128  # of a block of one group, on a CPU
TILE = 128  # rows of a TPU's kernel at a time, and
MOST_TILED = 512  # at most so many inputs and outputs


@jax.custom_vjp
def product(x_PI: jax.Array, w_XIO: jax.Array, sizes_X: jax.Array) -> jax.Array:
  """Each row times the matrix of its group, [P, O].

  Args:
    x_PI: rows, those of a group next to each other.
    w_XIO: a matrix a group; a float32 one is multiplied in the dtype of the
      rows, and its gradient is summed in float32, as by `arithmetic.project`.
    sizes_X: int32, rows of each group; they add up to P.
  """
  return _product(x_PI, as_multiplied(w_XIO, x_PI), sizes_X)


def _forward(x_PI, w_XIO, sizes_X):
  return product(x_PI, w_XIO, sizes_X), (x_PI, w_XIO, sizes_X)


def _backward(saved, dy_PO):
  x_PI, w_XIO, sizes_X = saved
  used_XIO, dy_PO = as_multiplied(w_XIO, x_PI), dy_PO.astype(x_PI.dtype)
  dx_PI = _product(dy_PO, used_XIO, sizes_X, turned=True)
  if used_XIO is not w_XIO:
    x_PI, dy_PO = x_PI.astype(w_XIO.dtype), dy_PO.astype(w_XIO.dtype)
  dw_XIO = outer(x_PI, dy_PO, sizes_X)
  return dx_PI, dw_XIO.astype(w_XIO.dtype), None


product.defvjp(_forward, _backward)


def _product(x_PI, w_XIO, sizes_X, turned=False):
  """`product`; or, turned, of rows with as many numbers as the outputs."""
  kernel = {"tpu": partial(_product_of_kernel, turned)} if _alone() else {}
  of = lambda fn: lambda x, w, s: fn(x, w.swapaxes(1, 2) if turned else w, s)

  @sequential_vmap  # `ragged_dot` has no rule for rows in batches
  def run(x_PI, w_XIO, sizes_X):
    return jax.lax.platform_dependent(
      *(x_PI, w_XIO, sizes_X),
      cpu=of(_product_of_blocks),
      default=of(jax.lax.ragged_dot),
      **kernel,
    )

  return run(x_PI, w_XIO, sizes_X)


@sequential_vmap
def outer(x_PI, dy_PO, sizes_X):
  """The sum over a group's rows of x times dy, [X, I, O]."""
  kernel = {"tpu": _outer_of_kernel} if _alone() else {}
  return jax.lax.platform_dependent(
    *(x_PI, dy_PO, sizes_X),
    cpu=_outer_of_blocks,
    default=_ragged_outer,
    **kernel,
  )


def _alone() -> bool:
  """Whether this is one device's program: XLA cuts no kernels over several."""
  inside = jax.sharding.get_abstract_mesh().manual_axes
  return bool(inside) or jax.device_count() == 1


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)
_ragged_outer = partial(
  jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=_OVER_ROWS
)


def _product_of_kernel(turned, x_PI, w_XIO, sizes_X, interpret=False):
  """On a TPU; rows beyond the last group are zero."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  shape = w_XIO.shape[:0:-1] if turned else w_XIO.shape[1:]
  with _precision(x_PI):
    y_PO = gmm(
      *(_whole_tiles(x_PI), w_XIO, sizes_X, x_PI.dtype),
      tiling=_tiles(shape),
      transpose_rhs=turned,
      interpret=interpret,
    )[: len(x_PI)]
  used_P = jnp.arange(len(x_PI)) < jnp.sum(sizes_X)
  return jnp.where(used_P[:, None], y_PO, 0)


def _outer_of_kernel(x_PI, dy_PO, sizes_X, interpret=False):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  with _precision(x_PI):
    return tgmm(
      *(_whole_tiles(x_PI).T, _whole_tiles(dy_PO), sizes_X, x_PI.dtype),
      tiling=_tiles((x_PI.shape[1], dy_PO.shape[1])),
      interpret=interpret,
    )


def _tiles(shape):
  return TILE, *(min(size, MOST_TILED) for size in shape)


def _whole_tiles(x_PI):
  return jnp.pad(x_PI, ((0, -len(x_PI) % TILE), (0, 0)))


def _precision(x):
  """Products of half precision are exact; Mosaic makes them in no other way."""
  half = x.dtype.itemsize < 4
  return jax.default_matmul_precision("bfloat16" if half else "float32")


def _product_of_blocks(x_PI, w_XIO, sizes_X):
  """On a CPU, where XLA would multiply each row with all matrices."""
  at_NR, group_N = _blocks(len(x_PI), sizes_X)
  x_NRI = x_PI.at[at_NR].get(mode="fill", fill_value=0)
  y_NRO = jax.lax.map(lambda b: b[0] @ w_XIO[b[1]], (x_NRI, group_N))
  y_PO = jnp.zeros((len(x_PI), w_XIO.shape[2]), y_NRO.dtype)
  return y_PO.at[at_NR].set(y_NRO, mode="drop")


def _outer_of_blocks(x_PI, dy_PO, sizes_X):
  at_NR, group_N = _blocks(len(x_PI), sizes_X)
  x_NRI, dy_NRO = (
    a.at[at_NR].get(mode="fill", fill_value=0) for a in (x_PI, dy_PO)
  )

  def add(dw_XIO, block):
    x_RI, dy_RO, group = block
    return dw_XIO.at[group].add(x_RI.T @ dy_RO), None

  zeros = jnp.zeros((len(sizes_X), x_PI.shape[1], dy_PO.shape[1]), x_PI.dtype)
  return jax.lax.scan(add, zeros, (x_NRI, dy_NRO, group_N))[0]


def _blocks(rows: int, sizes_X: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Blocks of R rows of one group each, as many as there can be at most.

  Returns:
    Each block's rows [N, R], beyond the last where it has fewer; its group [N].
  """
  groups = len(sizes_X)
  R = min(MOST_ROWS, max(8, rows // groups))
  N = rows // R + min(groups, rows)
  last_X = jnp.cumsum(-(-sizes_X // R))  # block behind each group's
  group_N = jnp.searchsorted(last_X, jnp.arange(N), side="right")
  group_N = jnp.minimum(group_N, groups - 1)
  end_X = jnp.cumsum(sizes_X)
  first_N = last_X[group_N] - -(-sizes_X[group_N] // R)
  start_N = end_X[group_N] - sizes_X[group_N]
  start_N += (jnp.arange(N) - first_N) * R
  at_NR = start_N[:, None] + jnp.arange(R)
  return jnp.where(at_NR < end_X[group_N][:, None], at_NR, rows), group_N
