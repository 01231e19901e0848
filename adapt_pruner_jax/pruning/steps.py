"""The one loop of a prune: measure, allot, choose, and now and then refit.

Units are only masked, in dense stacked coordinates, so that one executable
serves every step of every stage; at the end the kept units are gathered into a
smaller model (`surgery`). A prune that was cut goes on from the last step that
it told (`PruneTask.after`): the refits between the steps before it are done
again on the tokens of their steps, which gives the weights that were.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, choice, quality, surgery
from adapt_pruner_jax.pruning.refit import refit_masked
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Masked,
  Measured,
  Pruned,
  PruneTask,
  Step,
  record,
  removed_share,
)

Pair = tuple[ModelConfig, Params]
Update = Callable[[Masked, Masks, np.ndarray], tuple[Params, list[dict]]]


def gathered(masked: Masked, left: Kept, measured: Measured | None) -> Pair:
  """The pair of the units that are left."""
  del measured
  task = masked.task
  return surgery.compact(masked.stacked, left, task.full, task.mesh)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to prune by masks.

  Attributes:
    measure: scores of a masked model's units on the tokens of a step.
    allot: how many units of each module go, from what was measured.
    prepare: the task as the method takes it.
    update: the stacked params, and records, behind a step that it has removed
      units in: of the model before it, the units that are left and the step's
      tokens; None = the weights stay, but for refits.
    finish: the smaller pair, of the masked model, the units that are left and
      the last measurement (None if an interrupted call made it).
    strict: without `prune.trim` it ends below the target, not at it.
  """

  measure: Callable[[Masked, np.ndarray], Measured]
  allot: Callable[[Masked, Measured], Allotted]
  prepare: Callable[[PruneTask], PruneTask] = lambda task: task
  update: Update | None = None
  finish: Callable[[Masked, Kept, Measured | None], Pair] = gathered
  strict: bool = False


def prune(method: Method, task: PruneTask) -> Pruned:
  """Prunes a model to `task.target` parameters, or for some steps.

  Raises:
    UserError: a bad layer range, a target out of reach, or a model whose
      values are not finite.
  """
  task = method.prepare(task)
  masked, trace, measured = _begin(task, method.update), [], None
  last_change, start = masked.step.number, quality.begun(masked)
  while not _done(method, task, masked.step):
    tokens_NT = task.samples(masked.step.number)
    measured = method.measure(masked, tokens_NT)
    _check_finite(masked, measured)
    binding = dataclasses.replace(masked, task=_binding(task, masked.step))
    step = _next_step(masked, measured, method.allot(binding, measured))
    step = quality.held(masked, decided(step), start)
    if step.params < masked.step.params:
      last_change = step.number
    before, masked = masked, dataclasses.replace(masked, step=step)
    update, refits = method.update, {}
    if _refits(task, step) and not _done(method, task, step):
      update = refit_masked
    if update is not None:
      stacked, records = update(before, step.masks, tokens_NT)
      refits = {"refit": records} if records else {}
      at = step.refitted | {step.number: step.masks}
      step = dataclasses.replace(step, refitted=at)
      masked = dataclasses.replace(masked, stacked=stacked, step=step)
    trace.append(record(step) | refits)
    if task.log is not None:
      task.log(trace[-1], step)
    _check_stuck(task, step, last_change)
  left = surgery.to_kept(masked.masks)
  return Pruned(*method.finish(masked, left, measured), left, trace)


def _begin(task: PruneTask, update: Update | None = None) -> Masked:
  """The masked model where the task starts, or goes on.

  Args:
    update: the method's.
  """
  full, begin = task.full, task.begin
  stacked = task.stacked()
  nothing = {u: np.zeros(full.num_layers) for u in UNITS}
  step = task.after or Step(0, begin, nothing, surgery.count(full, begin))
  masked = Masked(task, stacked, step)
  del stacked  # a refit donates it
  before = dataclasses.replace(step, masks=begin)
  for number, masks in step.refitted.items():
    masked = dataclasses.replace(masked, step=before)
    again = update or refit_masked
    stacked, _ = again(masked, masks, task.samples(number - 1))
    masked = dataclasses.replace(masked, stacked=stacked)
    before = dataclasses.replace(before, masks=masks)
  return dataclasses.replace(masked, step=step)


