"""Sizes, tokens and FLOPs of a run: arithmetic on the recipe and the shapes."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from adapt_pruner_jax.config import RANKED, Config, Prune
from adapt_pruner_jax.models import flops as flops_
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, exact_target, schedule
from adapt_pruner_jax.pruning.targets import prunable_modules, smallest
from adapt_pruner_jax.pruning.task import Limits


def stage_table(
  config: Config, full: ModelConfig, target: int | None, limits: Limits = ()
) -> list[dict]:
  """Lists the stages with their sizes, steps, tokens and FLOPs.

  Args:
    config: the recipe.
    full: the original model.
    target: of the budget at the end; None = as `prune.max_steps` leaves.
    limits: further budgets at the end.

  Returns:
    A row a stage; its "config" is the model behind the stage, pruned evenly.
  """
  settings = config.prune
  size, number = budgets.count(full, settings), settings.stages
  targets = [even_target(full, settings)]
  if target is not None:
    targets = schedule.stage_targets(size, target, number)
  per_step = config.data.step_tokens
  total = -(-config.train.tokens // per_step)
  ends = schedule.stage_ends(total, number, config.train.data_share)
  rows, now, trained = [], full, 0
  for i, (aim, last) in enumerate(zip(targets, ends, strict=True)):
    after = evenly(full, settings, aim, _at_stage(full, limits, i, number))
    needed = prune_steps(now, after, full, settings)
    steps = min(needed, settings.max_steps or needed)
    rows.append(
      {
        "stage": i + 1,
        "config": after,
        "params": model_config.count_params(after),
        "kv_groups": _spread(after.kv_groups),
        "ffn": _spread(after.ffn_widths),
        "steps_needed": needed,
        "prune_steps": steps,
        "train_steps": last - trained,
        "train_tokens": (last - trained) * per_step,
        "prune_flops": steps * scoring_flops(full, config)
        + refit_flops(after, now, config),
        "train_flops": (last - trained)
        * per_step
        * training_flops(after, full, config),
      }
    )
    now, trained = after, last
  return rows


def even_target(full: ModelConfig, settings: Prune) -> int:
  """Counts the parameters that `max_steps` steps leave, without a target."""
  size = model_config.count_params(full)
  if settings.pair()[0] in RANKED:
    gone = int(size * settings.max_steps * settings.ranking.step_size)
  else:
    share = min(settings.max_steps * settings.step_size, 1)
    gone = int(_prunable_params(full, settings) * share)
  return max(size - gone, smallest(full, settings))


def _at_stage(
  full: ModelConfig, limits: Limits, stage: int, stages: int
) -> Limits:
  ends = lambda s, n: schedule.stage_targets(budgets.count(full, s), n, stages)
  return tuple((s, ends(s, n)[stage]) for s, n in limits)


def evenly(
  full: ModelConfig, settings: Prune, target: int, limits: Limits = ()
) -> ModelConfig:
  """Finds the largest model not above `target` that loses evenly everywhere.

  KV groups are few: where their rounding takes too much or too little, the MLPs
  make up for it.
  """
  prunable = prunable_modules(full, settings)
  both, least = ((settings, target), *limits), 1 - settings.whole_halves

  def cut(unit: str, share: float, rounding: Callable = math.floor) -> tuple:
    block = settings.rounding()[unit]
    return tuple(
      min(n, max(rounding(n * (1 - share) / block), least) * block)
      if may
      else n
      for n, may in zip(full.units()[unit], prunable[unit], strict=True)
    )

  def made(K: tuple, share: float) -> ModelConfig:
    return dataclasses.replace(full, kv_groups=K, ffn_widths=cut("F", share))

  def fits(config: ModelConfig) -> bool:
    return all(budgets.count(config, s) <= n for s, n in both)

  share = _least(lambda s: fits(made(cut("K", s), s)))
  found = []
  for rounding in math.floor, math.ceil:
    K = cut("K", share, rounding)
    found.append(made(K, _least(lambda s, K=K: fits(made(K, s)))))
  return max(filter(fits, found), key=model_config.count_params)


def prune_steps(
  before: ModelConfig, after: ModelConfig, full: ModelConfig, settings: Prune
) -> int:
  """Counts the pruning steps of a stage.

  Each grows the mean sparsity by `step_size` or, of one ranking, removes
  `ranking.step_size` of the original's parameters.

  Args:
    before, after: the stage.
    full: the original model.
    settings: of the recipe.
  """
  allotment, _ = settings.pair()
  gone = model_config.count_params(before) - model_config.count_params(after)
  if allotment in RANKED:
    share = gone / model_config.count_params(full)
    # Evenly pruned, a stage ends a little below what a ranking ends at.
    return max(math.ceil(share / settings.ranking.step_size - 1e-3), 1)
  if allotment == "adapt":
    share = gone / max(_prunable_params(before, settings), 1)
    return max(math.ceil(share / settings.step_size - 1e-9), 1)
  if allotment in ("uniform", "llm_pruner"):
    return settings.uniform.steps
  if allotment == "surgeon":
    return settings.surgeon.shots
  return settings.search.steps if allotment == "search" else 1


def scoring_flops(config: ModelConfig, recipe: Config) -> float:
  """Counts the FLOPs of one pruning step, always at the original's size.

  A search runs each candidate forward, and the dense output matrix beside it.

  With gradients a layer runs forward twice and backward once, the output
  matrix forward once and backward for its input. Curvature and Fisher go
  backward to activations only, and curvature has Gram matrices. The surgeon has
  those of both sides of its matrices, and measures them a second time to update
  the weights.
  """
  layer, head = flops_.forward_flops(config, recipe.calibration.seq_len)
  each = 4 * layer + 2 * head
  allotment, score = recipe.prune.pair()
  if score == "curvature":
    widths = *config.head_channels(), *config.ffn_widths
    grams = [n**2 + config.hidden_size**2 for n in widths]
    each = 3 * layer + 2 * head + 2 * sum(grams)
  elif score == "surgeon":
    each = 2 * (3 * layer + 2 * head + _factors(config, recipe))
  elif score == "fisher":
    each = 3 * layer + 2 * head
  elif not score.startswith("taylor"):
    each = layer + head
  total = recipe.calibration.samples * recipe.calibration.seq_len * each
  if allotment == "search":
    tried = recipe.prune.search
    total += tried.evaluations * tried.tokens * (layer + 2 * head)
  return total


def _factors(config: ModelConfig, recipe: Config) -> int:
  """FLOPs a token of all factors that the surgeon measures."""
  D, readers = config.hidden_size, recipe.prune.surgeon.matrices == "all"
  total = 0
  for K, F in zip(config.kv_groups, config.ffn_widths, strict=True):
    keys, heads = K * config.head_dim, K * config.queries_per_group
    heads *= config.head_dim
    total += heads**2 + F**2 + 2 * D**2
    if readers:
      total += heads**2 + 2 * keys**2 + 2 * F**2 + 2 * D**2
  return 2 * total


def refit_flops(
  config: ModelConfig, teacher: ModelConfig, recipe: Config
) -> float:
  """Counts the FLOPs of a refit by the loss; least squares take few.

  Args:
    config: what is refitted.
    teacher: the model before the prune.
    recipe: its passes and windows.
  """
  of = recipe.calibration
  tokens = recipe.prune.refit_passes * of.refit_samples * of.seq_len
  each = flops_.training_flops(config, of.seq_len)
  return tokens * (each + sum(flops_.forward_flops(teacher, of.seq_len)))


def training_flops(
  config: ModelConfig, teacher: ModelConfig, recipe: Config
) -> float:
  """Counts the FLOPs of training on one token, as `flops.training_flops`."""
  settings, length = recipe.train, recipe.data.seq_len
  taught_by = teacher if settings.distill_alpha else None
  frozen = bool(settings.lora_rank)
  return flops_.training_flops(config, length, taught_by, frozen)


def _prunable_params(config: ModelConfig, settings: Prune) -> int:
  cost, prunable = (
    budgets.unit_cost(config, exact_target.PARAMS),
    prunable_modules(config, settings),
  )
  return sum(
    int((cost[u] * config.units()[u])[prunable[u]].sum()) for u in UNITS
  )


def _least(is_enough: Callable[[float], bool]) -> float:
  """Finds the smallest share in [0, 1] that is enough, by bisection."""
  low, high = 0.0, 1.0
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (low, middle) if is_enough(middle) else (middle, high)
  return high


def _spread(widths: Sequence[int]) -> str:
  low, high = min(widths), max(widths)
  return f"{low:,}" if low == high else f"{low:,} - {high:,}"
