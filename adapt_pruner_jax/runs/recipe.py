"""What a run works with: the recipe, opened and checked before any work."""

import dataclasses
from pathlib import Path

from adapt_pruner_jax.config import Config, difference
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import json_files

RECIPE = "config.json"
# What of the recipe may change between the parts of one run.
FREE = ("mesh.", "checkpoint.", "log.", "train.skip_nonfinite")


def check_recipe(config: Config, path: Path) -> None:
  """Compares the recipe with the one of the work directory, if it has one.

  Raises:
    UserError: the directory is of a run with another recipe.
  """
  file = path / RECIPE
  changed = []
  if agreement.is_writer() and file.exists():
    old, mine = json_files.read_json(file), dataclasses.asdict(config)
    changed = [
      line for line in difference(old, mine) if not line.startswith(FREE)
    ]
  if not agreement.all_agree(not changed):
    raise UserError(
      f"--workdir={path} belongs to a run with another recipe: "
      f"{'; '.join(changed) or 'process 0 has said which'}; give the old "
      "recipe or another --workdir"
    )


def claim(config: Config, path: Path) -> None:
  """Writes the recipe into a new work directory, once its inputs are good."""
  if agreement.is_writer() and not (path / RECIPE).exists():
    json_files.write_json(path / RECIPE, dataclasses.asdict(config))
