"""summary.json, and the tables at the end of a run."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

from adapt_pruner_jax.evaluation import evaluate, latency
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs.inputs import Setting
from adapt_pruner_jax.runs.state import State


def summarise(
  state: State, setting: Setting, seconds: float, times: dict | None
) -> dict:
  full, new = setting.full, state.config
  after = state.stages[-1]
  evaluations = [x.get("evaluation") for x in (state.before, after)]
  tasks = [x and evaluate.scores(x) for x in evaluations]
  per_step = setting.config.data.step_tokens
  return {
    "method": setting.config.prune.method,
    "model": setting.config.model.path,
    "params_before": model_config.count_params(full),
    "params_after": model_config.count_params(new),
    "target_params": setting.target,
    "perplexity_before": state.before.get("perplexity"),
    "perplexity_after": after.get("perplexity"),
    "bos": setting.config.data.bos,
    # What windows and rows of text start with; null = nothing.
    "begin_token": setting.tokenizer and setting.tokenizer.begin_token,
    "tasks_before": tasks[0],
    "tasks_after": tasks[1],
    "latency": times,
    "train_tokens": state.step * per_step,
    "seconds": round(seconds, 3),
    "heads_before": [k * full.queries_per_group for k in full.kv_groups],
    "heads_after": [k * new.queries_per_group for k in new.kv_groups],
    "kv_heads_before": list(full.kv_groups),
    "kv_heads_after": list(new.kv_groups),
    "ffn_before": list(full.ffn_widths),
    "ffn_after": list(new.ffn_widths),
    "stages": state.stages,
    "evaluation_before": evaluations[0],
    "prune_steps": len(state.trace),
    "refit": setting.config.prune.refit,
    "versions": versions(),
    "hardware": hardware(),
  }


def tell(summary: dict, path: Path, log: Log) -> None:
  """The final table: what was removed per layer, what it cost, where it is."""
  rows = []
  columns = ("kv_heads_before", "kv_heads_after", "ffn_before", "ffn_after")
  layers = zip(*(summary[c] for c in columns), strict=True)
  for i, (k0, k1, f0, f1) in enumerate(layers):
    rows.append(
      (i, f"{k0} -> {k1}", f"{f0} -> {f1}", f"{1 - f1 / (f0 or 1):.0%}")
    )
  log.table(
    "Layers", ("layer", "KV groups", "MLP channels", "MLP removed"), rows
  )
  before, after = summary["params_before"], summary["params_after"]
  rows = [
    ("parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
  ]
  if summary["perplexity_after"] is not None:
    low, high = summary["perplexity_before"], summary["perplexity_after"]
    start = summary.get("begin_token")  # an older run has none
    name = f"perplexity, windows from {start}" if start else "perplexity"
    rows.append(_change(name, low, high))
  for name, low in (summary["tasks_before"] or {}).items():
    rows.append(_change(name, low, summary["tasks_after"][name]))
  if times := summary["latency"]:
    rows += [
      _change(label, times["before"][name], times["after"][name])
      for name, label in latency.TIMES.items()
    ]
  log.table("Result", ("", "before", "after", "change"), rows)
  log.say(f"model: {path / 'model'}   report: {path / 'report.html'}")


def shown(summary: dict) -> str:
  value = summary["perplexity_after"]
  return "" if value is None else f"{float(value):.3f}"


def _change(name: str, low: Any, high: Any) -> tuple[str, ...]:
  low, high = float(low), float(high)  # JSON has "Infinity" as text
  change = f"{high / low - 1:+.1%}" if low else ""
  return name, f"{low:.3f}", f"{high:.3f}", change


def versions() -> dict[str, str]:
  names = ("adapt-pruner-jax", "jax", "flax", "optax", "orbax-checkpoint")
  return {"python": platform.python_version()} | {
    name: importlib.metadata.version(name) for name in names
  }


def hardware() -> str:
  device = jax.devices()[0]
  return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
