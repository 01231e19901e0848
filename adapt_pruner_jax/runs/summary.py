"""summary.json, and the tables at the end of a run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from adapt_pruner_jax.config import Config, Prune
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.evaluation import evaluate, latency
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import budgets
from adapt_pruner_jax.reporting.html import report
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs.fingerprints import versions
from adapt_pruner_jax.runs.inputs import Inputs
from adapt_pruner_jax.runs.state import State
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.storage.places import in_bucket


def summarise(
  state: State, inputs: Inputs, seconds: float, times: dict | None
) -> dict:
  """The content of summary.json, but for the sizes on disk.

  Args:
    seconds: of all processes that worked on this run.
    times: what `measure_latency` gives, if it was asked for.
  """
  full, new = inputs.original.full, state.config
  after, settings = state.stages[-1], inputs.recipe.prune
  evaluations = [x.get("evaluation") for x in (state.before, after)]
  tasks = [x and evaluate.scores(x) for x in evaluations]
  tokens = state.step * inputs.recipe.data.step_tokens
  return {
    "method": inputs.recipe.prune.method,
    "model": inputs.recipe.model.path,
    "params_before": model_config.count_params(full),
    "params_after": model_config.count_params(new),
    "target_params": inputs.target if settings.budget == "params" else None,
    "budget": settings.budget,
    "budget_target": _budget_target(inputs),
    "limits": [
      {"budget": s.budget, "at_most": _with_header(n, s, inputs)}
      | {"after": _with_header(budgets.count(new, s), s, inputs)}
      for s, n in inputs.limits
    ],
    "perplexity_before": state.before.get("perplexity"),
    "perplexity_after": after.get("perplexity"),
    "bits_per_byte_before": state.before.get("bits_per_byte"),
    "bits_per_byte_after": after.get("bits_per_byte"),
    "vocab": _vocabulary(state, inputs),
    # On the dense model's own answers, see `answer_agreement`.
    "answer_agreement": after.get("answer_agreement"),
    "answer_kl": after.get("answer_kl"),
    "bos": inputs.recipe.data.bos,
    # What windows and rows of text start with; null = nothing.
    "begin_token": inputs.tokenizer and inputs.tokenizer.begin_token,
    "tasks_before": tasks[0],
    "tasks_after": tasks[1],
    "latency": times,
    "train_tokens": tokens,
    "epochs": round(inputs.rows.epochs(tokens), 4) if inputs.rows else 0.0,
    "seconds": round(seconds, 3),
    "heads_before": list(full.heads()),
    "heads_after": list(new.heads()),
    "kv_heads_before": list(full.kv_groups),
    "kv_heads_after": list(new.kv_groups),
    "ffn_before": list(full.ffn_widths),
    "ffn_after": list(new.ffn_widths),
    "stages": state.stages,
    "evaluation_before": evaluations[0],
    "prune_steps": len(state.trace),
    "refit": inputs.recipe.prune.refit,
    "versions": versions(),
    "hardware": hardware(),
  }


def _budget_target(inputs: Inputs) -> float | int | None:
  """The target in its own unit, with what an export has beside weights."""
  target, settings = inputs.target, inputs.recipe.prune
  if settings.budget == "quality":
    return settings.budget_value
  return target and _with_header(target, settings, inputs)


def _with_header(amount: int, settings: Prune, inputs: Inputs) -> float | int:
  extra = inputs.beside if settings.budget == "bytes" else 0
  return budgets.value(amount + extra, settings)


def _vocabulary(state: State, inputs: Inputs) -> dict | None:
  """What was cut of the vocabulary, and what it alone cost; None = nothing."""
  if inputs.whole is None:
    return None
  cut = state.before.get("vocab", {})
  return {
    "tokens_before": inputs.whole.full.vocab_size,
    "tokens_after": inputs.full.vocab_size,
    "params_after": model_config.count_params(inputs.full),
    "bits_per_byte_after": cut.get("bits_per_byte"),
  }


def disk_sizes(source: Path, exported: Path) -> dict[str, int]:
  """Bytes of the weights' files, before and after."""
  return {
    "bytes_before": weight_bytes(source),
    "bytes_after": weight_bytes(exported),
  }


