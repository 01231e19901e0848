"""Trackers of experiments, wandb and trackio, where a run stays one run."""

import importlib
import secrets
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError, first_line, nearest
from adapt_pruner_jax.storage import json_files

NAMES = ("wandb", "trackio")
PROJECT = "adapt-pruner"
FILE = "tracker.json"  # in the work directory: by what the run is known there


class Trackers:
  """Those that a run is told to; opened when there is something to tell."""

  def __init__(self, names: str, workdir: Path | None):
    """Imports them.

    Args:
      names: separated by commas.
      workdir: of the run; None = nothing is told.

    Raises:
      UserError: one is unknown or not installed.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    self._found = {name: _imported(name) for name in asked}
    self._workdir, self._open = workdir, False

  def log(self, values: dict[str, Any]) -> None:
    """A row; each kind of row has its own count of steps in it."""
    if self._workdir is None:
      return
    if not self._open and self._found:
      self._begin()
    for module in self._found.values():
      module.log(values)

  def close(self) -> None:
    """Ends them."""
    while self._open and self._found:
      self._found.popitem()[1].finish()

  def _begin(self) -> None:
    """Goes on with the run that an earlier process of this one began.

    Raises:
      UserError: a tracker refuses, as without a login or a network.
    """
    file, name = self._workdir / FILE, self._workdir.name
    if not file.exists():
      json_files.write_json(file, {"id": secrets.token_hex(4)})
    known = json_files.read_json(file)["id"]
    for tracker, module in self._found.items():
      own = {"id": known, "name": name}
      if tracker == "trackio":  # which knows runs by their names
        own = {"name": f"{name}-{known}"}
      try:
        module.init(project=PROJECT, resume="allow", **own)
      except Exception as error:  # each has errors of its own
        raise UserError(
          f"tracker {tracker} does not begin: {first_line(error)}; mend that, "
          "or leave --config.log.trackers out, and the same command continues"
        ) from error
    self._open = True


def _imported(name: str) -> Any:
  if name not in NAMES:
    raise UserError(
      f"tracker {name} is not one of {', '.join(NAMES)}{nearest(name, NAMES)}"
    )
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"tracker {name} is not installed: pip install {name}"
    ) from error