def _next_step(masked: Masked, measured: Measured, allotted: Allotted) -> Step:
  """The step that removes what was allotted, the lowest scores first."""
  task, before = masked.task, masked.masks
  order = choice.order(measured.scores, before)
  masks = choice.remove(before, order, allotted.counts)
  nan_L = np.full(task.full.num_layers, np.nan)
  importance_L, losses_M = allotted.importance_L, measured.losses_M
  return Step(
    masked.number,
    masks,
    allotted.sparsity or removed_share(task.begin, masks),
    surgery.count(task.full, masks),
    masked.step.refitted,
    losses_M=np.array([np.nan]) if losses_M is None else losses_M,
    importance_L=nan_L if importance_L is None else importance_L,
    relative=allotted.relative or dict.fromkeys(UNITS, nan_L),
    scores=measured.scores,
    facts=allotted.facts,
  )


def decided(step: Step) -> Step:
  """The step that process 0 takes: one with other scores shall not go apart."""
  names = ("masks", "sparsity", "params", "scores")
  mine = {name: getattr(step, name) for name in names}
  return dataclasses.replace(step, **agreement.from_writer(mine))


def _done(method: Method, task: PruneTask, step: Step) -> bool:
  settings, width = task.settings, surgery.widths(step.masks)
  if step.ended:
    return True
  if settings.max_steps and step.number >= settings.max_steps:
    return True
  if task.target is None:
    return False
  if any(budgets.of_widths(task.full, width, s) > n for s, n in task.limits):
    return False
  left = budgets.of_widths(task.full, width, settings)
  if method.strict and not settings.trim:
    return left < task.target
  return left <= task.target


def _binding(task: PruneTask, step: Step) -> PruneTask:
  """The task, or the one of its limits that the largest share is left of.

  So several limits are met together: what goes in a step is priced in the
  budget that is furthest from its end.
  """
  if not task.limits:
    return task
  now, first = surgery.widths(step.masks), surgery.widths(task.begin)

  def share(limit: tuple[Prune, int]) -> float:
    settings, most = limit
    begin = budgets.of_widths(task.full, first, settings)
    left = budgets.of_widths(task.full, now, settings)
    return (left - most) / max(begin - most, 1)

  own = task.settings, task.target
  settings, target = max((own, *task.limits), key=share)
  return dataclasses.replace(task, settings=settings, target=target)


def _refits(task: PruneTask, step: Step) -> bool:
  every = task.settings.refit
  return every.isdigit() and step.number % int(every) == 0


def _check_finite(masked: Masked, measured: Measured) -> None:
  """Raises a UserError if what was measured is not finite."""
  importance_L = measured.importance_L
  if importance_L is not None and not np.isfinite(importance_L).all():
    raise UserError(
      f"the model's values at pruning step {masked.number} are not finite: try "
      "--config.model.dtype=float32"
    )
  for u, s_LU in measured.scores.items():
    wrong = masked.masks[u] & ~np.isfinite(s_LU)
    bad = np.flatnonzero(wrong.any(axis=tuple(range(1, wrong.ndim))))
    if len(bad):
      raise UserError(
        f"pruning step {masked.number}: scores of layer {bad[0]}'s "
        f"{'MLP' if u == 'F' else 'attention'} are not finite: give more "
        "calibration tokens (--config.calibration.samples), or "
        "--config.model.dtype=float32"
      )


def _check_stuck(task: PruneTask, step: Step, last_change: int) -> None:
  """Raises a UserError if steps remove nothing any more."""
  patience = math.ceil(1 / task.settings.step_size) + 1
  if task.target is not None and step.number - last_change >= patience:
    task, width = _binding(task, step), surgery.widths(step.masks)
    left = budgets.of_widths(task.full, width, task.settings)
    show = lambda amount: budgets.shown(amount, task.settings)
    raise UserError(
      f"pruning stopped at {show(left)}, above the target {show(task.target)}: "
      f"{patience} steps in a row removed nothing; lower "
      "--config.prune.amplitude or .step_size, or let more layers be pruned "
      "(--config.prune.attention_layers, .mlp_layers)"
    )
