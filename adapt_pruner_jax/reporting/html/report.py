"""One self-contained page about a run: report.html, and report.json beside it.

Made from what the run leaves in its work directory, also while it is still
going on: what is not there yet is left out.
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import is_recipe
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.reporting.html import charts, page
from adapt_pruner_jax.reporting.html.charts import as_number
from adapt_pruner_jax.storage import json_files, publish

HTML = "report.html"


def write(path: Path, tiny: model_config.ModelConfig | None = None) -> Path:
  """Writes report.html and report.json into a work directory.

  Args:
    path: of the work directory.
    tiny: as for `collect`.

  Returns:
    The path of the HTML file.

  Raises:
    UserError: not the work directory of a run, or a damaged file in it.
  """
  found = collect(path, tiny)
  json_files.write_json(path / "report.json", found)
  publish.write_text(path / HTML, page.page(found, path))
  return path / HTML


# ---- What the run left -------------------------------------------------------


def collect(
  path: Path, tiny: model_config.ModelConfig | None = None
) -> dict[str, Any]:
  """All that the report shows, JSON-able; None = not there (yet).

  Args:
    path: of the work directory.
    tiny: the embedded model, which an unfinished run does not lead to.

  Raises:
    UserError: not the work directory of a run, or a damaged file in it.
  """
  file = path / "config.json"
  config = json_files.read_object(file) if file.exists() else {}
  if not is_recipe(config):
    raise UserError(
      f"--workdir={path} is not the work directory of a run: it has no "
      "config.json of one; give the --workdir that `adapt-pruner run` was given"
    )
  summary = None
  if (path / "summary.json").exists():
    summary = json_files.read_object(path / "summary.json")
  trace = json_files.read_lines(path / "trace.jsonl")
  metrics = json_files.read_lines(path / "metrics.jsonl")
  evals = _last_by("stage", (r for r in metrics if r["kind"] == "eval"))
  return {
    "finished": summary is not None,
    "config": config,
    "summary": summary,
    **_beginning(config, summary, trace, tiny),
    "after": _after(trace, summary),
    "trace": trace,
    "train": [row for row in metrics if row["kind"] == "train"],
    "phases": [row for row in metrics if row["kind"] == "phase"],
    "evals": evals,
    "perplexity": _perplexities(summary, evals),
  }


def _beginning(
  config: dict,
  summary: dict | None,
  trace: list[dict],
  tiny: model_config.ModelConfig | None,
) -> dict:
  """The original's sizes, and the target."""
  if summary:
    groups, heads = summary["kv_heads_before"], summary["heads_before"]
    return {
      "before": {"kv_groups": groups, "ffn": summary["ffn_before"]},
      "heads_per_kv_group": _per_group(heads, groups),
      "params_before": summary["params_before"],
      "target_params": summary["target_params"],
    }
  try:
    full = _original(config, tiny)
  except UserError:  # it was moved, say: the first step is nearly the original
    return {
      "before": _layers(trace[0]) if trace else None,
      "heads_per_kv_group": [1] * (len(trace[0]["layers"]) if trace else 0),
      "params_before": None,
      "target_params": config["prune"]["target_params"] or None,
    }
  size = model_config.count_params(full)
  target = config["prune"]["target_params"]
  params = config["prune"].get("budget", "params") == "params"
  if config["prune"]["ratio"] and params:
    target = math.floor(size * (1 - config["prune"]["ratio"]))
  return {
    "before": {"kv_groups": list(full.kv_groups), "ffn": list(full.ffn_widths)},
    "heads_per_kv_group": _per_group(full.heads(), full.kv_groups),
    "params_before": size,
    "target_params": target or None,
  }


def _per_group(heads: Sequence[int], groups: Sequence[int]) -> list[int]:
  """Query heads of a KV group of each layer."""
  return [h // max(k, 1) for h, k in zip(heads, groups, strict=True)]


def _original(
  config: dict, tiny: model_config.ModelConfig | None
) -> model_config.ModelConfig:
  """The original's sizes, without asking a hub.

  Raises:
    UserError: it is not on this machine, or cannot be read.
  """
  path = config["model"]["path"]
  if path == "tiny" and tiny is not None:
    return tiny
  if not os.path.exists(os.path.expanduser(path)):
    raise UserError(f"{path} is not on this machine")
  from adapt_pruner_jax.formats.hf import load

  return load.read_config(path, config["model"]["ignore_fields"])


def _after(trace: list[dict], summary: dict | None) -> charts.Widths | None:
  if summary:
    groups, ffn = summary["kv_heads_after"], summary["ffn_after"]
    return {"kv_groups": groups, "ffn": ffn}
  return _layers(trace[-1]) if trace else None


def _layers(row: dict) -> charts.Widths:
  return {k: [x[k] for x in row["layers"]] for k in ("kv_groups", "ffn")}


def _perplexities(
  summary: dict | None, evals: list[dict]
) -> list[tuple[int, float]]:
  """(stage, perplexity), stage 0 being the original."""
  points = [
    (row["stage"], as_number(row["perplexity"]))
    for row in evals
    if row.get("perplexity") is not None
  ]
  if summary and summary.get("perplexity_before") is not None:
    points = [(0, as_number(summary["perplexity_before"])), *points]
  if len(points) == 1 and summary and summary.get("perplexity_after"):
    last = summary["perplexity_after"]
    points += [(len(summary.get("stages", [1])), as_number(last))]
  return points


def _last_by(field: str, rows: Iterable[dict]) -> list[dict]:
  """The last row for each value of a field, in the order of the values."""
  found = {row[field]: row for row in rows if field in row}
  return [found[key] for key in sorted(found)]
