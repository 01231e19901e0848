"""The HTML of the report: what `report.collect` found, put into words.

The page needs no network and no scripts, follows the light or dark setting, and
is fit for a phone. Everything that comes from a file is escaped.
"""

import dataclasses
import html
import shlex
import string
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import Config, difference
from adapt_pruner_jax.evaluation import latency
from adapt_pruner_jax.reporting.html import charts, pieces, speed
from adapt_pruner_jax.reporting.html.charts import as_number
from adapt_pruner_jax.reporting.progress import duration

TEMPLATE = Path(__file__).with_name("page_template.html")
Found = dict[str, Any]  # from `report.collect`


def page(found: Found, path: Path) -> str:
  """The HTML of what `collect` found; everything in it is escaped."""
  title = f"Adapt-Pruner: {path.resolve().name}"
  parts = [
    header(found),
    facts(found),
    removed(found),
    quality(found),
    training(found),
    speed.section(found["phases"], found["train"]),
    decisions(found),
    layer_table(found),
    recipe(found),
    next_steps(found, path),
  ]
  template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
  return template.substitute(
    title=html.escape(title), body="\n".join(filter(None, parts))
  )


def headline(found: Found) -> str:
  """One sentence: what was done and what it cost."""
  summary, config, trace = found["summary"], found["config"], found["trace"]
  name = Path(config["model"]["path"]).name
  if summary is None:
    if not trace:
      return f"{name} is about to be pruned; nothing has been removed yet."
    last = trace[-1]
    return (
      f"{name} is being pruned: {last['params']:,} parameters are left, in "
      f"stage {last['stage']} of {config['prune']['stages']}."
    )
  before, after = summary["params_before"], summary["params_after"]
  text = (
    f"{1 - after / before:.1%} of {name} was removed: {before:,} → {after:,} "
    "parameters"
  )
  if summary.get("perplexity_before") and summary.get("perplexity_after"):
    low = as_number(summary["perplexity_before"])
    high = as_number(summary["perplexity_after"])
    text += f", perplexity {low:.4g} → {high:.4g}"
    if summary.get("begin_token"):
      text += f" (windows start with {summary['begin_token']})"
  if summary.get("seconds"):
    text += f", in {duration(summary['seconds'])}"
  return text + "."


def header(found: Found) -> str:
  """Title and headline."""
  config = found["config"]
  prune = config["prune"]
  badge = (
    '<span class="badge">finished</span>'
    if found["finished"]
    else '<span class="badge running">in progress</span>'
  )
  sub = [config["model"]["path"], f"method {prune['method']}"]
  if found["summary"]:
    sub.append(found["summary"].get("hardware", ""))
  return (
    f'<header>{badge}<p class="headline">{html.escape(headline(found))}</p>'
    f'<p class="sub">{html.escape(" · ".join(filter(None, sub)))}</p></header>'
  )


def facts(found: Found) -> str:
  """The numbers of the run, a card each."""
  summary, trace = found["summary"] or {}, found["trace"]
  cards = []

  def card(value: str, label: str) -> None:
    cards.append(
      f'<div class="fact"><b>{html.escape(value)}</b>'
      f"<span>{html.escape(label)}</span></div>"
    )

  before, target = found["params_before"], found["target_params"]
  after = summary.get("params_after") or (
    trace[-1]["params"] if trace else None
  )
  if before and after:
    card(
      f"−{1 - after / before:.1%}", f"parameters, {charts.short(after)} left"
    )
  elif after:
    card(charts.short(after), "parameters now")
  if target:
    card(charts.short(target), "parameters aimed at")
  points = found["perplexity"]
  if len(points) > 1 and points[0][0] == 0:
    change = points[-1][1] / points[0][1] - 1
    card(f"{change:+.1%}".replace("-", "−"), "perplexity (lower is better)")
  if times := summary.get("latency"):
    card(f"{times['decode_speedup']:.2f}×", "speed of decoding")
  if summary.get("train_tokens"):
    card(charts.short(summary["train_tokens"]), "training tokens")
  elif found["train"]:
    card(f"{found['train'][-1]['step'] + 1:,}", "train steps so far")
  if summary.get("seconds"):
    card(duration(summary["seconds"]), "time")
  return f'<div class="facts">{"".join(cards)}</div>' if cards else ""


