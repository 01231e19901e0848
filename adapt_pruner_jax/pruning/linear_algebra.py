"""Gram matrices: products at full precision, ridges, inverses, solves.

`curvature` and `least_squares` look at a model this way: as matrices, each with
the Gram matrix of its inputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jax.sharding import Mesh

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import elimination, float32_product
from adapt_pruner_jax.pruning.median import median

LEAST = 1e-5  # ridge of a channel over its energy, for float32


def check(config: ModelConfig) -> None:
  """Raises a UserError for a model that curvature says nothing of."""
  if config.norm_order != "pre" or config.qk_norm == "all":
    why = (
      f"the family {config.family} norms what its matrices write, which "
      "a Gram matrix does not see"
    )
  elif config.residual:
    why = "SliceGPT changes the residual width"
  else:
    return
  raise UserError(
    f"this model cannot be pruned by curvature: {why}; use "
    "--config.prune.method=fisher, or --config=configs/paper.py"
  )


def as_matrix(name: str, weight: jax.Array) -> jax.Array:
  """A weight as [inputs, outputs].

  Args:
    name: of the parameter, a key of `axes.AXES`.
    weight: as the model has it.
  """
  reads = axes.AXES[name][0] in axes.RESIDUAL
  cut = 1 if reads else weight.ndim - 1
  return weight.reshape(int(np.prod(weight.shape[:cut])), -1)


def cut_like_gram(x_CE: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Rows over the devices that invert a Gram matrix by its rows, if they do."""
  if not elimination.wanted(mesh) or len(x_CE) % mesh.size:
    return x_CE
  return elimination.cut(x_CE, mesh)


def scaled(gram_CC: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A Gram matrix with its ridge, scaled to a unit diagonal: (A, scale_C).

  gram + ridge * (median of its diagonal) * I = diag(scale) A diag(scale). The
  median, because in large models a few channels are a thousand times larger
  than the rest; these get a ridge of LEAST times their own energy, without
  which float32 could not tell them apart. Channels that are always zero do not
  count in the median; they have scale 1.
  """
  at_C = jnp.arange(len(gram_CC))
  here_CC = at_C[:, None] == at_C  # compared, each device has its rows of it
  diagonal_C = jnp.sum(jnp.where(here_CC, gram_CC, 0), axis=1)
  live_C = diagonal_C > 0
  ridge_C = jnp.maximum(ridge * median(diagonal_C, live_C), LEAST * diagonal_C)
  scale_C = jnp.where(live_C, jnp.sqrt(diagonal_C + ridge_C), 1)
  scaled_CC = gram_CC / scale_C[:, None] / scale_C[None]
  return jnp.where(here_CC, 1.0, scaled_CC), scale_C


def inverse_blocks(
  scaled_CC: jax.Array, width: int, mesh: Mesh | None = None
) -> jax.Array:
  """Blocks on the diagonal of the inverse, [C // width, width, width].

  Args:
    scaled_CC: from `scaled`.
    width: of a block.
    mesh: where it is computed, which decides how (`elimination.wanted`).
  """
  if elimination.wanted(mesh):
    return elimination.inverse_blocks(scaled_CC, width, mesh)
  C = len(scaled_CC)
  lower_CC = jnp.linalg.cholesky(scaled_CC)
  inverse_CC = cho_solve((lower_CC, True), jnp.eye(C))
  if width == 1:
    return jnp.diagonal(inverse_CC)[:, None, None]
  index = jnp.arange(C // width)
  blocks = inverse_CC.reshape(C // width, width, C // width, width)
  return blocks[index, :, index]


def solve_blocks(
  left_UJJ: jax.Array, right_UJJ: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
  """Solves many small positive definite systems, [U, J, J].

  Args:
    left_UJJ: the matrices, as `inverse_blocks` gives them.
    right_UJJ: right-hand sides.
    mesh: where it is computed, which decides how (`elimination.wanted`).
  """
  if not elimination.wanted(mesh):
    return jnp.linalg.solve(left_UJJ, right_UJJ)
  inverse_UJJ = jax.vmap(elimination.rough_inverse)(left_UJJ)
  times = partial(float32_product.product, "uij,ujk->uik")

  def step(_, found_UJJ):
    missing_UJJ = right_UJJ - times(left_UJJ, found_UJJ)
    return found_UJJ + times(inverse_UJJ, missing_UJJ)

  # From nothing, then refined twice: one body to compile.
  return jax.lax.fori_loop(0, 3, step, jnp.zeros_like(right_UJJ))


def solve(
  gram_CC: jax.Array,
  ridge: jax.Array,
  rights: dict[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
  """(gram + its ridge)^-1 right of each right-hand side, [C, E].

  Args:
    gram_CC, ridge: as `scaled`'s.
    rights: what is solved for; the matrix is factored once.
    mesh: where it is computed, which decides how (`elimination.wanted`).
  """
  scaled_CC, scale_C = scaled(gram_CC, ridge)
  rights = {n: right_CE / scale_C[:, None] for n, right_CE in rights.items()}
  found = solve_scaled(scaled_CC, rights, mesh)
  return {n: found_CE / scale_C[:, None] for n, found_CE in found.items()}


def solve_scaled(
  scaled_CC: jax.Array,
  rights: dict[str, jax.Array],
  mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
  """scaled^-1 right of each right-hand side, [C, E].

  Args:
    scaled_CC: positive definite, with a unit diagonal, as from `scaled`.
    rights: as `solve`'s.
    mesh: where it is computed, which decides how (`elimination.wanted`).
  """
  if elimination.wanted(mesh):
    return elimination.solve(scaled_CC, rights, mesh)
  factor = jnp.linalg.cholesky(scaled_CC), True
  return {n: cho_solve(factor, right) for n, right in rights.items()}