def weight_bytes(folder: Path) -> int:
  """Bytes of a model's safetensors files, or of all files without any."""
  if in_bucket(folder):
    sizes = {n: i["size"] for n, i in folder.files().items()}
    of_weights = [n for n in sizes if n.endswith(".safetensors")]
    return sum(sizes[name] for name in of_weights or sizes)
  if folder.is_file():
    return folder.stat().st_size
  for pattern in ("model.safetensors", "model-*.safetensors", "**/*"):
    files = [file for file in folder.glob(pattern) if file.is_file()]
    if files:
      return sum(file.stat().st_size for file in files)
  return 0


def in_bytes(size: float) -> str:
  """Bytes for people: 10^9 are a GB."""
  return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


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
  rows = []
  if summary.get("budget", "params") != "params":
    amounts = summary["budget_before"], summary["budget_after"]
    change = f"{amounts[1] / amounts[0] - 1:+.1%}" if amounts[0] else ""
    shown = [f"{x:,.3f}" if isinstance(x, float) else f"{x:,}" for x in amounts]
    unit = budgets.UNIT[summary["budget"]]
    if summary["budget"] == "quality":
      unit = "worse on the tuning text, nats or share of accuracy"
    rows.append((unit, *shown, change))
  rows += [
    ("parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
  ]
  if "bytes_before" in summary:  # one by an earlier version has none
    low, high = summary["bytes_before"], summary["bytes_after"]
    change = f"{high / low - 1:+.1%}" if low else ""
    rows.append(("on disk", in_bytes(low), in_bytes(high), change))
  if vocab := summary.get("vocab"):
    tokens = vocab["tokens_before"], vocab["tokens_after"]
    change = f"{tokens[1] / tokens[0] - 1:+.1%}"
    rows.append(("tokens", f"{tokens[0]:,}", f"{tokens[1]:,}", change))
    if summary["perplexity_after"] is not None:
      names = ("bits_per_byte_before", "bits_per_byte_after")
      rows.append(_change("bits per byte", *(summary[n] for n in names)))
  elif summary["perplexity_after"] is not None:
    low, high = summary["perplexity_before"], summary["perplexity_after"]
    start = summary.get("begin_token")  # an older run has none
    name = f"perplexity, windows from {start}" if start else "perplexity"
    rows.append(_change(name, low, high))
  if summary.get("answer_kl") is not None:  # of the dense model: itself
    alike = summary["answer_agreement"]
    rows.append(_change("the dense model's next token, share", 1.0, alike))
    rows.append(_change("KL to it, nats a token", 0.0, summary["answer_kl"]))
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
  """The perplexity after the run, if there is one."""
  value = summary["perplexity_after"]
  return "" if value is None else f"{float(value):.3f}"


def _change(name: str, low: Any, high: Any) -> tuple[str, ...]:
  low, high = float(low), float(high)  # JSON has "Infinity" as text
  change = f"{high / low - 1:+.1%}" if low else ""
  return name, f"{low:.3f}", f"{high:.3f}", change


def hardware() -> str:
  """The devices, for people."""
  device = jax.devices()[0]
  return f"{jax.device_count()} x {device.device_kind} ({device.platform})"


def add_control(
  summary: dict, control: dict, recipe: Config, path: Path
) -> dict:
  """Puts a run that pruned in one go beside one in stages, and tells both.

  Args:
    summary: of the run in stages, in the work directory `path`.
    control: of the run with as many tokens after one prune.
  """
  columns = ("params_after", "perplexity_after", "train_tokens", "seconds")
  summary = summary | {"control": {name: control[name] for name in columns}}
  with lock.lock(path), Log(path, **dataclasses.asdict(recipe.log)) as log:
    rows = [
      (name, f"{s['params_after']:,}", f"{s['train_tokens']:,}", shown(s))
      for name, s in (
        (f"{recipe.prune.stages} stages", summary),
        ("one shot, then the same training", control),
      )
    ]
    columns = ("", "parameters", "tokens", "perplexity")
    log.table("Interleaved or in one go", columns, rows)
    if agreement.is_writer():
      json_files.write_json(path / "summary.json", summary)
      report.write(path)
  return summary
