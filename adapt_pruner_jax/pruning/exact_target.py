"""A target met exactly: the size ends at it, or less than a channel below.

A schedule's last step is trimmed (`trim`); a method that says how many units
go at a ratio has its ratio solved for (`solve`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, choice, surgery, targets
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Counts, PruneTask, Scores

Removal = tuple[str, int, int]  # unit letter, layer, how many units
PARAMS = Prune()  # counts parameters, unit by unit
CountsAt = Callable[[float], Counts]  # units that go at a ratio, not falling


def trim(
  full: ModelConfig,
  masks: Masks,
  counts: Counts,
  prunable: Masks,
  target: int,
  settings: Prune = PARAMS,
) -> Counts:
  """Fewer removals, so that the size ends at the target or just below it.

  Modules give up what they planned in proportion. The result is not above the
  target, and within one MLP channel (a block of them) of it as long as
  there are channels, else within one KV group: channels that were not planned
  go in place of a KV group too much. Counts that do not reach the target stay.

  Args:
    counts: units that the step would remove, {"K": int [L], "F": ...}.
    prunable: modules from which more may be taken, bool [L] each.
    target: in the unit of the settings' budget.
    settings: say what is counted, and what widths become multiples of.
  """
  cost, rounding = budgets.curves(full, settings), settings.rounding()
  width = surgery.widths(masks)
  need = budgets.of_widths(full, width, settings) - target
  planned = _in_turn(counts, width, rounding)
  enough = _until(planned, need, width, cost)
  if need <= 0 or enough is None:
    return dict(counts)
  groups = [r for r in enough if r[0] == "K"]
  worth = lambda groups: sum(_gains(groups, width, cost))

  def with_groups(groups: list[Removal]) -> list[Removal] | None:
    channels = itertools.chain(
      (r for r in planned if r[0] == "F"),
      _more_channels(width["F"] - counts["F"], prunable["F"], rounding["F"]),
    )
    found = _until(channels, need - worth(groups), width, cost)
    return None if found is None else groups + found

  chosen = with_groups(groups)
  channel = budgets.unit_cost(full, settings)["F"].max()
  if worth(groups) - need >= rounding["F"] * channel:
    chosen = with_groups(groups[:-1]) or chosen
  result = {u: np.zeros(full.num_layers, np.int64) for u in UNITS}
  for unit, layer, units in chosen:
    result[unit][layer] += units
  return result


def _in_turn(
  counts: Counts, width: Mapping[str, np.ndarray], rounding: Mapping[str, int]
) -> list[Removal]:
  """`counts` one by one, all modules in proportion to what they planned."""
  found = []  # (share of its module's removals, channels first, removal)
  for unit, rank in (("K", 1), ("F", 0)):
    for layer, total in enumerate(counts[unit]):
      done = 0
      while done < total:
        left = width[unit][layer] - done
        size = min(_block(left, rounding[unit]), total - done)
        done += size
        found.append((done / total, rank, (unit, layer, size)))
  return [removal for _, _, removal in sorted(found)]


def _more_channels(
  width_L: np.ndarray, prunable_L: np.ndarray, round_to: int
) -> Iterator[Removal]:
  """Channels in turn from the widest MLPs, as long as each keeps some."""
  width_L = np.where(prunable_L, width_L, 0)
  while True:
    layer = int(width_L.argmax())
    size = _block(width_L[layer], round_to)
    if width_L[layer] <= size:
      return
    width_L[layer] -= size
    yield "F", layer, size


def _block(width: int, round_to: int) -> int:
  """Units that bring a width down to the next multiple of `round_to`."""
  return int(width % round_to or round_to)


def _until(
  removals: Iterable[Removal],
  need: int,
  width: Mapping[str, np.ndarray],
  cost: budgets.Curves,
) -> list[Removal] | None:
  """The first removals worth `need` of the budget; None if all are not.

  Args:
    width: of the modules before.
    cost: of each module at each width.
  """
  found = []
  noted = (found.append(r) or r for r in removals)
  gains = _gains(noted, width, cost)
  while need > 0:
    gain = next(gains, None)
    if gain is None:
      return None
    need -= gain
  return found


def _gains(
  removals: Iterable[Removal],
  width: Mapping[str, np.ndarray],
  cost: budgets.Curves,
) -> Iterator[int]:
  """What each removal is worth, one behind the other."""
  width = {u: w.copy() for u, w in width.items()}
  for unit, layer, units in removals:
    before = width[unit][layer]
    width[unit][layer] -= units
    curve = cost[unit][layer]
    yield int(curve[before] - curve[before - units])


# ---- A ratio solved for the target -------------------------------------------


def solve(
  full: ModelConfig,
  masks: Masks,
  scores: Scores,
  counts_at: CountsAt,
  prunable: Masks,
  target: int,
  settings: Prune = PARAMS,
  exact: bool = True,
) -> Masks:
  """The masks of the largest model not above `target`.

  What lies between the last ratio above the target and the first one not above
  it is given up in proportion, as in `trim`, so that the result ends within one
  MLP channel.

  Args:
    full: sizes of the original model.
    masks: units left now.
    scores: of the units, [L, K] and [L, F]; the lowest of a module go first.
    counts_at: units that go at ratio p in [0, 1], not falling with p.
    prunable: which modules may lose channels, bool [L] each.
    target, settings: as of `trim`.
    exact: give up in part what lies between two ratios; else all of it goes.

  Raises:
    UserError: not even p = 1 reaches the target.
  """
  order, rounding = choice.order(scores, masks), settings.rounding()

  def at(ratio: float) -> tuple[Counts, Masks, int]:
    counts = rounded(counts_at(ratio), masks, rounding)
    left = choice.remove(masks, order, counts)
    size = budgets.of_widths(full, surgery.widths(left), settings)
    return counts, left, size

  low, high = 0.0, 1.0
  if at(high)[2] > target:
    raise unreachable(target, at(high)[2], settings)
  if at(low)[2] <= target:
    return at(low)[1]
  for _ in range(60):  # as fine as floats are
    middle = (low + high) / 2
    if at(middle)[2] > target:
      low = middle
    else:
      high = middle
  if not exact:
    return at(high)[1]
  # A budget of its own for each unit letter may take fewer channels when one
  # more group goes: what both ratios remove is sure, the rest is trimmed.
  both = {u: np.minimum(at(low)[0][u], at(high)[0][u]) for u in UNITS}
  more = {u: at(high)[0][u] - both[u] for u in UNITS}
  left = choice.remove(masks, order, both)
  more = trim(full, left, more, prunable, target, settings)
  left = choice.remove(left, choice.order(scores, left), more)
  return _give_back(full, masks, left, scores, target, settings)


def _give_back(
  full: ModelConfig,
  masks: Masks,
  left: Masks,
  scores: Scores,
  target: int,
  settings: Prune,
) -> Masks:
  """Puts the best removed channels back while they fit.

  `trim` does not know that a half layer without units loses its norms too.
  """
  round_to = settings.rounding()["F"]
  cost = budgets.unit_cost(full, settings)["F"].max() * round_to
  left = left | {"F": left["F"].copy()}
  size = lambda left: budgets.of_widths(full, surgery.widths(left), settings)
  has_mlp, gone = surgery.widths(left)["F"] > 0, masks["F"] & ~left["F"]

  def best(layer: int) -> float:
    order = choice.in_order(scores["F"][layer], gone[layer])
    return order[-1] if has_mlp[layer] and len(order) >= round_to else -np.inf

  best_L = np.array([best(i) for i in range(full.num_layers)])
  while size(left) + cost <= target and best_L.max() > -np.inf:
    layer = int(best_L.argmax())
    choice.put_back(left["F"], gone, scores["F"], layer, round_to)
    gone[layer] = masks["F"][layer] & ~left["F"][layer]
    best_L[layer] = best(layer)
  return left


def check_target(task: PruneTask) -> None:
  """Raises a UserError if there is no target."""
  if task.target is None:
    raise UserError(
      "this method needs a target: give --config.prune.ratio=0.2 (share of all "
      "parameters to remove) or --config.prune.target_params=N"
    )


def check_reachable(task: PruneTask, least: Mapping[str, int]) -> None:
  """Raises a UserError, before any work, for a target that is too small.

  Args:
    least: units that a prunable module is left with, {"K": int, "F": int}.
  """
  prunable = targets.prunable_modules(task.full, task.settings)
  width = {
    u: np.where(prunable[u], np.minimum(w, least[u]), w)
    for u, w in surgery.widths(task.begin).items()
  }
  size = budgets.of_widths(task.full, width, task.settings)
  if task.target is not None and size > task.target:
    raise unreachable(task.target, size, task.settings)


def unreachable(
  target: int, closest: int, settings: Prune = PARAMS
) -> UserError:
  """The error that says how far a method gets, both counted in its budget."""
  wanted, least = (budgets.shown(n, settings) for n in (target, closest))
  return UserError(
    f"this method cannot reach {wanted}: the closest it can get "
    f"is {least}; raise the target, or let it prune more layers "
    "(--config.prune.attention_layers=0: --config.prune.mlp_layers=0:)"
  )


def rounded(
  counts: Counts, masks: Masks, rounding: Mapping[str, int]
) -> Counts:
  """Counts that leave widths rounded up to multiples of `rounding`."""
  found = {}
  for u, left in surgery.widths(masks).items():
    keep = -(-(left - counts[u]) // rounding[u]) * rounding[u]
    found[u] = np.maximum(left - keep, 0)
  return found
