"""The words of a recipe.

fields        every section and field with its default, and their old names
checks        which values a recipe may have
stored        recipes in work directories, compared with the one that is given
recipe_flags  the recipe on a command line
"""

from adapt_pruner_jax.config.checks import check, layer_range
from adapt_pruner_jax.config.fields import (
  CHOICES,
  OLD_FIELDS,
  PUBLISHED,
  WHOLE,
  Calibration,
  Checkpoint,
  Config,
  Data,
  Eval,
  Flap,
  LlmPruner,
  Log,
  Magnitude,
  Mesh,
  Model,
  Prune,
  Ranking,
  Search,
  SliceGpt,
  Train,
  Uniform,
  field_names,
  get,
  task_names,
)
from adapt_pruner_jax.config.stored import difference, from_json

__all__ = [
  "CHOICES",
  "OLD_FIELDS",
  "PUBLISHED",
  "WHOLE",
  "Calibration",
  "Checkpoint",
  "Config",
  "Data",
  "Eval",
  "Flap",
  "LlmPruner",
  "Log",
  "Magnitude",
  "Mesh",
  "Model",
  "Prune",
  "Ranking",
  "Search",
  "SliceGpt",
  "Train",
  "Uniform",
  "check",
  "difference",
  "field_names",
  "from_json",
  "get",
  "layer_range",
  "task_names",
]
