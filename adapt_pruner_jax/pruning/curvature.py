"""Curvature: remove what the rest of its matrix can stand in for.

The score of a unit is the second-order increase of the loss when it is removed
and the rest of the matrix that it feeds, `o` or `down`, is refitted (`refit`):

  s = trace(B_JJ^-1 W_J H W_J^T),   B = (G + ridge)^-1

with J the unit's input channels of the matrix W [C, D], G = mean of x x^T its
input's Gram matrix, and H = sum of g g^T over tokens, g the loss's gradient at
its output. For one channel it is w^T H w / B_cc, as in Optimal Brain Surgeon
with the Kronecker factors of K-FAC. Only activations and their gradients are
needed, and one layer's G exists at a time.

Scores of all modules have one unit of measure, so that one ranking of all units
can replace a schedule. The score says what can be reconstructed: use it with a
refit. A half as one piece leaves nothing to stand in for it: the same increase
is trace(W^T G W H).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models.layer import WRITERS, stream, times_mask
from adapt_pruner_jax.pruning import (
  backward,
  float32_product,
  linear_algebra,
  passes,
  scores,
)
from adapt_pruner_jax.pruning.task import Masked, Measured

ENOUGH = 4  # tokens per input channel from which a weak ridge is best
WEAK, STRONG = 1e-3, 0.1


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores of all units, in nats of the sequences' summed mean losses."""
  return scores.measure_by(PROGRAMS, masked, tokens_NT)


def _grams(T: int, mesh: Mesh, halves: bool = False) -> backward.Visitor:
  """Sums Gram matrices: of a writing matrix's input, and of the gradient at its
  output; keeps the scores of its units.

  Args:
    T: tokens of a row.
    mesh: where Gram matrices are inverted.
    halves: keep the score of the half as one piece beside its units'.
  """

  def matrix(half):
    writer = WRITERS[half.unit]
    return linear_algebra.as_matrix(writer, half.weights[writer])

  def start(half):
    return tuple(jnp.zeros((n, n), jnp.float32) for n in matrix(half).shape)

  def run(half, x_BTD):
    y_BTD, tap = half.run(x_BTD)
    fed = tap.fed[half.unit]
    return y_BTD, times_mask(fed, half.masks[half.unit])

  def add(half, total, x_BTD, dy_BTD, valid_B, rows):
    del rows
    _, vjp, fed = jax.vjp(lambda x: run(half, x), x_BTD, has_aux=True)
    # Of bfloat16 as it is one product is exact, where float32 takes six.
    g_BTD = stream(half.config, dy_BTD)
    if half.config.residual_scale != 1:
      g_BTD = g_BTD.astype(jnp.float32) * half.config.residual_scale
    fed_BTC = fed.reshape(*fed.shape[:2], -1)
    fed_BTC *= valid_B[:, None, None].astype(fed.dtype)
    found = (
      float32_product.product("btc,bte->ce", fed_BTC, fed_BTC),
      float32_product.product("btd,bte->de", g_BTD, g_BTD),
    )
    return jax.tree.map(jnp.add, total, found), vjp(dy_BTD)[0]

  def finish(half, sums, seen):
    gram_CC, hessian_DD = sums
    hessian_DD = sharding.whole(hessian_DD, mesh)
    tokens = seen.rows * T
    weight_CD, mask_U = matrix(half), half.masks[half.unit]
    live = jnp.sum(mask_U) * (weight_CD.shape[0] // mask_U.shape[0])
    ridge = jnp.where(tokens >= ENOUGH * live, WEAK, STRONG)
    gram_CC = gram_CC / tokens
    args = gram_CC, hessian_DD, weight_CD
    scores_U = unit_scores(*args, ridge, len(mask_U), mesh)
    return (scores_U, half_score(*args)) if halves else scores_U

  return backward.Visitor(start, add, finish)


# Scores are float32; the loss behind the gradients is the sum over sequences of
# the mean over their tokens.
PROGRAMS = passes.scored(_grams, "halves")
measure_step = PROGRAMS.walk


def unit_scores(
  gram_CC: jax.Array,
  hessian_DD: jax.Array,
  weight_CD: jax.Array,
  ridge: jax.Array,
  units: int,
  mesh: Mesh | None = None,
) -> jax.Array:
  """trace(B_JJ^-1 W_J H W_J^T) of each unit, [units], float32.

  Args:
    gram_CC: G of the matrix's input, mean over tokens; on many devices its rows
      may be cut.
    hessian_DD: H of its output, summed over tokens.
    weight_CD: W; the rows of a unit follow one another.
    ridge: in units of G's median diagonal.
    units: how many there are.
    mesh: where G is inverted, which decides how (`linear_algebra`).
  """
  C = weight_CD.shape[0]
  J = C // units
  scaled_CC, scale_C = linear_algebra.scaled(gram_CC, ridge)
  # B = scale^-1 A^-1 scale^-1, so that B_JJ^-1 is scaled the other way.
  inverse_UJJ = linear_algebra.inverse_blocks(scaled_CC, J, mesh)
  scaled_CD = weight_CD.astype(jnp.float32) * scale_C[:, None]
  scaled_CD = linear_algebra.cut_like_gram(scaled_CD, mesh)
  right_CD = float32_product.product("cd,de->ce", scaled_CD, hessian_DD)
  if J == 1:
    energy_C = jnp.sum(right_CD * scaled_CD, axis=-1)
    return energy_C / inverse_UJJ[:, 0, 0]
  split = lambda x: x.reshape(units, J, -1)
  curvature_UJJ = float32_product.product(
    "ujd,uid->uji", split(right_CD), split(scaled_CD)
  )
  solved = linear_algebra.solve_blocks(inverse_UJJ, curvature_UJJ, mesh)
  return jnp.trace(solved, axis1=1, axis2=2)


def half_score(
  gram_CC: jax.Array, hessian_DD: jax.Array, weight_CD: jax.Array
) -> jax.Array:
  """trace(W^T G W H): what the removal of all that feeds W costs.

  Args:
    gram_CC, hessian_DD, weight_CD: as of `unit_scores`.
  """
  weight_CD = weight_CD.astype(jnp.float32)
  left_CD = float32_product.product("ce,ed->cd", gram_CC, weight_CD)
  right_CD = float32_product.product("cd,de->ce", weight_CD, hessian_DD)
  return jnp.sum(left_CD * right_CD)
