"""Magnitude: LLM-Pruner with the size of the weights as the score."""

import dataclasses
from typing import Any

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning.baselines import llm_pruner
from adapt_pruner_jax.pruning.task import Pruned, Samples


def prune(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  **options: Any,
) -> Pruned:
  """`llm_pruner.prune` with sums of |W| or W^2 (`settings.magnitude_norm`).

  The calibration tokens only give the loss in the record.
  """
  settings = dataclasses.replace(
    settings,
    group_importance=settings.magnitude_norm,
    llm_pruner_steps=1,
    llm_pruner_ranking="layer",
  )
  return llm_pruner.prune(config, params, settings, samples, **options)
