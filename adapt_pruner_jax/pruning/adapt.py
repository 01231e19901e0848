"""Adapt-Pruner: scores and a schedule decide which units stay (2502.03460).

Within a stage units are only masked, in dense stacked coordinates, so that one
executable scores every step of every stage; at its end the kept units are
gathered into a smaller model (`surgery`).
"""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import schedule, surgery
from adapt_pruner_jax.pruning.exact_target import trim
from adapt_pruner_jax.pruning.ranking import ranking, remove
from adapt_pruner_jax.pruning.schedule import Modules
from adapt_pruner_jax.pruning.scores import group_scores, measure_step
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.targets import prunable_modules
from adapt_pruner_jax.pruning.task import Pruned, Samples, Step, record

# ---- A stage -----------------------------------------------------------------


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
) -> Pruned:
  """Prunes a model to `target` parameters, or for `settings.max_steps` steps.

  Args:
    config, params: the model as it is now.
    settings: the recipe; the target in it is not read.
    samples: gives the calibration tokens of each step.
    target: parameters to keep; None = no target.
    batch: calibration sequences at a time.
    mesh: devices; default one.
    full: sizes of the original model, if this one has been pruned before.
    kept: which of its units are left.
    seed: of random scores.
    after: the last step that an interrupted call has done.
    log: called with `record(step)` and the step, after each.

  Raises:
    UserError: a bad layer range, a target out of reach, or a model whose
      values are not finite.
  """
  full, kept = full or config, kept or surgery.everything(config)
  mesh = mesh or sharding.one_device()
  trace = []
  masks = surgery.to_masks(kept, full) if after is None else after.masks
  for step in steps(
    config,
    params,
    settings,
    samples,
    target,
    batch,
    mesh,
    full,
    kept,
    seed,
    after,
  ):
    trace.append(record(step))
    masks = step.masks
    if log is not None:
      log(trace[-1], step)
  left = surgery.to_kept(masks)
  config, params = surgery.gather(
    config, params, surgery.relative_to(kept, left), mesh
  )
  return Pruned(config, params, left, trace)


def steps(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  target: int | None,
  batch: int,
  mesh: Mesh,
  full: ModelConfig,
  kept: Kept,
  seed: int,
  after: Step | None = None,
) -> Iterator[Step]:
  """The steps of `prune`, one by one; the model itself does not change."""
  dense_config = surgery.dense(full)
  stacked = surgery.expand(config, params, kept, full, mesh)
  prunable = prunable_modules(full, settings)
  initial = surgery.widths(surgery.to_masks(kept, full))
  if after is None:
    zeros = {u: np.zeros(full.num_layers) for u in UNITS}
    size = model_config.count_params(config)
    after = Step(0, surgery.to_masks(kept, full), zeros, size)
  last_change, patience = after.number, math.ceil(1 / settings.step_size) + 1
  while not _done(after, settings, target):
    number = after.number + 1
    tokens_MBT, valid_MB = placement.minibatches(
      samples(number - 1), batch, mesh
    )
    found = measure_step(
      dense_config,
      stacked,
      placement.replicate(after.masks, mesh),
      tokens_MBT,
      valid_MB,
      kind=settings.group_importance,
      measure=settings.layer_importance,
      mesh=mesh,
    )
    found = jax.device_get(found)
    importance_L = np.asarray(found["importance_ML"], np.float64).sum(0)
    if not np.isfinite(importance_L).all():
      raise UserError(
        f"the model's values at pruning step {number} are not finite: try "
        "--config.model.dtype=float32"
      )
    relative = schedule.relative_importance(importance_L, prunable)
    wanted = schedule.next_sparsity(
      after.sparsity, relative, number, settings.step_size, settings.amplitude
    )
    wanted = {u: np.where(prunable[u], s, 0.0) for u, s in wanted.items()}
    scores = scores_of(found, after.masks, settings, seed, number)
    counts = _counts(
      full, settings, prunable, initial, after.masks, wanted, target
    )
    masks = remove(after.masks, ranking(scores, after.masks), counts)
    size = surgery.count(full, masks)
    if size < after.params:
      last_change = number
    after = Step(
      number,
      masks,
      wanted,
      size,
      losses_M=found["loss_M"],
      importance_L=importance_L,
      relative=relative,
      scores=scores,
    )
    yield after
    if number - last_change >= patience and target is not None:
      raise UserError(
        f"pruning stopped at {size:,} parameters, above the target {target:,}: "
        f"{patience} steps in a row removed nothing; lower "
        "--config.prune.amplitude or .step_size, or let more layers be pruned "
        "(--config.prune.attention_layers, .mlp_layers)"
      )


def _done(step: Step, settings: Prune, target: int | None) -> bool:
  if settings.max_steps and step.number >= settings.max_steps:
    return True
  if target is None:
    return False
  # The authors stop strictly below the target, and never trim.
  return step.params <= target if settings.trim else step.params < target


def scores_of(
  found: dict, masks: Masks, settings: Prune, seed: int, number: int
) -> dict[str, np.ndarray]:
  """Scores of the units at step `number`, from `importance.measure_step`."""
  kind = settings.group_importance
  if kind == "random":
    random = np.random.default_rng((seed % 2**32, number))
    return {u: random.random(mask.shape) for u, mask in masks.items()}
  return group_scores(found["salience"], masks, kind, settings.gqa_fold)


def _counts(
  full: ModelConfig,
  settings: Prune,
  prunable: Masks,
  initial: dict[str, np.ndarray],
  masks: Masks,
  wanted: Modules,
  target: int | None,
) -> dict[str, np.ndarray]:
  """Units to remove from each module, {"K": int [L], "F": ...}."""
  group = {"K": full.head_dim, "F": 1}
  round_to = {"K": 1, "F": settings.round_ffn_to}
  counts = {
    u: schedule.removals(
      initial[u],
      surgery.widths(masks)[u],
      np.where(prunable[u], wanted[u], np.nan),
      group[u],
      round_to[u],
    )
    for u in UNITS
  }
  if target is None or not settings.trim:
    return counts
  return trim(full, masks, counts, prunable, target, round_to["F"])
