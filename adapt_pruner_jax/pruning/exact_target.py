"""The last step, trimmed: the size ends at the target or just below it."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.pruning.surgery import Masks

Removal = tuple[str, int, int]  # unit letter, layer, how many units


def trim(
  full: ModelConfig,
  masks: Masks,
  counts: Mapping[str, np.ndarray],
  prunable: Masks,
  target: int,
  round_to: int = 1,
) -> dict[str, np.ndarray]:
  """Fewer removals, so that the size ends at the target or just below it.

  Modules give up what they planned in proportion. The result is not above the
  target, and within one MLP channel (a block of `round_to`) of it as long as
  there are channels, else within one KV group: channels that were not planned
  go in place of a KV group too much. Counts that do not reach the target stay.

  Args:
    counts: units that the step would remove, {"K": int [L], "F": ...}.
    prunable: modules from which more may be taken, bool [L] each.
  """
  cost = model_config.unit_cost(full)
  width = surgery.widths(masks)["F"]
  need = surgery.count(full, masks) - target
  planned = _in_turn(counts, width, round_to)
  enough = _until(planned, need, cost)
  if need <= 0 or enough is None:
    return dict(counts)
  groups = [r for r in enough if r[0] == "K"]

  def with_groups(number: int) -> list[Removal] | None:
    channels = itertools.chain(
      (r for r in planned if r[0] == "F"),
      _more_channels(width - counts["F"], prunable["F"], round_to),
    )
    found = _until(channels, need - number * cost["K"], cost)
    return None if found is None else groups[:number] + found

  chosen = with_groups(len(groups))
  if len(groups) * cost["K"] - need >= round_to * cost["F"]:
    chosen = with_groups(len(groups) - 1) or chosen
  result = {u: np.zeros(full.num_layers, np.int64) for u in UNITS}
  for unit, layer, units in chosen:
    result[unit][layer] += units
  return result


def _in_turn(
  counts: Mapping[str, np.ndarray], width_L: np.ndarray, round_to: int
) -> list[Removal]:
  """`counts` one by one, all modules in proportion to what they planned."""
  found = []  # (share of its module's removals, channels first, removal)
  for layer, total in enumerate(counts["K"]):
    for i in range(total):
      found.append(((i + 1) / total, 1, ("K", layer, 1)))
  for layer, total in enumerate(counts["F"]):
    done = 0
    while done < total:
      size = min(_block(width_L[layer] - done, round_to), total - done)
      done += size
      found.append((done / total, 0, ("F", layer, size)))
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
  """Channels that bring a width down to the next multiple of `round_to`."""
  return int(width % round_to or round_to)


def _until(
  removals: Iterable[Removal], need: int, cost: Mapping[str, int]
) -> list[Removal] | None:
  """The first removals worth `need` parameters; None if all are not."""
  found = []
  for unit, layer, units in removals:
    if need <= 0:
      break
    found.append((unit, layer, units))
    need -= units * cost[unit]
  return found if need <= 0 else None
