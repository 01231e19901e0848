"""LLM-Pruner, block-wise: the same share of every layer (arXiv 2305.11627).

Scores are those of `importance` (`prune.group_importance`; published: Taylor of
first order). Where `prune.attention_layers` or `prune.mlp_layers` is empty, the
first eighth and the last sixteenth of the layers are spared: as published,
layers 4 to 29 of 32.

With fewer KV heads than query heads the published code credits query heads to
the wrong KV groups; here they count for the group that they attend with
(`prune.gqa_fold="reference"` gives the published scores), and the code's
second iterative step, which breaks such models, works.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import adapt, ranking, schedule, surgery, task
from adapt_pruner_jax.pruning.baselines import budget
from adapt_pruner_jax.pruning.baselines.budget import Counts
from adapt_pruner_jax.pruning.scores import measure_step
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.targets import prunable_modules
from adapt_pruner_jax.pruning.task import Pruned, Samples, Step


def prune(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  *,
  target: int | None = None,
  batch: int = 32,
  mesh: Mesh | None = None,
  full: ModelConfig | None = None,
  kept: Kept | None = None,
  seed: int = 0,
  after: Step | None = None,
  log: Callable[[dict, Step], None] | None = None,
  ratio: float | None = None,
) -> Pruned:
  """Prunes a model to `target` parameters in `settings.llm_pruner_steps`.

  Arguments as of `prune.prune`; an interrupted call starts again.

  Args:
    ratio: prune this share of the units of the layers that are not spared,
      whatever size results.

  Raises:
    UserError: a bad layer range, or a target out of reach.
  """
  budget.check_target(target, ratio)
  full, kept, mesh = budget.defaults(config, full, kept, mesh)
  settings = spared(settings, full.num_layers)
  prunable = prunable_modules(full, settings)
  before = masks = surgery.to_masks(kept, full)
  if ratio is None:
    least = {"K": 1, "F": settings.round_ffn_to}
    budget.check_reachable(full, masks, prunable, target, least)
    size = surgery.count(full, masks)
    targets = schedule.stage_targets(size, target, settings.llm_pruner_steps)
  stacked = surgery.expand(config, params, kept, full, mesh)
  trace = []
  for number in range(1, settings.llm_pruner_steps + 1):
    found, scores = _score(
      full, stacked, masks, settings, samples, number, batch, mesh, seed
    )
    counts_at = counter(full, before, masks, scores, prunable, settings)
    if ratio is None:
      masks = budget.solve(
        full,
        masks,
        scores,
        counts_at,
        prunable,
        targets[number - 1],
        settings.round_ffn_to,
      )
    else:
      order = ranking.ranking(scores, masks)
      counts = counts_at(ratio * number / settings.llm_pruner_steps)
      masks = ranking.remove(masks, order, counts)
    step = budget.step(
      number,
      full,
      before,
      masks,
      surgery.count(full, masks),
      losses_M=found["loss_M"],
      scores=scores,
    )
    trace.append(task.record(step))
    if log is not None:
      log(trace[-1], step)
  left = surgery.to_kept(masks)
  config, params = surgery.gather(
    config, params, surgery.relative_to(kept, left), mesh
  )
  return Pruned(config, params, left, trace)


def spared(settings: Prune, L: int) -> Prune:
  """Settings with the published layer range where none is given."""
  inside = f"{L // 8}:{L - L // 16}"
  return dataclasses.replace(
    settings,
    attention_layers=settings.attention_layers or inside,
    mlp_layers=settings.mlp_layers or inside,
  )


def counter(
  full: ModelConfig,
  before: Masks,
  masks: Masks,
  scores: dict[str, np.ndarray],
  prunable: Masks,
  settings: Prune,
) -> Callable[[float], Counts]:
  """How many units each module loses so that a ratio of `before` is gone.

  In each layer the same share, whole KV groups rounded down, but one unit
  stays. With "global" ranking the lowest of all units, unnormalised and each
  counted as one; a KV group's score is a sum over many more weights than a
  channel's, so that hardly any group goes.
  """
  initial, left = surgery.widths(before), surgery.widths(masks)

  def each_layer(ratio: float) -> Counts:
    counts = {}
    for u, size in (("K", full.head_dim), ("F", 1)):
      keep = np.trunc(initial[u] * size * (1 - ratio)).astype(int)
      gone = np.minimum((left[u] * size - keep) // size, left[u] - 1)
      counts[u] = np.where(prunable[u], np.maximum(gone, 0), 0)
    return counts

  there = {u: masks[u] & prunable[u][:, None] for u in UNITS}
  listed = np.sort(np.concatenate([scores[u][there[u]] for u in UNITS]))
  total = sum(before[u][prunable[u]].sum() for u in UNITS)

  def everywhere(ratio: float) -> Counts:
    gone = len(listed) - int(total * (1 - ratio))
    threshold = listed[gone - 1] if gone > 0 else -np.inf
    return {
      u: np.minimum(
        (there[u] & (scores[u] <= threshold)).sum(axis=1),
        np.maximum(left[u] - 1, 0),
      )
      for u in UNITS
    }

  return everywhere if settings.llm_pruner_ranking == "global" else each_layer


def _score(full, stacked, masks, settings, samples, number, batch, mesh, seed):
  """What `importance.measure_step` finds, and the scores of the units."""
  tokens_MBT, valid_MB = placement.minibatches(samples(number - 1), batch, mesh)
  found = measure_step(
    surgery.dense(full),
    stacked,
    placement.replicate(masks, mesh),
    tokens_MBT,
    valid_MB,
    kind=settings.group_importance,
    measure=settings.layer_importance,
    mesh=mesh,
  )
  found = jax.device_get(found)
  return found, adapt.scores_of(found, masks, settings, seed, number)
