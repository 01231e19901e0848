"""Refits between the steps of a prune, where units are only masked."""

import jax
import numpy as np

from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.pruning import refit, surgery
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Masked


def refit_masked(
  masked: Masked, masks: Masks, tokens_NT: np.ndarray
) -> tuple[Params, list[dict]]:
  """Refits what the masks leave of a model to the task's own (`refit.layers`).

  Args:
    masks: units that are left.
    tokens_NT: calibration tokens, of the step.

  Returns:
    The new stacked params, and a record a matrix.
  """
  task, stacked = masked.task, masked.stacked
  config = surgery.dense(task.full)
  begin = placement.replicate(task.begin, task.mesh)
  placed = placement.replicate(masks, task.mesh)

  def layer_at(i: int) -> tuple[Params, Params, Masks]:
    return (
      _layer(masked.original["layers"], begin, i),
      _layer(stacked["layers"], placed, i),
      {u: m[i] for u, m in masks.items()},
    )

  outer = {n: stacked[n] for n in model_config.outer_names(config)}
  ridge = task.settings.refit_ridge
  new, records = dict(stacked["layers"]), []
  for i, changed, found in refit.layers(
    config, outer, layer_at, tokens_NT, task.batch, ridge, False, task.mesh
  ):
    for n, weight in changed.items():
      new[n] = _set(new[n], weight, i)
    records += found
  return stacked | {"layers": new}, records


@jax.jit
def _layer(layers: Params, masks: dict[str, jax.Array], i: int) -> Params:
  """Layer i of stacked params, zero where units are masked."""
  masks = {u: m[i] for u, m in masks.items()}
  return {n: axes.mask(n, w[i], masks) for n, w in layers.items()}


@jax.jit
def _set(stacked: jax.Array, weight: jax.Array, i: int) -> jax.Array:
  return stacked.at[i].set(weight)
