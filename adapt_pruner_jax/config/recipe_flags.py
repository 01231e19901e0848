"""The recipe on a command line: --config=FILE, --config.section.field=value."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from adapt_pruner_jax.config.fields import OLD_FIELDS, Config
from adapt_pruner_jax.config.names import field_names
from adapt_pruner_jax.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Adds --config=FILE and --config.section.field=value.

  Args:
    argv: the flags given; a recipe in them becomes the path where it is found.

  Raises:
    UserError: no such recipe or field.
  """
  from ml_collections import config_flags

  names = field_names(Config())
  for argument in argv:
    name = argument.lstrip("-").split("=")[0]
    if name[7:] in OLD_FIELDS:
      raise UserError(f"--{name} is now --config.{OLD_FIELDS[name[7:]]}")
    if name.startswith("config.") and name[7:] not in names:
      raise UserError(
        f"no config field {name}{nearest(name[7:], names)}; "
        "`adapt-pruner run --help` lists them"
      )
  default = ROOT.parent / "configs" / "tiny.py"
  if not default.exists():
    default = ROOT / "configs" / "tiny.py"
  argv[:] = [found(a) for a in _joined(argv)]
  config_flags.DEFINE_config_file(
    "config", str(default), "the recipe", flag_values=values, sys_argv=argv
  )


def _joined(argv: Sequence[str]) -> list[str]:
  """The arguments, with `--config FILE` as `--config=FILE`."""
  joined: list[str] = []
  for argument in argv:
    if joined and joined[-1] in ("--config", "-config"):
      joined[-1] += f"={argument}"
    else:
      joined.append(argument)
  return joined


def found(argument: str) -> str:
  """--config=configs/X.py also finds the recipes that are installed.

  What follows a colon, configs/X.py:0.4, is the argument of `get_config`.

  Raises:
    UserError: no such file.
  """
  flag, _, file = argument.partition("=")
  if flag.lstrip("-") != "config" or not file:
    return argument
  file, colon, given = file.partition(":")
  path = Path(file)
  for place in (path, ROOT.parent / path, ROOT / path):
    if place.is_file():
      return f"{flag}={place}{colon}{given}"
  folder = ROOT.parent / "configs"
  folder = folder if folder.is_dir() else ROOT / "configs"
  have = sorted(p.name for p in folder.glob("*.py") if p.stem != "__init__")
  raise UserError(
    f"--config={file}: no such file{nearest(path.name, have)}; there are "
    f"{', '.join('configs/' + n for n in have)}"
  )


def recipe(values: flags.FlagValues) -> Config:
  """The recipe that the flags give.

  Raises:
    UserError: the file gives something else.
  """
  config = values.config
  if not isinstance(config, Config):
    raise UserError("the --config file's get_config() must return a Config")
  return config
