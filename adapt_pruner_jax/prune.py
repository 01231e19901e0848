"""Adapt-Pruner: scores and a schedule decide which units stay (2502.03460).

Within a stage units are only masked, in dense stacked coordinates, so that one
executable scores every step of every stage; at its end the kept units are
gathered into a smaller model (`surgery`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax import (
  importance,
  model,
  sharding,
  sparsity,
  surgery,
)
from adapt_pruner_jax.axes import UNITS, Params
from adapt_pruner_jax.config import Prune, layer_range
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig
from adapt_pruner_jax.sparsity import Modules
from adapt_pruner_jax.surgery import Kept, Masks
from adapt_pruner_jax.trim import trim

# Calibration tokens of a pruning step (from 0), int32 [N, T].
Samples = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
  """A smaller model, and how it came about."""

  config: ModelConfig
  params: Params
  kept: Kept
  trace: list[dict]  # a JSON-able record a step, see `record`


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One pruning step; a stage goes on from its first five fields."""

  number: int  # from 1
  masks: Masks
  sparsity: Modules
  params: int  # after it
  # What was left at each refit between the steps so far, by step.
  refitted: dict[int, Masks] = dataclasses.field(default_factory=dict)
  losses_M: np.ndarray | None = None
  importance_L: np.ndarray | None = None  # summed over minibatches
  relative: Modules | None = None
  scores: dict[str, np.ndarray] | None = None  # before the removal


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
    zeros = {u: np.zeros(full.L) for u in UNITS}
    size = model.count_params(config)
    after = Step(0, surgery.to_masks(kept, full), zeros, size)
  last_change, patience = after.number, math.ceil(1 / settings.step_size) + 1
  while not _done(after, settings, target):
    number = after.number + 1
    tokens_MBT, valid_MB = sharding.minibatches(
      samples(number - 1), batch, mesh
    )
    found = importance.measure_step(
      dense_config,
      stacked,
      sharding.replicate(after.masks, mesh),
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
    relative = sparsity.relative_importance(importance_L, prunable)
    wanted = sparsity.next_sparsity(
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


def record(step: Step) -> dict:
  """A line of trace.jsonl; what a method does not measure (NaN) is None."""

  def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

  width = surgery.widths(step.masks)
  return {
    "step": step.number,
    "loss": number(np.mean(step.losses_M)),
    "params": int(step.params),
    "layers": [
      {
        "kv_groups": int(width["K"][i]),
        "ffn": int(width["F"][i]),
        "importance": number(step.importance_L[i]),
        "attn_importance": number(step.relative["K"][i]),
        "mlp_importance": number(step.relative["F"][i]),
        "attn_sparsity": float(step.sparsity["K"][i]),
        "mlp_sparsity": float(step.sparsity["F"][i]),
      }
      for i in range(len(width["K"]))
    ],
  }


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
  return importance.group_scores(
    found["salience"], masks, kind, settings.gqa_fold
  )


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
  group = {"K": full.H, "F": 1}
  round_to = {"K": 1, "F": settings.round_ffn_to}
  counts = {
    u: sparsity.removals(
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


# ---- Which units go ----------------------------------------------------------


def ranking(scores: Mapping[str, np.ndarray], masks: Masks) -> dict[str, list]:
  """Units left in each module, lowest score first (ties: lowest index)."""
  return {
    u: [
      np.flatnonzero(m)[np.argsort(s[m], kind="stable")]
      for s, m in zip(scores[u], masks[u], strict=True)
    ]
    for u in UNITS
  }


def remove(
  masks: Masks, order: dict[str, list], counts: Mapping[str, np.ndarray]
) -> Masks:
  """Masks without the first `counts` units of each module's `order`."""
  masks = {u: m.copy() for u, m in masks.items()}
  for u in UNITS:
    for mask, units, n in zip(masks[u], order[u], counts[u], strict=True):
      mask[units[:n]] = False
  return masks


# ---- Sizes and targets -------------------------------------------------------


def prunable_modules(config: ModelConfig, settings: Prune) -> Masks:
  """Which modules may be pruned, {"K": bool [L], "F": ...}.

  Raises:
    UserError: none, or a range of layers that there is not.
  """
  ranges = {
    "K": ("prune.attention_layers", settings.attention_layers),
    "F": ("prune.mlp_layers", settings.mlp_layers),
  }
  found = {
    u: np.isin(np.arange(config.L), layer_range(text, config.L, name))
    & (np.array(config.units()[u]) > 0)
    for u, (name, text) in ranges.items()
  }
  if not any(modules.any() for modules in found.values()):
    raise UserError(
      "no layer is left that may be pruned: give more of them "
      "(--config.prune.attention_layers, .mlp_layers)"
    )
  return found


def smallest(config: ModelConfig, settings: Prune) -> int:
  """Parameters with one unit (or one block of channels) left in each module."""
  prunable = prunable_modules(config, settings)
  least = {"K": 1, "F": settings.round_ffn_to}
  units = {
    u: tuple(
      min(w, least[u]) if p else w
      for w, p in zip(config.units()[u], prunable[u], strict=True)
    )
    for u in UNITS
  }
  return model.count_params(dataclasses.replace(config, **units))


def resolve_target(config: ModelConfig, settings: Prune) -> int | None:
  """Parameters to keep, from `ratio` or `target_params`; None if neither.

  Raises:
    UserError: above the model's size, or below what can be reached.
  """
  size = model.count_params(config)
  if settings.ratio:
    target = math.floor(size * (1 - settings.ratio))
  elif settings.target_params:
    target = settings.target_params
  else:
    return None
  if target >= size:
    raise UserError(
      f"prune.target_params={target:,} is not below the model's {size:,} "
      "parameters: nothing would be pruned"
    )
  low = smallest(config, settings)
  # SliceGPT narrows the residual stream, and knows its own limit.
  if target < low and settings.method != "slicegpt":
    raise UserError(
      f"a target of {target:,} parameters cannot be reached: with one KV group "
      f"and {settings.round_ffn_to} MLP channel(s) left in each layer that may "
      f"be pruned, {low:,} of {size:,} remain (prune.ratio="
      f"{1 - low / size:.4f})"
    )
  return target
