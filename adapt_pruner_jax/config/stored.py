"""Recipes as work directories keep them, also those of earlier versions."""

import dataclasses
from typing import Any

from adapt_pruner_jax.config.fields import OLD_FIELDS, Config, today
from adapt_pruner_jax.config.names import field_names, get, leaves
from adapt_pruner_jax.errors import UserError

# What the first version wrote for a field that was left at its default, where
# the default now is another word for the same.
OLD_DEFAULTS = {"prune.group_importance": "taylor", "model.dtype": "float32"}
# What was done before there was such a field, where that is not its default.
BEFORE = {"train.distill_temperature": 2.0, "prune.refit_temperature": 2.0}
# What says nothing where another field is 0.
SILENT_WITHOUT = {
  "train.distill_temperature": "train.distill_alpha",
  "prune.refit_temperature": "prune.refit_passes",
}
BESIDE = ("version", "inputs")  # in config.json, and no fields


def is_recipe(content: Any) -> bool:
  """Whether JSON is a work directory's config.json, and not a model's."""
  return isinstance(content, dict) and {"prune", "calibration"} <= {*content}


def from_json(stored: dict) -> Config:
  """The recipe that a work directory's config.json holds.

  Args:
    stored: `dataclasses.asdict` of a `Config`, perhaps of an earlier version:
      fields that it lacks are at their defaults, or as `BEFORE` has them; old
      names are read as new.

  Raises:
    UserError: it has a field that this version does not know.
  """
  config = Config()
  names = field_names(config)
  given = BEFORE | _stored_fields(stored)
  for name in _at_old_defaults(stored):
    del given[name]
  for name, value in given.items():
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
      of fields that one lacks see `from_json`.

  Returns:
    A "field: old -> new" for each field that is not the same, and is of use in
    one of the two.
  """
  default = _stored_fields(dataclasses.asdict(Config())) | BEFORE
  alone = _at_old_defaults(old)
  old, new = (default | _stored_fields(recipe) for recipe in (old, new))
  for name in alone:  # typed or not, it meant the same
    if new[name] in (OLD_DEFAULTS[name], default[name]):
      old[name] = new[name]
  return [
    f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
    for name in sorted(old | new)
    if old.get(name, "absent") != new.get(name, "absent")
    and not _silent(name, old, new)
  ]


def _silent(name: str, *recipes: dict[str, Any]) -> bool:
  """Whether a field says nothing in any of the recipes."""
  other = SILENT_WITHOUT.get(name)
  return other is not None and not any(recipe[other] for recipe in recipes)


def _stored_fields(stored: dict) -> dict[str, Any]:
  """Values by today's names, without what `recipe.claim` writes beside."""
  stored = {name: x for name, x in stored.items() if name not in BESIDE}
  named = {".".join(path): value for path, value in leaves(stored)}
  named = {OLD_FIELDS.get(name, name): x for name, x in named.items()}
  return {name: today(name, x) for name, x in named.items()}


def _at_old_defaults(stored: dict) -> list[str]:
  """Which fields a recipe of the first version, if it is one, left alone."""
  named = {".".join(path): value for path, value in leaves(stored)}
  if not OLD_FIELDS.keys() & named.keys():  # it wrote all of its fields
    return []
  return [name for name, x in OLD_DEFAULTS.items() if named.get(name) == x]
