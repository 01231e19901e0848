"""The pruning methods by name. All have the signature of `prune.prune`."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  adapt,
  baselines,
  curvature,
  linear_algebra,
  refit,
  surgery,
  task,
)

METHODS = {
  "adapt": adapt.prune,
  "curvature": curvature.prune,
  **baselines.METHODS,
}


def resumes(settings: Prune) -> bool:
  """Whether a stage can go on from one of its steps."""
  return settings.method in ("adapt", "curvature")


def check(config: ModelConfig, settings: Prune) -> None:
  """Raises a UserError if this model cannot be pruned so, before any work."""
  if settings.method == "slicegpt" and settings.refit != "none":
    raise UserError(
      "SliceGPT changes the residual width, which a refit compares: give "
      "--config.prune.refit=none"
    )
  if settings.method == "curvature" or settings.refit != "none":
    linear_algebra.check(config)


def refit_after(
  old: tuple[ModelConfig, Params],
  pruned: task.Pruned,
  keep: surgery.Kept,
  settings: Prune,
  draw: Callable[[], np.ndarray],
  batch: int,
  mesh: Mesh | None = None,
) -> tuple[Params, list[dict]]:
  """The refit that `settings.refit` asks for at the end of a prune.

  Args:
    old: the model before it.
    keep: the units of `old` that are left.
    draw: gives the calibration tokens, int32 [N, T]; only asked for a refit,
      since a file of given samples may hold none for it.

  Returns:
    The params, and a record a matrix (see `refit.refit`); none without refit.
  """
  if settings.refit == "none":
    return pruned.params, []
  return refit.refit(
    old,
    (pruned.config, pruned.params),
    keep,
    draw(),
    batch,
    ridge=settings.refit_ridge,
    refit_all=settings.refit_all,
    mesh=mesh,
  )
