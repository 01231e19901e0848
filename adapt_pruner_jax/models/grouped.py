"""Products of rows with the matrix of their group; those of a group are next
to each other.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from adapt_pruner_jax.models.arithmetic import as_multiplied

MOST_ROWS = 128  # of a block of one group, on a CPU


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
  dx_PI = _product(dy_PO, used_XIO.swapaxes(1, 2), sizes_X)
  if used_XIO is not w_XIO:
    x_PI, dy_PO = x_PI.astype(w_XIO.dtype), dy_PO.astype(w_XIO.dtype)
  dw_XIO = outer(x_PI, dy_PO, sizes_X)
  return dx_PI, dw_XIO.astype(w_XIO.dtype), None


product.defvjp(_forward, _backward)


@sequential_vmap  # `ragged_dot` has no rule for rows in batches
def _product(x_PI, w_XIO, sizes_X):
  return jax.lax.platform_dependent(
    x_PI, w_XIO, sizes_X, cpu=_product_of_blocks, default=jax.lax.ragged_dot
  )


@sequential_vmap
def outer(x_PI, dy_PO, sizes_X):
  """The sum over a group's rows of x times dy, [X, I, O]."""
  return jax.lax.platform_dependent(
    x_PI, dy_PO, sizes_X, cpu=_outer_of_blocks, default=_ragged_outer
  )


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)
_ragged_outer = partial(
  jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=_OVER_ROWS
)


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
