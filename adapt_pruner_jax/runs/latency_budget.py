"""A budget in milliseconds: the table that it is counted by, and whether the
finished model keeps what the table promised."""

import dataclasses
import statistics
from pathlib import Path

from adapt_pruner_jax.config import Config, Prune, latency_table
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import profile
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.storage import json_files, places, publish

TABLE = "latency.json"  # in the work directory, if it was measured for the run


def resolve(
  recipe: Config, whole: ModelConfig, full: ModelConfig, path: Path, log: Log
) -> Config:
  """The recipe with its latency table, measured here unless one is given.

  Args:
    whole: the original, which is measured.
    full: the model to prune, whose vocabulary may be cut.
    path: the work directory, which keeps what was measured.

  Raises:
    UserError: the table is of another model or device, or no table; or there
      is none and the work directory is in a bucket.
  """
  settings = recipe.prune
  if not settings.counts("latency"):
    return recipe
  file = settings.budget_table
  if not file:
    if places.in_bucket(path):
      raise UserError(
        f"--workdir={path}: a run in a bucket needs its table of times before: "
        "adapt-pruner profile --model=DIR --out=table.json, then "
        "--config.prune.budget_table=table.json"
      )
    file = str(path / TABLE)
    agreement.on_writer(lambda: _measure(recipe, whole, path / TABLE, log))
    publish.require_shared(path / TABLE)
  settings = dataclasses.replace(settings, budget_table=file)
  engine = latency_table.read(file)["engine"]
  here = engine if engine in profile.ENGINES else "jax"
  budgets.check_table(full, settings, profile.device_name(here))
  return dataclasses.replace(recipe, prune=settings)


def _measure(recipe: Config, whole: ModelConfig, file: Path, log: Log) -> None:
  if file.exists():
    return
  log.say("timing attention and MLPs of a few widths on this device")
  dtype = recipe.model.dtype or "float32"
  table = profile.profile(whole, case(recipe.prune), dtype=dtype, say=log.say)
  json_files.write_json(file, table)


def case(settings: Prune) -> profile.Case:
  """What the recipe's latency is of."""
  s = settings
  return profile.Case(s.budget_phase, s.budget_batch, s.budget_context)


def compare(
  settings: Prune,
  before: tuple[ModelConfig, Params],
  after: tuple[ModelConfig, Params],
  folders: tuple[Path, Path],
) -> dict | None:
  """The finished model against the original, in turns, and the promise.

  Args:
    settings: of a recipe that `resolve` gave.
    before, after: the pairs.
    folders: of their files, which Transformers opens.

  Returns:
    `promised_ms` and `measured_ms`, each with the original's beside it, and
    `ratio_promised` and `ratio_measured`, medians of the pairs; None of an
    engine or a device that is not here, or where no latency is limited.
  """
  if not settings.counts("latency"):
    return None
  counted = dataclasses.replace(settings, budget="latency")
  first, last = (
    budgets.value(budgets.count(config, counted), counted)
    for config, _ in (before, after)
  )
  table = latency_table.read(settings.budget_table)
  engine = table["engine"]
  found = {
    "engine": engine,
    "device": table["device"],
    "of": budgets.phase(settings),
    "original_promised_ms": first,
    "promised_ms": last,
    "ratio_promised": last / first,
  }
  here = engine in profile.ENGINES
  if not here or profile.device_name(engine) != table["device"]:
    return found | {"measured_ms": None}
  models = (before, after) if engine == "jax" else folders
  timers = [profile.timer(engine, model, case(settings)) for model in models]
  old, new = profile.in_turns(*timers, profile.PAIRS)
  ratios = [b / a for a, b in zip(old, new, strict=True)]
  return found | {
    "pairs": profile.PAIRS,
    "original_measured_ms": statistics.median(old),
    "measured_ms": statistics.median(new),
    "ratio_measured": statistics.median(ratios),
  }


def of_row(
  settings: Prune,
  dense: tuple[ModelConfig, Params],
  pair: tuple[ModelConfig, Params],
) -> dict:
  """`compare` of a row, where a latency is limited and JAX is what it is of;
  others open files, and a row has none."""
  if not settings.counts("latency"):
    return {}
  if latency_table.read(settings.budget_table)["engine"] != "jax":
    return {}
  found = compare(settings, dense, pair, ())
  return {"latency": found, "measured_ms": found["measured_ms"]}


def text(found: dict) -> str:
  """Promise, measurement and their difference, in a line."""
  promised = (
    f"latency ({found['of']}, {found['engine']}): promised "
    f"{found['promised_ms']:.3f} ms, {found['ratio_promised']:.3f} of the "
    "original's"
  )
  if found["measured_ms"] is None:
    return f"{promised}; not measured, since it is of {found['device']}"
  off = found["measured_ms"] / found["promised_ms"] - 1
  return (
    f"{promised}; measured {found['measured_ms']:.3f} ms ({off:+.1%}), "
    f"{found['ratio_measured']:.3f} of the original's, medians of "
    f"{found['pairs']} pairs"
  )
