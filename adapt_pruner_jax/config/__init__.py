"""The words of a recipe.

choices       what fields of words may say
fields        every section and field with its default, and their old names
names         the fields by their dotted names
field_types   whether values are of the types of their fields
checks        which values a recipe may have
stored        recipes in work directories, compared with the one that is given
recipe_flags  the recipe on a command line
latency_table what halves of layers take on a device, as a file
"""

from adapt_pruner_jax.config.checks import check, layer_range, vocab_size
from adapt_pruner_jax.config.choices import CHOICES, PUBLISHED, RANKED, WHOLE
from adapt_pruner_jax.config.fields import (
  OLD_FIELDS,
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
  Minitron,
  Model,
  Prune,
  Ranking,
  Search,
  SliceGpt,
  Surgeon,
  Train,
  Uniform,
  Vocab,
)
from adapt_pruner_jax.config.names import field_names, get, task_names
from adapt_pruner_jax.config.stored import difference, from_json, is_recipe

__all__ = [
  "CHOICES",
  "OLD_FIELDS",
  "PUBLISHED",
  "RANKED",
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
  "Minitron",
  "Model",
  "Prune",
  "Ranking",
  "Search",
  "SliceGpt",
  "Surgeon",
  "Train",
  "Uniform",
  "Vocab",
  "check",
  "difference",
  "field_names",
  "from_json",
  "get",
  "is_recipe",
  "layer_range",
  "task_names",
  "vocab_size",
]
