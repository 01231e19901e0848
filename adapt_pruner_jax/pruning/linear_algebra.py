"""Gram matrices: products at full precision, factors with a ridge, solves.

`curvature` and `least_squares` look at a model this way: as matrices, each with
the Gram matrix of its inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import ModelConfig

LEAST = 1e-5  # ridge of a channel over its energy, for float32


def check(config: ModelConfig) -> None:
  """Raises a UserError for a model that least squares cannot refit."""
  if config.norm_order != "pre" or config.qk_norm == "all":
    why = (
      f"the family {config.family} norms what its matrices write, which "
      "least squares does not see"
    )
  elif config.residual:
    why = "SliceGPT changes the residual width"
  else:
    return
  raise UserError(
    f"this model cannot be refitted: {why}; use --config.prune.refit=none "
    "--config.prune.method=adapt, as --config=configs/paper.py does"
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


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum to float32 at full precision."""
  return jnp.einsum(
    equation,
    x,
    y,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def factor(gram_CC: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cholesky factor of a Gram matrix with its ridge, scaled: (L, scale_C).

  gram + ridge * (median of its diagonal) * I = diag(scale) L L^T diag(scale),
  L L^T with a unit diagonal. The median, because in large models a few channels
  are a thousand times larger than the rest; these get a ridge of LEAST times
  their own energy, without which float32 could not tell them apart. Channels
  that are always zero do not count in the median; they have scale 1.
  """
  diagonal_C = jnp.diagonal(gram_CC)
  live_C = diagonal_C > 0
  median = jnp.nanmedian(jnp.where(live_C, diagonal_C, jnp.nan))
  ridge_C = jnp.maximum(ridge * median, LEAST * diagonal_C)
  scale_C = jnp.where(live_C, jnp.sqrt(diagonal_C + ridge_C), 1)
  scaled_CC = gram_CC / scale_C[:, None] / scale_C[None]
  scaled_CC = jnp.fill_diagonal(scaled_CC, 1.0, inplace=False)
  return jnp.linalg.cholesky(scaled_CC), scale_C


def solve(
  lower_CC: jax.Array, scale_C: jax.Array, right_CE: jax.Array
) -> jax.Array:
  """Solves with what `factor` returns, [C, E]."""
  scaled_CE = right_CE / scale_C[:, None]
  solved_CE = jax.scipy.linalg.cho_solve((lower_CC, True), scaled_CE)
  return solved_CE / scale_C[:, None]