def removed(found: Found) -> str:
  """What went of each layer, and when."""
  if not found["trace"]:
    return ""
  stages = len({row["stage"] for row in found["trace"]})
  tints = [f"removed{i}" for i in range(charts.REMOVED)]
  legend = pieces.legend(
    [
      (["kept"], "kept"),
      (tints if stages > 1 else tints[-1:], _when(stages)),
    ]
  )
  return pieces.section(
    "What was removed",
    "Each bar is a layer of the original model: its whole height is what the "
    "layer had, the blue part is what is left.",
    legend
    + charts.removed(
      found["before"], found["trace"], found["heads_per_kv_group"]
    ),
  )


def _when(stages: int) -> str:
  return f"removed, stage 1 to {stages}" if stages > 1 else "removed"


def quality(found: Found) -> str:
  """Perplexity, task scores, latency, and the one-shot control."""
  summary = found["summary"] or {}
  parts = []
  if len(found["perplexity"]) > 2:
    parts.append(charts.perplexity(found["perplexity"]))
  rows = []
  points = found["perplexity"]
  if len(points) > 1 and points[0][0] == 0:
    rows.append(pieces.change("perplexity", points[0][1], points[-1][1]))
  bits = [summary.get(f"bits_per_byte_{when}") for when in ("before", "after")]
  if None not in bits:  # of another vocabulary, perplexities do not compare
    rows.append(pieces.change("bits per byte", *bits))
  if summary.get("answer_kl") is not None:  # the original is like itself
    alike = as_number(summary["answer_agreement"])
    rows.append(pieces.change("the original's next token, share", 1.0, alike))
    kl = as_number(summary["answer_kl"])
    rows.append(pieces.change("KL to the original, nats a token", 0.0, kl))
  low = summary.get("tasks_before") or {}
  high = summary.get("tasks_after") or {}
  if set(low) & set(high):
    parts.append(pieces.legend([(["muted"], "before"), (["accent"], "after")]))
    parts.append(charts.scores(low, high))
  rows += [pieces.change(n, low[n], high[n]) for n in low if n in high]
  if times := summary.get("latency"):
    rows += [
      pieces.change(label, times["before"][name], times["after"][name])
      for name, label in latency.TIMES.items()
    ]
  if rows:
    parts.append(pieces.table(("", "before", "after", "change"), rows))
  if times:
    parts.append(f"<p>{html.escape('Speed: ' + times['text'])}.</p>")
  if control := summary.get("control"):
    columns = ("", "parameters", "training tokens", "perplexity")
    names = (
      (f"pruned in {found['config']['prune']['stages']} stages", summary),
      ("pruned in one go, then the same training", control),
    )
    rows = [
      (
        name,
        f"{each['params_after']:,}",
        f"{each['train_tokens']:,}",
        pieces.shown(each["perplexity_after"]),
      )
      for name, each in names
    ]
    parts.append(pieces.table(columns, rows))
  if not parts:
    return ""
  return pieces.section(
    "What it cost in quality", "Before pruning and now.", "".join(parts)
  )


def training(found: Found) -> str:
  """Loss and rate over the train steps; empty without training."""
  if len(found["train"]) < 2:
    return ""
  return pieces.section(
    "Training",
    "Recovery training after each prune; dotted lines are where a stage "
    "begins.",
    charts.training(found["train"]),
  )


def decisions(found: Found) -> str:
  """Why the layers were pruned as they were, step by step."""
  trace = found["trace"]
  if not trace:
    return ""
  parts = []
  rows, _ = charts.importance_rows(trace)
  if any(value is not None for _, values in rows for value in values):
    scale = [f"importance{i}" for i in range(charts.DIVERGING)]
    legend = pieces.legend(
      [(scale, "less important, pruned more → more important")]
    )
    text = (
      "Adapt-Pruner takes more from layers that change their input less. "
      "Importance is relative: −1 is the least important layer, +1 the most."
    )
    chart = legend + charts.importance(trace)
    parts.append(pieces.section("Importance of each layer", text, chart))
  depth = [f"depth{i}" for i in range(charts.DEPTH)]
  parts.append(
    pieces.section(
      "How the layers were pruned",
      "A line is a layer: the share of it that is gone after each step.",
      pieces.legend([(depth, "first layer → last layer")])
      + charts.sparsity(found["before"], trace),
    )
  )
  parts.append(
    pieces.section(
      "Step by step",
      "Parameters left, and the loss of the model as it was pruned.",
      charts.pruning(
        found["params_before"],
        found["target_params"],
        trace,
        "questions:" in found["config"]["calibration"].get("tuning", ""),
      ),
    )
  )
  return "\n".join(parts)


