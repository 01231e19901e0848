"""Which units of a module go: those of the lowest scores."""

from collections.abc import Mapping

import numpy as np

from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning.surgery import Masks


def order(
  scores: Mapping[str, np.ndarray], masks: Masks
) -> dict[str, list[np.ndarray]]:
  """Units left in each module, lowest score first (ties: lowest index).

  Args:
    scores: {"K": [L, K], "F": [L, F]}; those of masked units mean nothing.
    masks: units that are left, bool of the same shapes.
  """
  return {
    u: [
      np.flatnonzero(m)[np.argsort(s[m], kind="stable")]
      for s, m in zip(scores[u], masks[u], strict=True)
    ]
    for u in UNITS
  }


def remove(
  masks: Masks,
  order: Mapping[str, list[np.ndarray]],
  counts: Mapping[str, np.ndarray],
) -> Masks:
  """Masks without the first `counts` units of each module's `order`."""
  masks = {u: m.copy() for u, m in masks.items()}
  for u in UNITS:
    for mask, units, n in zip(masks[u], order[u], counts[u], strict=True):
      mask[units[:n]] = False
  return masks
