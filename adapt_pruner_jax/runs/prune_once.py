"""One prune with the refit behind it, as a run's stages and `compare` do it."""

import dataclasses
from collections.abc import Callable

import jax

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.data.calibration import GivenData
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import methods, quality
from adapt_pruner_jax.pruning.surgery import Kept
from adapt_pruner_jax.pruning.task import (
  Limits,
  Pruned,
  PruneTask,
  Step,
)
from adapt_pruner_jax.runs.inputs import Inputs


def prune(
  old: tuple[ModelConfig, Params],
  inputs: Inputs,
  settings: Prune,
  *,
  target: int | None,
  limits: Limits = (),
  kept: Kept | None = None,
  first: int = 0,
  passes: int = 0,
  after: Step | None = None,
  log: Callable[[dict, Step], None],
  sized: Callable[[ModelConfig], None] | None = None,
) -> Pruned:
  """Prunes a model as `settings` say, and refits it if they ask for it.

  Args:
    old: the model before.
    inputs: the calibration data, the original's sizes, and the devices.
    settings: the method and its fields; the target in them is not read.
    target: parameters to end at; None = `settings.max_steps` steps.
    limits: further ones, see `PruneTask`.
    kept: what `old` has of the original model; None = all of it.
    first: pruning steps that were done in earlier stages: each step of a run
      has calibration windows of its own.
    passes: passes of refits by the loss behind the first of each stage that
      were done there: these have windows of their own too, but of a file,
      which lists as many as it has.
    after: the last step that is decided already, of a prune that was cut.
    log: called with each step's record as it is decided.
    sized: called as soon as the sizes of all layers are known.
  """
  if settings.stream_layers:
    old = old[0], jax.device_get(old[1])
  searched, refits = inputs.search_data, inputs.refit_data
  shift = first if isinstance(refits, GivenData) else first + passes
  task = PruneTask(
    *old,
    settings,
    samples=lambda step: inputs.calibration.batch(first + step),
    target=target,
    limits=limits,
    quality=quality.asked(settings, inputs.tuning),
    full=inputs.full,
    kept=kept,
    refit_samples=lambda step: refits.batch(shift + step),
    tuning=searched and (lambda step: searched.batch(first + step)),
    batch=inputs.recipe.calibration.batch,
    pass_tokens=inputs.recipe.calibration.pass_tokens,
    mesh=inputs.mesh,
    seed=inputs.recipe.seed,
    after=after,
    log=log,
  )
  pruned = methods.prune(task)
  if sized is not None:
    sized(pruned.config)
  if pruned.config == old[0]:  # the vocabulary alone has met the target
    return pruned
  if settings.refit != "none":
    inputs.log.say("refitting what is left")
  if settings.refit != "none" and settings.stream_layers:
    where = sharding.param_shardings(task.params, inputs.mesh)
    params = jax.device_put(task.params, where)
    task = dataclasses.replace(task, params=params)
  refitted = methods.refit_after(task, pruned)
  if by_loss := refitted.refit_loss:
    inputs.log.say(
      f"refitted by the loss of {by_loss['tokens']:,} tokens: "
      f"{by_loss['before']:.4f} -> {by_loss['after']:.4f} from the model "
      "before, on held-out windows"
    )
  return refitted
