"""Types of a recipe's fields: those of their defaults."""

import numbers
from typing import Any

from adapt_pruner_jax.config.fields import Config
from adapt_pruner_jax.config.names import field_names, get
from adapt_pruner_jax.errors import UserError

# What is taken for a default of such a type; a bool is no number here.
TAKEN = {int: numbers.Integral, float: numbers.Real}


def check_types(config: Config) -> None:
  """Raises a UserError for a value of another type than its field has.

  The command line gives none; a recipe file can, and Python.
  """
  default = Config()
  for name in field_names(default):
    value, kind = get(config, name), type(get(default, name))
    if not _is(value, kind):
      wanted = f'text: "{value}"' if kind is str else f"of type {kind.__name__}"
      raise UserError(
        f"--config.{name}={value!r} is of type {type(value).__name__}, and "
        f"must be {wanted}"
      )


def _is(value: Any, kind: type) -> bool:
  if kind is not bool and isinstance(value, bool):
    return False
  return isinstance(value, TAKEN.get(kind, kind))
