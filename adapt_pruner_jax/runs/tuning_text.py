"""The text that a quality to keep is measured on."""

import dataclasses
from typing import Any

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.data.calibration import pruning_data
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.models.model_config import ModelConfig


def windows(
  recipe: Config,
  tokenizer: Tokenizer | None,
  full: ModelConfig,
  *where: Any,
) -> Any:
  """Windows of `calibration.tuning`, or others of the source; None if no
  quality is kept.

  Args:
    full: of the model to prune.
    where: `cache_dir`, `say` and `stop` of `calibration_data`.

  Raises:
    UserError: as `calibration_data`.
  """
  given = recipe.calibration
  if recipe.prune.budget != "quality":
    return None
  source = given.tuning or given.source
  return pruning_data(
    dataclasses.replace(given, source=source),
    False,
    *(tokenizer, full.vocab_size, recipe.seed + 2, *where),
  )[0]
