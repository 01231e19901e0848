"""What the baselines share: defaults, and meeting a parameter target exactly.

A width method says, for a ratio p, how many units each module loses. The
ratio is solved for the target; what lies between the last ratio above the
target and the first one not above it is given up in proportion, as in
`prune.trim`, so that the result ends within one MLP channel.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import adapt, ranking, surgery
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import Step

Counts = dict[str, np.ndarray]  # units to remove, {"K": int [L], "F": int [L]}


def defaults(
  config: ModelConfig,
  full: ModelConfig | None,
  kept: Kept | None,
  mesh: Mesh | None,
) -> tuple[ModelConfig, Kept, Mesh]:
  """`full`, `kept` and `mesh` as `prune.prune` takes them where not given."""
  return (
    full or config,
    kept or surgery.everything(config),
    mesh or sharding.one_device(),
  )


def solve(
  full: ModelConfig,
  masks: Masks,
  scores: Mapping[str, np.ndarray],
  counts_at: Callable[[float], Counts],
  prunable: Masks,
  target: int,
  round_to: int = 1,
) -> Masks:
  """The masks of the largest model not above `target` parameters.

  Args:
    full: sizes of the original model.
    masks: units left now.
    scores: of the units, [L, K] and [L, F]; the lowest of a module go first.
    counts_at: units that go at ratio p in [0, 1], not falling with p.
    prunable: which modules may lose channels, bool [L] each.
    round_to: MLP widths become multiples of this.

  Raises:
    UserError: not even p = 1 reaches the target.
  """
  order = ranking.ranking(scores, masks)

  def at(ratio: float) -> tuple[Counts, Masks, int]:
    counts = rounded(counts_at(ratio), masks, round_to)
    left = ranking.remove(masks, order, counts)
    return counts, left, surgery.count(full, left)

  low, high = 0.0, 1.0
  if at(high)[2] > target:
    raise unreachable(target, at(high)[2])
  if at(low)[2] <= target:
    return at(low)[1]
  for _ in range(60):  # as fine as floats are
    middle = (low + high) / 2
    if at(middle)[2] > target:
      low = middle
    else:
      high = middle
  # A budget of its own for each unit letter may take fewer channels when one
  # more group goes: what both ratios remove is sure, the rest is trimmed.
  both = {u: np.minimum(at(low)[0][u], at(high)[0][u]) for u in UNITS}
  more = {u: at(high)[0][u] - both[u] for u in UNITS}
  left = ranking.remove(masks, order, both)
  more = adapt.trim(full, left, more, prunable, target, round_to)
  left = ranking.remove(left, ranking.ranking(scores, left), more)
  return _give_back(full, masks, left, scores, target, round_to)


def _give_back(
  full: ModelConfig,
  masks: Masks,
  left: Masks,
  scores: Mapping[str, np.ndarray],
  target: int,
  round_to: int,
) -> Masks:
  """Puts the best removed channels back while they fit.

  `trim` does not know that a half layer without units loses its norms too.
  """
  cost = model_config.unit_cost(full)["F"] * round_to
  left = left | {"F": left["F"].copy()}
  while surgery.count(full, left) + cost <= target:
    gone = masks["F"] & ~left["F"] & left["F"].any(axis=1)[:, None]
    gone &= (gone.sum(axis=1) >= round_to)[:, None]
    if not gone.any():
      break
    score = np.where(gone, scores["F"], -np.inf)
    layer = score.max(axis=1).argmax()
    best = np.argsort(-score[layer], kind="stable")[:round_to]
    left["F"][layer, best] = True
  return left


def check_target(target: int | None, instead: float | None) -> None:
  """Raises a UserError if there is neither a target nor a fixed ratio."""
  if target is None and instead is None:
    raise UserError(
      "this method needs a target: give --config.prune.ratio=0.2 (share of all "
      "parameters to remove) or --config.prune.target_params=N"
    )


def check_reachable(
  full: ModelConfig, masks: Masks, prunable: Masks, target: int, least: dict
) -> None:
  """Raises a UserError, before any work, for a target that is too small.

  Args:
    least: units that a prunable module is left with, {"K": int, "F": int}.
  """
  width = {
    u: np.where(prunable[u], np.minimum(w, least[u]), w)
    for u, w in surgery.widths(masks).items()
  }
  size = model_config.count_params(surgery.with_widths(full, width))
  if size > target:
    raise unreachable(target, size)


def unreachable(target: int, closest: int) -> UserError:
  return UserError(
    f"this method cannot reach {target:,} parameters: the closest it can get "
    f"is {closest:,}; raise the target, or let it prune more layers "
    "(--config.prune.attention_layers=0: --config.prune.mlp_layers=0:)"
  )


def rounded(counts: Counts, masks: Masks, round_to: int) -> Counts:
  """Counts that leave MLP widths rounded up to multiples of `round_to`."""
  left = surgery.widths(masks)["F"]
  keep = -(-(left - counts["F"]) // round_to) * round_to
  return counts | {"F": np.maximum(left - keep, 0)}


def step(
  number: int,
  full: ModelConfig,
  before: Masks,
  masks: Masks,
  params: int,
  losses_M: np.ndarray | None = None,
  importance_L: np.ndarray | None = None,
  scores: dict[str, np.ndarray] | None = None,
) -> Step:
  """The record of a step; NaN for what the method does not have.

  Args:
    before: units at the start of the stage, which the sparsities refer to.
  """
  nan_L = np.full(full.num_layers, np.nan)
  was, now = surgery.widths(before), surgery.widths(masks)
  return Step(
    number,
    masks,
    {u: 1 - now[u] / np.maximum(was[u], 1) for u in UNITS},
    params,
    losses_M=np.array([np.nan]) if losses_M is None else losses_M,
    importance_L=nan_L if importance_L is None else importance_L,
    relative=dict.fromkeys(UNITS, nan_L),
    scores=scores,
  )
