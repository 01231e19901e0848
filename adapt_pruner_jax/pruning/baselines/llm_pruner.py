"""LLM-Pruner, block-wise: the same share of every layer (arXiv 2305.11627).

Scores are those of `scores` (`prune.group_importance`; published: Taylor of
first order). The methods `magnitude` and `random` are the same with other
scores, always by layers. Where `prune.attention_layers` or `prune.mlp_layers`
is empty, the first eighth and the last sixteenth of the layers are spared: as
published, layers 4 to 29 of 32.

With fewer KV heads than query heads the published code credits query heads to
the wrong KV groups; here they count for the group that they attend with
(`prune.gqa_fold="reference"` gives the published scores), and the code's
second iterative step, which breaks such models, works.
"""

import dataclasses

import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning import (
  allotment,
  choice,
  exact_target,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
  PruneTask,
  Scores,
)


def prepare(task: PruneTask) -> PruneTask:
  """The task with the published layer range where none is given.

  Raises:
    UserError: a target out of reach.
  """
  L = task.full.num_layers
  inside = f"{L // 8}:{L - L // 16}"

  def ranged(settings: Prune) -> Prune:
    return dataclasses.replace(
      settings,
      attention_layers=settings.attention_layers or inside,
      mlp_layers=settings.mlp_layers or inside,
    )

  limits = tuple((ranged(settings), most) for settings, most in task.limits)
  task = dataclasses.replace(
    task, settings=ranged(task.settings), limits=limits
  )
  for settings, target in ((task.settings, task.target), *limits):
    counted = dataclasses.replace(task, settings=settings, target=target)
    exact_target.check_reachable(counted, settings.rounding())
  return task


def allot(masked: Masked, measured: Measured) -> Allotted:
  """The same share of each layer, or with "global" the lowest units of all.

  In `prune.uniform.steps` steps, as `allotment.uniform`.
  """
  task = masked.task
  if task.settings.llm_pruner.ranking == "layer":
    return allotment.uniform(masked, measured)
  counts_at = everywhere(task, masked.masks, measured.scores)
  steps = task.settings.uniform.steps
  return allotment.by_ratio(masked, measured, counts_at, steps)


def everywhere(
  task: PruneTask, masks: Masks, scores: Scores
) -> exact_target.CountsAt:
  """Counts at which the lowest units of all modules together are gone.

  Scores are not normalised and each unit counts as one; a KV group's is a sum
  over many more weights than a channel's, so that hardly any group goes. One
  unit of each module stays.
  """
  prunable = targets.prunable_modules(task.full, task.settings)
  left, begin = surgery.widths(masks), surgery.widths(task.begin)
  ranked = {
    u: [
      choice.in_order(s, m)[: len(m.T) * may]
      for s, m, may in zip(scores[u], masks[u], prunable[u], strict=True)
    ]
    for u in UNITS
  }
  listed = np.sort(np.concatenate([s for u in UNITS for s in ranked[u]]))
  total = sum(begin[u][prunable[u]].sum() for u in UNITS)

  def counts_at(ratio: float) -> Counts:
    gone = len(listed) - int(total * (1 - ratio))
    threshold = listed[gone - 1] if gone > 0 else -np.inf
    return {
      u: np.minimum(
        [np.searchsorted(s, threshold, side="right") for s in ranked[u]],
        np.maximum(left[u] - 1, 0),
      )
      for u in UNITS
    }

  return counts_at
