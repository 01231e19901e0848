"""One width for all layers, so that a stock runtime opens what is left.

Every layer keeps as many KV groups, and as many MLP channels, each its own
best: the two numbers that meet a step's budget at the least score.
"""

from collections.abc import Sequence

import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  allotment,
  budgets,
  choice,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
  Scores,
)


def one_width(masked: Masked, measured: Measured) -> Allotted:
  """As many units of each layer, by `prune.ranking.step_size` and `.cap`.

  Raises:
    UserError: layers of several widths, or none may lose a unit any more.
  """
  task, settings, full = masked.task, masked.task.settings, masked.task.full
  counts = choose(
    full,
    measured.scores,
    masked.masks,
    targets.prunable_modules(full, settings),
    max(allotment.ranking_aim(masked), task.target or 0),
    settings,
  )
  if not any(n.any() for n in counts.values()):
    raise allotment.nothing_left(masked)
  return Allotted(counts)


def choose(
  full: ModelConfig,
  scores: Scores,
  masks: Masks,
  prunable: Masks,
  aim: int,
  settings: Prune,
) -> Counts:
  """Units to remove from each module, {"K": int [L], "F": ...}.

  Those that lose the least score of what leaves no more than `aim` of the
  budget; where none does, as `prune.ranking.cap` sets an end, those that leave
  the least.

  Args:
    scores: of the units; those of removed ones mean nothing.
    prunable: modules that may lose units, bool [L] each.

  Raises:
    UserError: layers that may be pruned have several widths.
  """
  left, curves = surgery.widths(masks), budgets.curves(full, settings)
  layers = {u: np.flatnonzero(prunable[u]) for u in UNITS}
  ways, lost, gain = {}, {}, {}
  for u in UNITS:
    width = _same(left[u][layers[u]], u)
    ways[u] = _ways(width, settings.rounding()[u], settings.ranking.cap)
    of_units = [choice.in_order(scores[u][i], masks[u][i]) for i in layers[u]]
    lost_W = np.cumsum([0.0, *sum(of_units, np.zeros(width))])
    taken_W = sum((curves[u][i] for i in layers[u]), np.zeros(width + 1, int))
    lost[u] = lost_W[ways[u]]
    gain[u] = taken_W[width] - taken_W[width - ways[u]]
  lost_KF = lost["K"][:, None] + lost["F"]
  gain_KF = gain["K"][:, None] + gain["F"]
  fits_KF = budgets.of_widths(full, left, settings) - gain_KF <= aim
  if not fits_KF.any():
    fits_KF = gain_KF == gain_KF.max()
  best = np.argmin(np.where(fits_KF, lost_KF, np.inf))
  counts = {u: np.zeros(full.num_layers, np.int64) for u in UNITS}
  for u, way in zip(UNITS, np.unravel_index(best, fits_KF.shape), strict=True):
    counts[u][layers[u]] = ways[u][way]
  return counts


def _same(widths: Sequence[int], unit: str) -> int:
  """The width of these layers, 0 without any."""
  found = sorted(set(map(int, widths)))
  if len(found) > 1:
    what = "KV groups" if unit == "K" else "MLP channels"
    raise UserError(
      "--config.prune.allotment=one_width: the layers that may be pruned have "
      f"{', '.join(map(str, found))} {what}; give "
      "--config.prune.allotment=ranking"
    )
  return found[0] if found else 0


def _ways(width: int, block: int, cap: float) -> np.ndarray:
  """How many units may go of each layer, rising from 0.

  What is left is whole blocks, at least one; no more than a share of `cap`
  goes, or the first block.
  """
  first = width % block or block
  gone = np.arange(first, width - block + 1, block)
  return np.array([0, *gone[(gone <= cap * width) | (gone == first)]])
