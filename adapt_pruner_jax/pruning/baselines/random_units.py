"""Random: LLM-Pruner with random scores, the same for the same seed."""

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
  """`llm_pruner.prune` with scores drawn from `seed`.

  The calibration tokens only give the loss in the record.
  """
  settings = dataclasses.replace(
    settings,
    group_importance="random",
    llm_pruner_steps=1,
    llm_pruner_ranking="layer",
  )
  return llm_pruner.prune(config, params, settings, samples, **options)
