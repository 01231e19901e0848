"""Adapt-Pruner: scores and a schedule decide which units stay (2502.03460).

Within a stage units are only masked, in dense stacked coordinates, so that one
executable scores every step of every stage; at its end the kept units are
gathered into a smaller model (`surgery`).
"""

from collections.abc import Mapping

import numpy as np

from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning.surgery import Masks

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
