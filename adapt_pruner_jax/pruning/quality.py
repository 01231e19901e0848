"""A quality to keep: pruning goes on while the loss allows it.

After each step the masked model's loss is measured on windows that no step
reads. The first step that is too much is halved again and again: the result is
the smallest model that this run passes whose loss is at most `limit` nats a
token above the model's that it began with.
"""

import dataclasses

import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.pruning import choice, exact_target, scores, surgery
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Masked, Step, removed_share

HALVINGS = 6  # of the step that is too much


def begun(masked: Masked) -> float:
  """The loss that the prune starts from, nats a token; 0 if none is kept."""
  task = masked.task
  if task.quality is None:
    return 0.0
  # Not what refits have made of it since, where a prune goes on.
  stacked = surgery.expand(
    task.config, task.params, task.kept, task.full, task.mesh
  )
  return loss(masked, stacked, task.begin)


def held(masked: Masked, step: Step, before: float) -> Step:
  """The step, or as much of it as the quality allows, which then ends it.

  Args:
    masked: the model before the step.
    step: its masks and scores.
    before: from `begun`.

  Raises:
    UserError: nothing may go.
  """
  if masked.task.quality is None:
    return step
  limit = masked.task.quality.limit
  rise = lambda masks: loss(masked, masked.stacked, masks) - before
  found = rise(step.masks)
  if found <= limit:
    return dataclasses.replace(step, rise=found)
  order = choice.order(step.scores, masked.masks)
  was, now = surgery.widths(masked.masks), surgery.widths(step.masks)
  best, low, high = (masked.masks, masked.step.rise), 0.0, 1.0
  for _ in range(HALVINGS):
    share = (low + high) / 2
    counts = {u: np.floor((was[u] - now[u]) * share).astype(int) for u in UNITS}
    rounding = masked.task.settings.rounding()
    counts = exact_target.rounded(counts, masked.masks, rounding)
    masks = choice.remove(masked.masks, order, counts)
    value = rise(masks)
    if value <= limit:
      best, low = (masks, value), share
    else:
      high = share
  masks, value = best
  if masks is masked.masks and masked.number == 1:
    raise UserError(
      f"--config.prune.budget_value={limit}: no smaller model keeps this: "
      f"all of the first step costs {found:.4f} nats, and {share:.1%} of it "
      "still more than that; give more nats"
    )
  return dataclasses.replace(
    step,
    masks=masks,
    rise=value,
    ended=True,
    sparsity=removed_share(masked.task.begin, masks),
    params=surgery.count(masked.task.full, masks),
  )


def loss(masked: Masked, stacked: Params, masks: Masks) -> float:
  """Nats a token of a masked model on the windows of the quality.

  By the same program as a step's layer importance.
  """
  task, step = masked.task, dataclasses.replace(masked.step, masks=masks)
  seen = dataclasses.replace(masked, stacked=stacked, step=step)
  tokens_NT = task.quality.tokens_NT
  losses_M = scores.measure(seen, tokens_NT, kind="random").losses_M
  batch = min(task.batch, len(tokens_NT))
  rows_M = np.clip(len(tokens_NT) - batch * np.arange(len(losses_M)), 0, batch)
  real = rows_M > 0
  losses_M = np.asarray(losses_M, np.float64)[real]
  return float(np.average(losses_M, weights=rows_M[real]))
