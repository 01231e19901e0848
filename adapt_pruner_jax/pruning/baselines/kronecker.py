"""Removals from a matrix whose curvature is a Kronecker product.

The rows of W [C, E] belong to units, those of one after another; the Hessian of
the loss with respect to W is own [C, C] (x) far [E, E]. Removing the rows R and
letting the others make up for it costs (Optimal Brain Surgeon, with many
weights at once)

  rise = 1/2 trace(B_RR^-1 W_R far W_R^T),   B = (own + damping)^-1

and changes the others by

  W <- W - B[:, R] B_RR^-1 W_R,

in which `far` has no part. Inputs and outputs of a layer are treated alike: to
remove inputs, rows are inputs, own is the Gram matrix of inputs and far that of
the gradients at the outputs; to remove outputs, W is transposed and the two
change places.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.sharding import Mesh

from adapt_pruner_jax.pruning import linear_algebra
from adapt_pruner_jax.pruning.float32_product import product

ROUNDS = 64  # in which all units of a module are eliminated


class Matrix(NamedTuple):
  """A matrix and its curvature, float32.

  Attributes:
    weight_CE: zero in the rows of units that are not there.
    own_CC: of the rows.
    far_EE: of the columns.
    damping: added to own's diagonal, in units of its mean.
  """

  weight_CE: jax.Array
  own_CC: jax.Array
  far_EE: jax.Array
  damping: float


class Ranked(NamedTuple):
  """How units of a module go, one after another.

  Attributes:
    place_U: int, when each goes, from 0; of absent units it means nothing.
    rise_U: of the loss, when each goes after those before it, in all matrices.
  """

  place_U: jax.Array
  rise_U: jax.Array


def rank(
  matrices: Mapping[str, Matrix], mask_U: jax.Array, mesh: Mesh | None = None
) -> Ranked:
  """Eliminates all units of a module, the cheapest first.

  What one removal costs is known given all before it: inverses are downdated
  and weights updated on the way, so that the rises of any first few sum to the
  exact cost of removing these together. In a module of more than ROUNDS units
  some go at a time, in the order of what they cost when their round begins;
  their rises are exact all the same.

  Args:
    matrices: that lose rows with each unit.
    mask_U: units that are there.
    mesh: where inverses are taken, which decides how (`linear_algebra`).
  """
  U = len(mask_U)
  some = -(-U // ROUNDS)
  begun = [_start(matrix, mesh) for matrix in matrices.values()]

  def eliminate(number, carry):
    states, left_U, ranked = carry
    costs = [_costs(state, left_U) for state in states]
    cost_U = jnp.where(left_U, sum(costs), jnp.inf)
    units_N = jax.lax.top_k(-cost_U, some)[1]
    there_N = left_U[units_N]
    done = [_removed(state, units_N, there_N, U) for state in states]
    rise_N = jnp.maximum(sum(rise for _, rise in done), 0)
    put = lambda old, new: old.at[units_N].set(
      jnp.where(there_N, new, old[units_N])
    )
    ranked = Ranked(
      put(ranked.place_U, number * some + jnp.arange(some)),
      put(ranked.rise_U, rise_N),
    )
    left_U = left_U.at[units_N].set(False)
    return [state for state, _ in done], left_U, ranked

  nothing = Ranked(jnp.zeros(U, jnp.int32), jnp.zeros(U, jnp.float32))
  carry = begun, mask_U, nothing
  return jax.lax.fori_loop(0, -(-U // some), eliminate, carry)[2]


def change(
  matrix: Matrix, keep_U: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
  """How the rows of the units that stay change when all others go, [C, E].

  Rows of the others are 0. With own and W cut in kept and removed rows, it is
  own_kk^-1 own_kR W_R, which is - B_kR B_RR^-1 W_R without the inverse.

  Args:
    matrix: before the removal.
    keep_U: units that stay; the others that are there go.
    mesh: where it is solved, which decides how (`linear_algebra`).
  """
  keep_C = jnp.repeat(keep_U, len(matrix.weight_CE) // len(keep_U))
  scaled_CC, scale_C = _damped(matrix)
  gone_CE = jnp.where(keep_C[:, None], 0, matrix.weight_CE) * scale_C[:, None]
  right_CE = product("cd,de->ce", scaled_CC, gone_CE) * keep_C[:, None]
  both = keep_C[:, None] & keep_C[None]
  kept_CC = jnp.where(both, scaled_CC, jnp.eye(len(keep_C)))
  solved = linear_algebra.solve_scaled(kept_CC, {"": right_CE}, mesh)[""]
  return solved / scale_C[:, None] * keep_C[:, None]


# ---- The elimination ---------------------------------------------------------


class _State(NamedTuple):
  """A matrix part of whose rows are gone, in scaled coordinates."""

  inverse_CC: jax.Array
  weight_CE: jax.Array
  energy_CE: jax.Array  # weight far


def _start(matrix: Matrix, mesh: Mesh | None) -> _State:
  scaled_CC, scale_C = _damped(matrix)
  inverse_CC = linear_algebra.inverse_blocks(scaled_CC, len(scaled_CC), mesh)[0]
  weight_CE = matrix.weight_CE * scale_C[:, None]
  energy_CE = product("cd,de->ce", weight_CE, matrix.far_EE)
  return _State(inverse_CC, weight_CE, energy_CE)


def _costs(state: _State, left_U: jax.Array) -> jax.Array:
  """What each unit that is left costs if it goes alone, [U]."""
  U = len(left_U)
  J = len(state.weight_CE) // U
  if J == 1:
    energy_C = jnp.sum(state.weight_CE * state.energy_CE, axis=-1)
    return energy_C / jnp.diagonal(state.inverse_CC) / 2
  index = jnp.arange(U)
  blocks_UJJ = state.inverse_CC.reshape(U, J, U, J)[index, :, index]
  blocks_UJJ = jnp.where(left_U[:, None, None], blocks_UJJ, jnp.eye(J))
  split = lambda x: x.reshape(U, J, -1)
  energy_UJJ = product(
    "ujd,uid->uji", split(state.energy_CE), split(state.weight_CE)
  )
  solved_UJJ = jnp.linalg.solve(blocks_UJJ, energy_UJJ)
  return jnp.trace(solved_UJJ, axis1=1, axis2=2) / 2


def _removed(
  state: _State, units_N: jax.Array, there_N: jax.Array, U: int
) -> tuple[_State, jax.Array]:
  """The state without some units, and the rise with each, in turn, [N].

  With B_RR = L L^T, the rows of L^-1 W_R are what each row of R lacks given
  those before it.

  Args:
    units_N: which.
    there_N: False for those that are gone already.
    U: how many there are.
  """
  J = len(state.weight_CE) // U
  row_R = (units_N[:, None] * J + jnp.arange(J)).ravel()
  there_R = jnp.repeat(there_N, J)
  columns_CR = state.inverse_CC[:, row_R] * there_R
  both = there_R[:, None] & there_R[None]
  block_RR = jnp.where(both, columns_CR[row_R], jnp.eye(len(row_R)))
  lower_RR = jnp.linalg.cholesky(block_RR)
  divide = partial(solve_triangular, lower_RR, lower=True)
  columns_CR = divide(columns_CR.T).T
  weight_RE = divide(state.weight_CE[row_R] * there_R[:, None])
  energy_RE = divide(state.energy_CE[row_R] * there_R[:, None])
  rise_R = jnp.sum(weight_RE * energy_RE, axis=-1) / 2
  without = partial(product, "cr,re->ce", columns_CR)
  left = _State(
    state.inverse_CC - without(columns_CR.T),
    state.weight_CE - without(weight_RE),
    state.energy_CE - without(energy_RE),
  )
  return left, rise_R.reshape(-1, J).sum(axis=-1)


def _damped(matrix: Matrix) -> tuple[jax.Array, jax.Array]:
  """own + damping as a matrix with a unit diagonal, and its scale.

  Rows that are not there do not count in the mean.
  """
  diagonal_C = jnp.diagonal(matrix.own_CC)
  mean = jnp.sum(diagonal_C) / jnp.maximum(jnp.sum(diagonal_C > 0), 1)
  least = linear_algebra.LEAST * diagonal_C
  ridge_C = jnp.maximum(matrix.damping * mean, least)
  scale_C = jnp.sqrt(diagonal_C + ridge_C)
  scale_C = jnp.where(scale_C > 0, scale_C, 1)
  scaled_CC = matrix.own_CC / scale_C[:, None] / scale_C[None]
  return jnp.fill_diagonal(scaled_CC, 1.0, inplace=False), scale_C
