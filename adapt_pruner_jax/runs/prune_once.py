"""One prune with the refit behind it, as a run's stages and `compare` do it."""

import dataclasses
from collections.abc import Callable

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import methods, surgery, task
from adapt_pruner_jax.runs.inputs import Inputs

Pair = tuple[ModelConfig, Params]


def prune(
  old: Pair,
  inputs: Inputs,
  settings: Prune,
  *,
  target: int | None,
  kept: surgery.Kept | None = None,
  first: int = 0,
  after: task.Step | None = None,
  log: Callable[[dict, task.Step], None],
) -> tuple[task.Pruned, list[dict]]:
  """Prunes a model by `settings.method`, and refits it if asked to.

  Args:
    old: the model before.
    target: parameters to end at; None = `settings.max_steps` steps.
    kept: what `old` has of the original model; None = all of it.
    first: pruning steps that were done in earlier stages: each step of a run
      has calibration windows of its own.
    after: the last step that is decided already, of a prune that was cut.
    log: called with each step's record as it is decided.

  Returns:
    What is left, and a record of each matrix that was refitted at the end.
  """
  config = inputs.recipe
  kept = surgery.everything(old[0]) if kept is None else kept
  pruned = methods.METHODS[settings.method](
    *old,
    settings,
    lambda step: inputs.calibration.batch(first + step),
    target=target,
    batch=config.calibration.batch,
    mesh=inputs.mesh,
    full=inputs.full,
    kept=kept,
    seed=config.seed,
    after=after,
    log=log,
  )
  if settings.refit != "none":
    inputs.log.say("refitting what is left")
  steps = len(pruned.trace) + (after.number if after else 0)
  params, refits = methods.refit_after(
    old,
    pruned,
    surgery.relative_to(kept, pruned.kept),
    settings,
    lambda: inputs.refit_data.batch(first + steps),
    config.calibration.batch,
    inputs.mesh,
  )
  return dataclasses.replace(pruned, params=params), refits