def layer_table(found: Found) -> str:
  """Widths of each layer before and after."""
  before, after = found["before"], found["after"]
  if not (before and after):
    return ""
  group = found["heads_per_kv_group"]
  rows = []
  for i, (k0, k1, f0, f1) in enumerate(
    zip(
      before["kv_groups"],
      after["kv_groups"],
      before["ffn"],
      after["ffn"],
      strict=True,
    )
  ):
    heads = f"{k0 * group[i]} → {k1 * group[i]}"
    rows.append(
      (str(i), heads, f"{k0} → {k1}", f"{f0:,} → {f1:,}", pieces.gone(f0, f1))
    )
  columns = ("layer", "heads", "KV groups", "MLP width", "of the MLP removed")
  inner = pieces.table(columns, rows)
  return pieces.section(
    "Layer by layer",
    "The same as numbers.",
    f"<details><summary>{len(rows)} layers</summary>{inner}</details>",
  )


def recipe(found: Found) -> str:
  """The fields that differ from the defaults, and where it ran."""
  config, summary = found["config"], found["summary"] or {}
  default = dataclasses.asdict(Config())
  changed = [line.split(": ", 1) for line in difference(default, config)]
  rows = [(name, value.split(" -> ", 1)[-1]) for name, value in changed]
  everything = [
    (f"{section_}.{name}", str(value))
    for section_, fields in config.items()
    if isinstance(fields, dict)
    for name, value in fields.items()
  ] + [(n, str(v)) for n, v in config.items() if not isinstance(v, dict)]
  parts = [pieces.table(("field", "value"), rows, "words")] if rows else []
  parts.append(
    "<details><summary>the whole recipe</summary>"
    + pieces.table(("field", "value"), everything, "words")
    + "</details>"
  )
  versions = list(summary.get("versions", {}).items())
  if summary.get("hardware"):
    versions = [("hardware", summary["hardware"]), *versions]
  if versions:
    inner = pieces.table(("", ""), versions, "words")
    parts.append(
      f"<details><summary>versions and hardware</summary>{inner}</details>"
    )
  return pieces.section(
    "Recipe", "What differs from the defaults.", "".join(parts)
  )


def next_steps(found: Found, path: Path) -> str:
  """The commands that a person is likely to want now."""
  if found["finished"]:
    made = shlex.quote(str(path / "model"))
    other = shlex.quote(str(path / "model_uniform"))
    gguf = shlex.quote(str(path / "model.gguf"))
    parent = shlex.quote(found["config"]["model"]["path"])
    steps = [
      ("Let it write", f"adapt-pruner generate --model={made} --prompt='Once'"),
      (
        "Measure it on tasks",
        f"adapt-pruner evaluate --model={made} --tasks=arc_easy,piqa "
        "--out=after.json",
      ),
      (
        "Open it anywhere, e.g. in vLLM: layers padded to one size",
        f"adapt-pruner convert --model={made} --out={other} "
        "--format=hf_uniform",
      ),
      (
        "Run it in llama.cpp",
        f"adapt-pruner convert --model={made} --out={gguf} --format=gguf",
      ),
      (
        "Prune less or more: another target, in another directory",
        f"adapt-pruner run --workdir=NEW --config.model.path={parent} "
        "--config.prune.ratio=0.1",
      ),
    ]
  else:
    work = shlex.quote(str(path))
    steps = [
      (
        "If the run was cut short, the command that began it goes on where it "
        "stopped",
        f"adapt-pruner run --config=... --workdir={work}",
      ),
      ("Make this page anew", f"adapt-pruner report --workdir={work}"),
    ]
  inner = "".join(
    f"<div>{html.escape(what)}:</div><pre>{html.escape(command)}</pre>"
    for what, command in steps
  )
  return pieces.section("What to do next", "", inner)
