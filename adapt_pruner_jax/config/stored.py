"""Recipes as work directories keep them, also those of earlier versions."""

import dataclasses
from typing import Any

from adapt_pruner_jax.config.fields import (
  OLD_FIELDS,
  Config,
  field_names,
  get,
  leaves,
)
from adapt_pruner_jax.errors import UserError

# Defaults that once were written out and now are other words for the same, in
# files of before the version was stored.
OLD_DEFAULTS = {"prune.group_importance": "taylor"}


def from_json(stored: dict) -> Config:
  """The recipe that a work directory's config.json holds.

  Args:
    stored: `dataclasses.asdict` of a `Config`, perhaps of an earlier version:
      fields that it lacks are at their defaults, old names are read as new.

  Raises:
    UserError: it has a field that this version does not know.
  """
  config = Config()
  names = field_names(config)
  for name, value in _stored_fields(stored).items():
    if name not in names:
      raise UserError(
        f"no config field {name}: a later version of adapt_pruner_jax wrote it"
      )
    *sections, last = name.split(".")
    setattr(get(config, ".".join(sections)), last, value)
  return config


def difference(old: dict, new: dict) -> list[str]:
  """Says how two recipes differ.

  Args:
    old, new: contents of config.json or `dataclasses.asdict` of a `Config`;
      fields that one lacks are at their defaults, see `from_json`.

  Returns:
    A "field: old -> new" for each field that is not the same.
  """
  default = _stored_fields(dataclasses.asdict(Config()))
  old, new = (default | _stored_fields(recipe) for recipe in (old, new))
  return [
    f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
    for name in sorted(old | new)
    if old.get(name, "absent") != new.get(name, "absent")
  ]


def _stored_fields(stored: dict) -> dict[str, Any]:
  """Values by today's dotted names.

  Without "version" and "inputs", which `recipe.claim` writes beside them.
  """
  stored = {name: x for name, x in stored.items() if name != "inputs"}
  named = {".".join(path): value for path, value in leaves(stored)}
  if named.pop("version", None) is None:
    old = OLD_DEFAULTS.items()
    named = {name: x for name, x in named.items() if (name, x) not in old}
  return {OLD_FIELDS.get(name, name): value for name, value in named.items()}
