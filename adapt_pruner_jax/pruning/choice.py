"""Which units of a module go: those of the lowest scores.

In experts a unit is one channel of each, and which ones belong together does
not matter: a unit is the lowest of each, the next is the next lowest. So each
expert keeps its own best, and all keep as many.
"""

from collections.abc import Mapping

import numpy as np

from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning.surgery import Masks


def order(
  scores: Mapping[str, np.ndarray], masks: Masks
) -> dict[str, list[np.ndarray]]:
  """Units left in each module, lowest score first (ties: lowest index).

  Args:
    scores: {"K": [L, K], "F": [L, F] or [L, X, F]}; those of masked units mean
      nothing.
    masks: units that are left, bool of the same shapes.

  Returns:
    Of each module int [units], or [units, X], a channel of each expert.
  """
  return {
    u: [_order(s, m) for s, m in zip(scores[u], masks[u], strict=True)]
    for u in UNITS
  }


def _order(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
  if mask.ndim == 2:
    each = [_order(s, m) for s, m in zip(scores, mask, strict=True)]
    return np.stack(each, axis=-1)
  return np.flatnonzero(mask)[np.argsort(scores[mask], kind="stable")]


def in_order(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Scores of the units of one module that are left, rising.

  Args:
    scores: [units], or [X, units], whose experts' are added up.
    mask: units that are left, bool of the same shape.
  """
  order = _order(scores, mask)
  if mask.ndim == 1:
    return scores[order]
  return scores[np.arange(len(scores)), order].sum(axis=-1)


def put_back(
  left: np.ndarray,
  gone: np.ndarray,
  scores: np.ndarray,
  layer: int,
  number: int,
) -> None:
  """Puts the best units that are gone from a module back, into `left`.

  Args:
    left, gone: masks of one letter, of all layers.
    scores: of all units (ties: the lowest index comes back).
    layer: which module.
    number: how many units.
  """
  order = _order(-scores[layer], gone[layer])
  np.put_along_axis(left[layer], order[:number].T, True, axis=-1)


def remove(
  masks: Masks,
  order: Mapping[str, list[np.ndarray]],
  counts: Mapping[str, np.ndarray],
) -> Masks:
  """Masks without the first `counts` units of each module's `order`."""
  masks = {u: m.copy() for u, m in masks.items()}
  for u in UNITS:
    for mask, units, n in zip(masks[u], order[u], counts[u], strict=True):
      np.put_along_axis(mask, units[:n].T, False, axis=-1)
  return masks
