"""What a stage of a run ends at."""

from collections.abc import Callable

from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, schedule, surgery
from adapt_pruner_jax.pruning.task import Limits, Step
from adapt_pruner_jax.runs.inputs import Inputs


def stage_target(inputs: Inputs, stage: int) -> int | None:
  """The budget left at the end of a stage; None if only the steps are
  given."""
  if inputs.target is None:
    return None
  size = budgets.count(inputs.full, inputs.recipe.prune)
  stages = inputs.recipe.prune.stages
  return schedule.stage_targets(size, inputs.target, stages)[stage - 1]


def stage_progress(
  inputs: Inputs, config: ModelConfig, target: int | None
) -> tuple[float, str, Callable[[dict, Step], float]]:
  """What a stage's pruning has to do, in which unit, and how much of it is done
  behind a step, by its record.

  Args:
    config: the model before the stage.
    target: from `stage_target`.
  """
  settings = inputs.recipe.prune
  if target is None:
    return settings.max_steps, "steps", lambda record, step: record["step"]
  if settings.budget == "quality":
    unit = "nats (or of the accuracy)"
    return settings.budget_value, unit, lambda record, step: record["rise"]
  in_unit = lambda amount: round(budgets.value(amount, settings), 3)
  size = budgets.count(config, settings)

  def done(record: dict, step: Step) -> float:
    widths = surgery.widths(step.masks)
    return in_unit(size - budgets.of_widths(inputs.full, widths, settings))

  return in_unit(size - target), budgets.UNIT[settings.budget], done


def stage_limits(inputs: Inputs, stage: int) -> Limits:
  """The further budgets at the end of a stage."""
  found, stages = [], inputs.recipe.prune.stages
  for settings, most in inputs.limits:
    size = budgets.count(inputs.full, settings)
    ends = schedule.stage_targets(size, most, stages)
    found.append((settings, ends[stage - 1]))
  return tuple(found)


def stage_end(inputs: Inputs, stage: int) -> int:
  """The global train step at which a stage ends; 0 before the first."""
  recipe = inputs.recipe
  ends = schedule.stage_ends(
    inputs.total_steps, recipe.prune.stages, recipe.train.data_share
  )
  return [0, *ends][stage]
