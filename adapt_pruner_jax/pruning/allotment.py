"""How much of each module goes in a step: three ways, for any unit score.

adapt    the paper's schedule: more where a layer turns its input less
uniform  the same share of every module
ranking  one ranking of all units by score per parameter
"""

import dataclasses
import math

import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  budgets,
  choice,
  exact_target,
  schedule,
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

# ---- Adapt-Pruner's schedule -------------------------------------------------


def adapt(masked: Masked, measured: Measured) -> Allotted:
  """Adapt-Pruner's schedule (arXiv 2502.03460, section 3), trimmed at the end.

  Each module has a sparsity that grows by `prune.step_size` a step, more in
  unimportant layers; what it asks for is removed. Without `prune.trim` the last
  step is whole, as the authors' code leaves it.
  """
  task, settings, full = masked.task, masked.task.settings, masked.task.full
  prunable = targets.prunable_modules(full, settings)
  relative = schedule.relative_importance(measured.importance_L, prunable)
  wanted = schedule.next_sparsity(
    masked.step.sparsity,
    relative,
    masked.number,
    settings.step_size,
    settings.amplitude,
  )
  # A limit that prices no MLPs lets them wait where they are.
  before = masked.step.sparsity
  wanted = {u: np.where(prunable[u], s, before[u]) for u, s in wanted.items()}
  initial, left = surgery.widths(task.begin), surgery.widths(masked.masks)
  group = {"K": full.head_dim, "F": 1}
  rounding = settings.rounding()
  counts = {
    u: schedule.removals(
      initial[u],
      left[u],
      np.where(prunable[u], wanted[u], np.nan),
      group[u],
      rounding[u],
    )
    for u in UNITS
  }
  if task.target is not None and settings.trim:
    counts = exact_target.trim(
      full, masked.masks, counts, prunable, task.target, settings
    )
  return Allotted(counts, wanted, relative, measured.importance_L)


# ---- The same share of every module ------------------------------------------


def uniform(masked: Masked, measured: Measured) -> Allotted:
  """The same share of the channels of every module that may be pruned.

  In `prune.uniform.steps` steps of equally many parameters; whole KV groups,
  rounded down, and one unit stays. Layers of one width stay so without
  `prune.trim`, which otherwise takes the last units from some of them.
  """
  share = same_share(masked.task, masked.masks)
  settings = masked.task.settings
  return by_ratio(
    masked, measured, share, settings.uniform.steps, exact=settings.trim
  )


