"""What may be pruned, and how far: layers, the least size, the target."""

import math

import numpy as np

from adapt_pruner_jax.config import Prune, layer_range
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Limits


def prunable_modules(config: ModelConfig, settings: Prune) -> Masks:
  """Which modules may be pruned, {"K": bool [L], "F": ...}.

  Raises:
    UserError: none, or a range of layers that there is not.
  """
  ranges = {
    "K": ("prune.attention_layers", settings.attention_layers),
    "F": ("prune.mlp_layers", settings.mlp_layers),
  }
  cost = budgets.unit_cost(config, settings)
  # Layers that share keys and values would have to lose the same groups.
  held_L = np.array([config.is_held(i) for i in range(config.num_layers)])
  found = {
    u: np.isin(
      np.arange(config.num_layers), layer_range(text, config.num_layers, name)
    )
    & (np.array(config.units()[u]) > 0)
    & (cost[u] > 0)  # in a cache, an MLP has no part
    & ~(held_L & (u == "K"))
    for u, (name, text) in ranges.items()
  }
  if not any(modules.any() for modules in found.values()):
    raise UserError(
      "no layer is left that may be pruned: give more of them "
      "(--config.prune.attention_layers, .mlp_layers)"
    )
  return found


def smallest(config: ModelConfig, settings: Prune) -> int:
  """The budget with one unit (or one block of channels) left in each module."""
  prunable = prunable_modules(config, settings)
  least = settings.rounding()
  if settings.whole_halves:
    least = dict.fromkeys(UNITS, 0)
  units = {
    u: tuple(
      min(w, least[u]) if p else w
      for w, p in zip(config.units()[u], prunable[u], strict=True)
    )
    for u in UNITS
  }
  return budgets.count(config.with_units(units), settings)


def resolve_target(
  config: ModelConfig,
  settings: Prune,
  original: ModelConfig | None = None,
  beside: int = 0,
) -> int | None:
  """The limit of the budget (parameters, if not another) that `ratio`,
  `target_params` or `budget_value` sets; None if none of them is given.

  Args:
    config: of the model to prune.
    settings: say how far.
    original: the model before its vocabulary was cut, which counts towards the
      target; None = this one.
    beside: what the budget holds beside what `budgets.count` counts: the header
      of a file. It is not in the result.

  Raises:
    UserError: above the model's size, or below what can be reached.
  """
  if settings.budget == "quality":
    return smallest(config, settings)
  size = budgets.count(original or config, settings) + beside
  show = lambda amount: budgets.shown(amount, settings)
  if settings.ratio:
    target = math.floor(size * (1 - settings.ratio))
  elif settings.target_params:
    target = settings.target_params
  elif settings.budget_value:
    target = budgets.amount(settings.budget_value, settings)
  else:
    return None
  name = "budget_value" if settings.budget_value else "target_params"
  if target >= size:
    raise UserError(
      f"prune.{name}={budgets.number(target, settings)} is not below the "
      f"model's {show(size)}: nothing would be pruned"
    )
  left = budgets.count(config, settings) + beside
  if target >= left:  # the vocabulary alone
    return left - beside
  low = smallest(config, settings) + beside
  # SliceGPT narrows the residual stream, and knows its own limit.
  if target < low and settings.method != "slicegpt":
    raise _out_of_reach(settings, target, low, size)
  return target - beside


def _out_of_reach(
  settings: Prune, target: int, low: int, size: int
) -> UserError:
  show = lambda amount: budgets.shown(amount, settings)
  least = settings.rounding()
  units = f"{least['K']} KV group(s) and {least['F']} MLP channel(s)"
  if settings.whole_halves:
    units = "nothing"
  return UserError(
    f"a target of {show(target)} cannot be reached: with {units} left in each "
    f"layer that may be pruned, {budgets.number(low, settings)} of "
    f"{show(size)} remain "
    f"(prune.ratio={1 - low / size:.4f})"
  )


def resolve_limits(
  config: ModelConfig, settings: Prune, beside: int = 0
) -> Limits:
  """What `prune.limits` asks for: settings that count, and the most there may
  be. One that the model keeps already is none.

  Args:
    config: of the model to prune.
    settings: of the recipe.
    beside: as of `resolve_target`, of bytes.

  Raises:
    UserError: below what can be reached.
  """
  found = []
  for other, most in budgets.limits(settings):
    more = beside if other.budget == "bytes" else 0
    size = budgets.count(config, other) + more
    low = smallest(config, other) + more
    if most < low:
      raise _out_of_reach(other, most, low, size)
    if most < size:
      found.append((other, most - more))
  return tuple(found)
