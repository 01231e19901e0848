"""What a stage of a run ends at."""

from adapt_pruner_jax.pruning import budgets, schedule
from adapt_pruner_jax.pruning.task import Limits
from adapt_pruner_jax.runs.inputs import Inputs


def stage_target(inputs: Inputs, stage: int) -> int | None:
  """The budget left at the end of a stage; None if only the steps are
  given."""
  if inputs.target is None:
    return None
  size = budgets.count(inputs.full, inputs.recipe.prune)
  stages = inputs.recipe.prune.stages
  return schedule.stage_targets(size, inputs.target, stages)[stage - 1]


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
