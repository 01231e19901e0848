"""Fields of a recipe by their dotted names."""

import dataclasses
from typing import Any

from adapt_pruner_jax.config.fields import Config, Eval


def task_names(recipe: Eval) -> list[str]:
  """The names in `eval.tasks`."""
  return [name.strip() for name in recipe.tasks.split(",") if name.strip()]


def field_names(config: Config) -> list[str]:
  """Dotted names of all fields, e.g. 'prune.ratio'."""
  return [".".join(path) for path, _ in leaves(dataclasses.asdict(config))]


def get(config: Config, name: str) -> Any:
  """Value of a dotted field."""
  value = config
  for part in filter(None, name.split(".")):
    value = getattr(value, part)
  return value


def leaves(tree: dict, path: tuple = ()) -> list[tuple[tuple, Any]]:
  """Lists the values in nested dicts, each with the keys that lead to it."""
  found = []
  for key, value in tree.items():
    if isinstance(value, dict):
      found += leaves(value, (*path, key))
    else:
      found.append(((*path, key), value))
  return found
