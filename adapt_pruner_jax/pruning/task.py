"""Adapt-Pruner: scores and a schedule decide which units stay (2502.03460).

Within a stage units are only masked, in dense stacked coordinates, so that one
executable scores every step of every stage; at its end the kept units are
gathered into a smaller model (`surgery`).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.pruning.schedule import Modules
from adapt_pruner_jax.pruning.surgery import Kept, Masks

# Calibration tokens of a pruning step (from 0), int32 [N, T].
Samples = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
  """A smaller model, and how it came about."""

  config: ModelConfig
  params: Params
  kept: Kept
  trace: list[dict]  # a JSON-able record a step, see `record`


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One pruning step; a stage goes on from its first five fields."""

  number: int  # from 1
  masks: Masks
  sparsity: Modules
  params: int  # after it
  # What was left at each refit between the steps so far, by step.
  refitted: dict[int, Masks] = dataclasses.field(default_factory=dict)
  losses_M: np.ndarray | None = None
  importance_L: np.ndarray | None = None  # summed over minibatches
  relative: Modules | None = None
  scores: dict[str, np.ndarray] | None = None  # before the removal


def record(step: Step) -> dict:
  """A line of trace.jsonl; what a method does not measure (NaN) is None."""

  def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

  width = surgery.widths(step.masks)
  return {
    "step": step.number,
    "loss": number(np.mean(step.losses_M)),
    "params": int(step.params),
    "layers": [
      {
        "kv_groups": int(width["K"][i]),
        "ffn": int(width["F"][i]),
        "importance": number(step.importance_L[i]),
        "attn_importance": number(step.relative["K"][i]),
        "mlp_importance": number(step.relative["F"][i]),
        "attn_sparsity": float(step.sparsity["K"][i]),
        "mlp_sparsity": float(step.sparsity["F"][i]),
      }
      for i in range(len(width["K"]))
    ],
  }