def same_share(task: PruneTask, masks: Masks) -> exact_target.CountsAt:
  """Counts at which a ratio of what was there at first is gone, everywhere.

  Args:
    masks: units that are left now.
  """
  full = task.full
  initial, left = surgery.widths(task.begin), surgery.widths(masks)
  prunable = targets.prunable_modules(full, task.settings)

  def counts_at(ratio: float) -> Counts:
    counts = {}
    for u, size in (("K", full.head_dim), ("F", 1)):
      keep = np.trunc(initial[u] * size * (1 - ratio)).astype(int)
      gone = np.minimum((left[u] * size - keep) // size, left[u] - 1)
      counts[u] = np.where(prunable[u], np.maximum(gone, 0), 0)
    return counts

  return counts_at


def step_goal(masked: Masked, steps: int) -> int:
  """What is left of the budget behind the step under way.

  Args:
    masked: before it.
    steps: of equally much, in which the task's target is met.

  Raises:
    UserError: there is no target.
  """
  task = masked.task
  exact_target.check_target(task)
  begin = surgery.widths(task.begin)
  size = budgets.of_widths(task.full, begin, task.settings)
  goals = schedule.stage_targets(size, task.target, steps)
  return goals[min(masked.number, steps) - 1]


def by_ratio(
  masked: Masked,
  measured: Measured,
  counts_at: exact_target.CountsAt,
  steps: int = 1,
  exact: bool = True,
) -> Allotted:
  """The least ratio at which the step's target is met, trimmed to it.

  Args:
    masked, measured: as an allotment gets them.
    counts_at: units that go at a ratio in [0, 1].
    steps: of equally many parameters, in which the task's target is met.
    exact: to within a unit; else every module as the ratio says.

  Raises:
    UserError: there is no target, or no ratio reaches it.
  """
  task, settings = masked.task, masked.task.settings
  goal = step_goal(masked, steps)
  prunable = targets.prunable_modules(task.full, settings)
  left = exact_target.solve(
    task.full,
    masked.masks,
    measured.scores,
    counts_at,
    prunable,
    goal,
    settings,
    exact,
  )
  was, now = surgery.widths(masked.masks), surgery.widths(left)
  return Allotted({u: was[u] - now[u] for u in UNITS})


# ---- One ranking -------------------------------------------------------------


def ranking(masked: Masked, measured: Measured) -> Allotted:
  """The units that are worth least per parameter, wherever they are.

  A step removes `prune.ranking.step_size` of the original's parameters, and at
  most `prune.ranking.cap` of a module's units, which keeps the assumption of
  independent units honest.

  Raises:
    UserError: no module may lose a unit any more.
  """
  task, settings, full = masked.task, masked.task.settings, masked.task.full
  counts = choose(
    full,
    measured.scores,
    masked.masks,
    targets.prunable_modules(full, settings),
    ranking_aim(masked),
    task.target or 0,
    cap=settings.ranking.cap,
    settings=settings,
    halves=measured.halves,
  )
  if not any(n.any() for n in counts.values()):
    raise nothing_left(masked)
  worth = _worth(full, measured.scores, masked.masks, settings)
  importance_L = np.mean([np.nan_to_num(worth[u]) for u in UNITS], axis=0)
  return Allotted(counts, relative=worth, importance_L=importance_L)


def ranking_aim(masked: Masked) -> int:
  """What a step by `prune.ranking.step_size` leaves of the budget."""
  full, settings = masked.task.full, masked.task.settings
  size = budgets.count(full, settings)
  now = budgets.of_widths(full, surgery.widths(masked.masks), settings)
  return now - math.ceil(size * settings.ranking.step_size)


def nothing_left(masked: Masked) -> UserError:
  """What is said where no module may lose a unit any more."""
  return UserError(
    f"pruning stopped at {masked.step.params:,} parameters: nothing more can "
    "be removed from the layers that may be pruned; "
    + (
      "give more of them (--config.prune.attention_layers, .mlp_layers) or "
      "a larger target"
      if masked.task.target
      else "lower --config.prune.max_steps"
    )
  )


def choose(
  full: ModelConfig,
  scores: Scores,
  masks: Masks,
  prunable: Masks,
  aim: int,
  target: int,
  cap: float = 1.0,
  settings: Prune = exact_target.PARAMS,
  halves: Scores | None = None,
) -> Counts:
  """Units to remove from each module, {"K": int [L], "F": ...}.

  One ranking of all modules by score per parameter, or per what else the budget
  of `settings` counts. Units go until `aim` is left, and never below `target`
  by an MLP channel (block of them) or more, as long as there are channels: a KV
  group that would is passed over. Units that cost nothing stay, and at least
  one (block) in each module, unless `prune.whole_halves`.

  Args:
    scores: of the units; those of removed ones mean nothing.
    prunable: modules that may lose units, bool [L] each.
    cap: most that a module may lose, as a share of its units; at least one.
    halves: of `Measured`.
  """
  left = surgery.widths(masks)
  size = budgets.of_widths(full, left, settings)
  aim = max(aim, target)
  curves, pieces = budgets.curves(full, settings), []
  for u in UNITS:
    for layer in np.flatnonzero(prunable[u]):
      score = choice.in_order(scores[u][layer], masks[u][layer])
      if halves is not None and len(score):
        # What the last unit takes with it is all that the half is still worth.
        score[-1] = halves[u][layer] - score[:-1].sum()
      pieces += _pieces(u, int(layer), score, curves[u][layer], cap, settings)
  # Ties: attention before MLP of the same layer, then the lower index.
  pieces.sort(key=lambda p: (p.score / p.gain, p.layer, p.unit != "K"))
  counts = {u: np.zeros(full.num_layers, np.int64) for u in UNITS}
  fine = any(p.unit == "F" for p in pieces)
  cost, rounding = budgets.unit_cost(full, settings), settings.rounding()
  channel, passed = rounding["F"] * cost["F"].max(), {}
  for p in pieces:
    if size <= aim:
      break
    coarse = p.unit == "K" or p.gain > channel
    module = p.unit, p.layer
    if module in passed or (coarse and fine and size - p.gain < target):
      passed.setdefault(module, p)  # what comes behind it has to wait for it
      continue
    counts[p.unit][p.layer] += p.units
    size -= p.gain
  if size > target and passed and not any(n.any() for n in counts.values()):
    p = min(passed.values(), key=lambda p: p.gain)  # nothing finer is left
    counts[p.unit][p.layer] = p.units
  return counts


@dataclasses.dataclass(frozen=True)
class Piece:
  """Units of one module that go together."""

  unit: str
  layer: int
  units: int
  score: float  # their sum
  gain: int  # of the budget


def _pieces(
  unit: str,
  layer: int,
  score: np.ndarray,
  curve: np.ndarray,
  cap: float,
  settings: Prune,
) -> list[Piece]:
  """What may go of a module, the cheapest loss of score per budget first.

  A block that is worth more than the next, which its removal makes possible,
  goes together with it: the last unit takes the norms of its half with it, a
  width between two lanes saves nothing.

  Args:
    score: of the units that are left, rising.
    curve: what the module takes at each width.
    cap: as of `choose`.
  """
  block, width = settings.rounding()[unit], len(score)
  least = 0 if settings.whole_halves else block
  most, taken, found = max(int(cap * width), 1), 0, []
  while width - taken > least:
    n = (width - taken) % block or block
    if taken and taken + n > most:
      break
    left = width - taken
    gain = int(curve[left] - curve[left - n])
    piece = Piece(unit, layer, n, score[taken : taken + n].sum(), gain)
    taken += n
    while found and (
      not found[-1].gain
      or piece.score * found[-1].gain < found[-1].score * piece.gain
    ):
      piece = _together(found.pop(), piece)
    found.append(piece)
  return [piece for piece in found if piece.gain > 0]


def _together(first: Piece, then: Piece) -> Piece:
  units, score = first.units + then.units, first.score + then.score
  gain = first.gain + then.gain
  return dataclasses.replace(first, units=units, score=score, gain=gain)


def _worth(
  full: ModelConfig, scores: Scores, masks: Masks, settings: Prune
) -> Scores:
  """Mean score per parameter of each module, over the largest; [L] each."""
  cost = budgets.unit_cost(full, settings)
  mean = {
    u: np.array(
      [
        choice.in_order(s, m).mean() / n if m.any() and n else np.nan
        for s, m, n in zip(scores[u], masks[u], cost[u], strict=True)
      ]
    )
    for u in UNITS
  }
  most = np.nanmax(np.concatenate(list(mean.values())))
  return {u: m / most if most else m for u, m in mean.items()}
