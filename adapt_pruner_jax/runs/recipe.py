"""Whose work directory it is: the recipe in its config.json, and what goes.

config.json is the recipe, with the version of the package that began the run
and fingerprints of what it read.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import Config, difference, get, is_recipe
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.runs.fingerprints import fingerprints
from adapt_pruner_jax.runs.inputs import Inputs
from adapt_pruner_jax.runs.latency_budget import TABLE
from adapt_pruner_jax.runs.state import package_version
from adapt_pruner_jax.storage import json_files, publish
from adapt_pruner_jax.storage.places import in_bucket, to_path

RECIPE = "config.json"
VERSION = "version"  # in config.json, beside the recipe's sections
# What of the recipe may change between the parts of one run.
FREE = ("mesh.", "checkpoint.", "log.", "train.skip_nonfinite", "train.remat")
# Its content counts, not its name; see `fingerprints`.
FREE += ("prune.budget_table",)
# All that `run` and `compare` leave. Tokens in `cache` serve any recipe. What
# says whose directory it is goes last: a kill in between leaves it claimed.
LEFT = (
  *("model", "model.gguf", "checkpoints", "oneshot", "tensorboard"),
  *("pruning.json", "evaluated.json", "trace.jsonl", "kept.json"),
  *("metrics.jsonl", "report.json", "report.html", "summary.json"),
  *("tracker.json", "profile"),
  *("compare.json", "compare.md", "compare.svg", "compare.png"),
  TABLE,
  RECIPE,
)


def is_anew(
  recipe: Config, path: Path, overwrite: bool, finished: bool
) -> bool:
  """Whether what is in the work directory has to go before this recipe runs.

  Args:
    overwrite: another recipe's run, or a finished one of this recipe, may go.
      An unfinished one of this recipe goes on, as after a kill.
    finished: the run that is there has nothing left to do.

  Raises:
    UserError: the directory is of a run with another recipe and may not be
      overwritten; or what is in it and would be replaced is of no run.
  """
  return agreement.decided(lambda: _is_anew(recipe, path, overwrite, finished))


def _is_anew(
  recipe: Config, path: Path, overwrite: bool, finished: bool
) -> bool:
  stored = _stored(path, overwrite)
  if stored is None:
    return False
  others = changed(stored, dataclasses.asdict(recipe))
  if others and not overwrite:
    mine, theirs = package_version(), stored.get(VERSION, "an earlier version")
    versions = "" if theirs == mine else f", begun by {theirs} (this is {mine})"
    raise UserError(
      f"--workdir={path} belongs to a run with another recipe{versions}: "
      f"{'; '.join(others)}; give the old recipe or another --workdir, or "
      "--overwrite to remove that run and start anew"
    )
  return overwrite and (bool(others) or finished)


def changed(stored: dict, recipe: dict) -> list[str]:
  """How two recipes differ in what may not change between parts of a run.

  Args:
    stored: the content of config.json.
    recipe: `dataclasses.asdict` of the one that is asked for.

  Returns:
    As of `config.difference`.
  """
  free = FREE if _says_bos(stored) else (*FREE, "data.bos")
  lines = difference(stored, recipe)
  return [line for line in lines if not line.startswith(free)]


def _stored(path: Path, overwrite: bool) -> dict | None:
  """The content of config.json; None in a directory that no run has claimed."""
  file = path / RECIPE
  stored = json_files.read_json(file) if file.exists() else None
  ours = is_recipe(stored)
  # A table is measured before the directory is claimed.
  others = {p.name for p in path.iterdir()} & {*LEFT} - {TABLE}
  if others and not ours and (overwrite or stored is None):
    raise UserError(
      f"--workdir={path}{' --overwrite' if overwrite else ''}: "
      f"{', '.join(sorted(others))} in it "
      f"{'is' if len(others) == 1 else 'are'} not of a run, whose {RECIPE} "
      "has its recipe; give another --workdir"
    )
  if stored is not None and not _is_recipe(stored):
    raise UserError(
      f"{file} is damaged, it holds no recipe: restore it from a copy, or give "
      "another --workdir"
    )
  return stored


def _is_recipe(stored: Any) -> bool:
  """Whether JSON has sections where a recipe has them."""
  recipe = dataclasses.asdict(Config())
  sections = [name for name, x in recipe.items() if isinstance(x, dict)]
  return isinstance(stored, dict) and all(
    isinstance(stored.get(name, {}), dict) for name in sections
  )


def claim(inputs: Inputs, anew: bool) -> None:
  """Makes the work directory this recipe's, once its inputs are good.

  Args:
    anew: remove first what another run has left, see `is_anew`.

  Raises:
    UserError: the original model is among what would be removed; or a run goes
      on with another model or other calibration data than it began with.
  """
  if anew:
    agreement.on_writer(lambda: _remove(inputs))
    inputs.log.say(f"removed what an earlier run had left in {inputs.path}")
  agreement.on_writer(lambda: _claim(inputs))


def _claim(inputs: Inputs) -> None:
  file, recipe = inputs.path / RECIPE, inputs.recipe
  prints = fingerprints(inputs)
  if not file.exists():
    head = {VERSION: package_version(), "inputs": prints}
    json_files.write_json(file, head | dataclasses.asdict(recipe))
    return
  stored = json_files.read_json(file)
  begin = inputs.tokenizer and inputs.tokenizer.begin_token
  if begin and not _says_bos(stored):
    raise UserError(
      f"the run in {inputs.path} was begun by an earlier version, which put no "
      f"{begin} before windows and rows: to go on give --config.data.bos=none"
    )
  # An earlier version did not say what it read, or not all of it.
  begun = prints | stored.get("inputs", {})
  other_tokens = lambda field: (
    f"--config.{field}={get(recipe, field)} gives other tokens"
  )
  for name, what in (
    ("vocab", "the corpus of the vocabulary leaves other tokens"),
    ("model", f"--config.model.path={recipe.model.path} has other weights"),
    ("linked", f"--config.model.path={recipe.model.path} has other weights"),
    ("latency", "--config.prune.budget_table has other times"),
    ("calibration", other_tokens("calibration.source")),
    ("tuning", other_tokens("calibration.tuning")),
    ("search", other_tokens("prune.search.source")),
    ("evaluation", f"--config.eval.text={recipe.eval.text} is another text"),
  ):
    if begun.get(name) != prints.get(name):
      raise UserError(
        f"{what} than when the run in {inputs.path} began: give what it began "
        "with, or another --workdir"
      )


def _says_bos(stored: dict) -> bool:
  """Whether it knew `data.bos`; before there was none, whatever the model."""
  return "bos" in stored.get("data", {})


def _remove(inputs: Inputs) -> None:
  path, source = inputs.path, to_path(inputs.recipe.model.path)
  if not in_bucket(source):
    source = inputs.original.source
  going = {(path / name).resolve() for name in LEFT}
  if going & {source.resolve(), *source.resolve().parents}:
    raise UserError(
      f"--config.model.path={inputs.recipe.model.path} is among what "
      f"--overwrite would remove from {path}: move it, or give another "
      "--workdir"
    )
  remove_cut_off_exports(path)
  table = inputs.recipe.prune.budget_table
  for name in LEFT:
    if table and to_path(table).resolve() == (path / name).resolve():
      continue  # it is this run's, perhaps measured just before
    try:
      publish.remove(path / name)
    except OSError as error:
      raise UserError(
        f"--overwrite cannot remove {path / name}: {error.strerror}; give "
        "another --workdir"
      ) from error


def remove_cut_off_exports(path: Path) -> None:
  """Deletes what killed processes were writing as the work directory's model.

  Its lock must be held.
  """
  publish.remove_cut_off(path / "model")
  if in_bucket(path):
    return
  for left in path.glob(".model-*"):  # of versions before `publish`
    shutil.rmtree(left, ignore_errors=True)
