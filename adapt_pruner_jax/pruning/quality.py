"""A quality to keep: pruning goes on while the loss allows it.

After each step the masked model's loss is measured on windows that no step
reads. The first step that is too much is halved again and again: the result is
the smallest model that this run passes whose loss is at most `limit` nats a
token above the model's that it began with. Or its accuracy is measured on
questions with choices, of which at most the share `limit` may be lost.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.data.tuning_questions import TuningQuestions
from adapt_pruner_jax.distributed import agreement, placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  choice,
  ends,
  exact_target,
  scores,
  search,
  surgery,
)
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Masked, Quality, Step, removed_share
from adapt_pruner_jax.training import output_loss

HALVINGS = 6  # of the step that is too much


def asked(settings: Prune, opened: Any) -> Quality | None:
  """The quality that a recipe wants to keep, if it does.

  Args:
    settings: of the recipe.
    opened: questions, or windows as `batch(step)`; None = nothing is kept.
  """
  if opened is None:
    return None
  if isinstance(opened, TuningQuestions):
    return Quality(settings.budget_value, None, opened)
  return Quality(settings.budget_value, opened.batch(0))


def begun(masked: Masked) -> float:
  """The loss that the prune starts from, nats a token, or its accuracy; 0 if
  none is kept.

  Raises:
    UserError: no question is answered right.
  """
  task = masked.task
  if task.quality is None:
    return 0.0
  # Not what refits have made of it since, where a prune goes on.
  stacked = task.stacked()
  if task.quality.questions is None:
    return loss(masked, stacked, task.begin)
  found = accuracy(masked, stacked, task.begin)
  if not found:
    raise UserError(
      "--config.calibration.tuning: the model answers none of the questions "
      "right, so that no accuracy can be kept; give others, or more"
    )
  return found


def _rise(masked: Masked, masks: Masks, before: float) -> float:
  """How much worse a masked model is than `begun`, as `Quality.limit`."""
  if masked.task.quality.questions is None:
    return loss(masked, masked.stacked, masks) - before
  return 1 - accuracy(masked, masked.stacked, masks) / before


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
  rise = lambda masks: _rise(masked, masks, before)
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
  params = surgery.count(masked.task.full, masks)
  if params == masked.step.params and masked.number == 1:
    raise UserError(
      f"--config.prune.budget_value={limit}: no smaller model keeps this: all "
      f"of the first step costs {found:.4f}, and {high:.1%} of it still too "
      "much; give more"
    )
  return dataclasses.replace(
    step,
    masks=masks,
    rise=value,
    ended=True,
    sparsity=removed_share(masked.task.begin, masks),
    params=params,
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
  return agreement.from_writer(
    float(np.average(losses_M, weights=rows_M[real]))
  )


def accuracy(masked: Masked, stacked: Params, masks: Masks) -> float:
  """The share of the quality's questions that a masked model answers right."""
  task, questions = masked.task, masked.task.quality.questions
  tokens = questions.tokens_NT, task.batch, task.mesh
  tokens_MBT, valid_MB = placement.minibatches(*tokens)
  found_MBT = _log_probs(
    surgery.dense(task.full),
    stacked,
    placement.replicate(masks, task.mesh),
    tokens_MBT,
    mesh=task.mesh,
  )
  real_NT = np.asarray(found_MBT)[np.asarray(valid_MB)]
  return agreement.from_writer(questions.accuracy(real_NT))


@partial(jax.jit, static_argnames=("config", "mesh"))
def _log_probs(
  config: ModelConfig,
  stacked: Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  *,
  mesh: Mesh,
) -> jax.Array:
  """Of each token but a row's first, by a masked model, [M, B, T - 1].

  Args:
    config, stacked, masks, tokens_MBT, mesh: as of `search.last_stream`.
  """
  x_MBTD = search.last_stream(config, stacked, masks, tokens_MBT, mesh=mesh)
  matrix = ends.output(config, stacked, mesh)

  def one(minibatch):
    x_BTD, tokens_BT = minibatch
    x_BTD = ends.normed(config, stacked, x_BTD[:, :-1])
    args = matrix, x_BTD, tokens_BT[:, 1:]
    return output_loss.token_log_probs(config, mesh, *args)[0]

  return sharding.whole(jax.lax.map(one, (x_MBTD, tokens_MBT)), mesh)
