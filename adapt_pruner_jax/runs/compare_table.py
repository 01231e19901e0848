"""What `compare` shows: a table, in Markdown too, and a plot."""

import math
import shlex
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import Config, field_names, get
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.evaluation import evaluate
from adapt_pruner_jax.formats.markdown import table as markdown_table
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.storage import json_files, publish

JSON, MARKDOWN, PLOT = "compare.json", "compare.md", "compare"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#d55e00",
  "#cc79a7",
  "#56b4e9",
  "#8c7a00",
  "#000000",
)
MARKERS = "osD^vP"


def command(
  config: Config,
  path: Path,
  names: str,
  ratios: str,
  recover_tokens: int,
  from_scratch: bool,
) -> str:
  """A command that makes this comparison, whatever recipe it began with.

  Args:
    config, path, ratios, recover_tokens, from_scratch: as `compare.compare`'s.
    names: its `methods`.
  """
  words = ["--config=configs/paper.py", f"--workdir={path}"]
  words += [f"--methods={names}", f"--ratios={ratios}"]
  words += [f"--recover_tokens={recover_tokens}"] * bool(recover_tokens)
  words += ["--from_scratch"] * from_scratch
  default = Config()
  words += [
    f"--config.{name}={get(config, name)}"
    for name in field_names(config)
    if get(config, name) != get(default, name)
  ]
  return shlex.join(["adapt-pruner", "compare", *words])


def stored_rows(path: Path) -> list[dict]:
  """The rows that an earlier call has finished; failed ones are tried again."""
  file = path / JSON
  rows = agreement.decided(
    lambda: json_files.read_object(file)["rows"] if file.exists() else []
  )
  return [row for row in rows if "error" not in row]


def write(found: dict, path: Path) -> None:
  """Writes compare.json, compare.md and the plots; process 0 does."""
  if not agreement.is_writer():
    return
  plot(found["rows"], path, unit_of(found))
  publish.write_text(path / MARKDOWN, markdown(found))
  json_files.write_json(path / JSON, found)


def tell(found: dict, path: Path, log: Log) -> None:
  """The table on the console, and where the files are."""
  columns, rows = table(found["rows"], unit_of(found))
  log.table("Comparison", columns, rows)
  for row in found["rows"]:
    if "error" in row:
      log.say(f"{row['method']} at {row['ratio']:.0%}: {row['error']}")
  log.say(f"table: {path / MARKDOWN}   plot: {path / f'{PLOT}.svg'}")


def unit_of(found: dict) -> str:
  """The unit of a comparison's budget; "" of parameters."""
  return found["unit"] if found.get("budget", "params") != "params" else ""


def table(
  rows: list[dict], unit: str = ""
) -> tuple[list[str], list[list[str]]]:
  """Columns and cells; a column that no row fills is left out.

  Args:
    unit: of the budget; "" = parameters.
  """
  tasks = list(dict.fromkeys(t for r in rows for t in scores(r)))
  cells = {
    "removed": [f"{row['ratio']:.0%}" for row in rows],
    "method": [row["method"] for row in rows],
    "parameters": [_number(row.get("params"), "{:,}") for row in rows],
    unit or "budget": [_amount(row.get("budget")) * bool(unit) for row in rows],
    "measured, ms": [_amount(row.get("measured_ms")) for row in rows],
    "perplexity": [shown(row.get("perplexity")) for row in rows],
    "before training": [
      shown(row.get("pruned", {}).get("perplexity")) for row in rows
    ],
    "tokens as dense": [
      _number(row.get("answer_agreement"), "{:.1%}") for row in rows
    ],
    "KL to dense": [_number(row.get("answer_kl"), "{:.3f}") for row in rows],
    **{t: [_score(scores(r).get(t)) for r in rows] for t in tasks},
    "seconds": [_number(row.get("seconds"), "{:.1f}") for row in rows],
    "calibration tokens": [
      _number(row.get("calibration_tokens"), "{:,}") for row in rows
    ],
    "training tokens": [
      _number(row.get("train_tokens") or None, "{:,}") for row in rows
    ],
  }
  cells = {name: column for name, column in cells.items() if any(column)}
  return list(cells), [list(row) for row in zip(*cells.values(), strict=True)]


def scores(row: dict) -> dict[str, float]:
  """The scores of a row's tasks; {} without any."""
  return evaluate.scores(row["evaluation"]) if "evaluation" in row else {}


def shown(perplexity: Any) -> str:
  """A perplexity for people; a ruined model's is infinite, or nearly."""
  if perplexity is None:
    return ""
  value = float(perplexity)  # JSON has "Infinity" as text
  return f"{value:.3f}" if value < 1e4 else f"{value:.1e}"


def markdown(found: dict) -> str:
  """The table as Markdown, with the command that makes it."""
  columns, rows = table(found["rows"], unit_of(found))
  numbers = {*columns} - {"method"}
  errors = [
    f"- {row['method']} at {row['ratio']:.0%}: {row['error']}"
    for row in found["rows"]
    if "error" in row
  ]
  notes = [
    f"{found['model']}, {found['params']:,} parameters, on "
    f"{found['hardware']}; all methods with the same calibration windows and "
    "the same target. Seconds are of pruning and training, compilation "
    "included, without evaluation."
  ]
  if found.get("windows_start"):
    notes += [f"Perplexity: {found['windows_start']}."]
  if any(row["method"] == "from_scratch" for row in found["rows"]):
    notes += [
      "`from_scratch` has the shape that `adapt` leaves, random weights and a "
      "learning rate of its own."
    ]
  if errors:
    notes += ["What could not be done:", "\n".join(errors)]
  parts = [
    "# Comparison of pruning methods",
    markdown_table(columns, rows, numbers),
    *notes,
  ]
  if _drawable(found["rows"]):
    parts += [f"![perplexity by parameters removed]({PLOT}.svg)"]
  return "\n\n".join([*parts, f"```\n{found['command']}\n```"]) + "\n"


def plot(rows: list[dict], path: Path, unit: str = "") -> None:
  """compare.svg and compare.png: perplexity by what was removed, or by what is
  left of another budget than parameters, in its unit."""
  if not _drawable(rows):
    return
  from matplotlib.figure import Figure

  figure = Figure((8, 4.5), layout="constrained")
  axis = figure.subplots()
  names = list(dict.fromkeys(r["method"] for r in rows if r["ratio"]))
  for number, name in enumerate(names):
    points = [_point(r, unit) for r in rows if r["method"] == name]
    points = [p for p in points if p is not None]
    if points:
      axis.plot(
        *zip(*points, strict=True),
        **style(number),
        label=name,
      )
  dense = [_point(r, unit) for r in rows if not r["ratio"]]
  if dense:
    axis.axhline(dense[0][1], color="0.5", linestyle=":", label="dense")
  axis.set_yscale("log")
  axis.set_xlabel(unit or "parameters removed, %")
  axis.set_ylabel("perplexity (log)")
  axis.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside right upper", frameon=False)
  save_figure(figure, path / PLOT)


def style(number: int) -> dict[str, str]:
  """How the line of the method of this number looks."""
  return {
    "color": COLOURS[number % len(COLOURS)],
    "marker": MARKERS[number % len(MARKERS)],
    "linestyle": "-" if number < len(COLOURS) else "--",
  }


def save_figure(figure: Any, path: Path) -> None:
  """PATH.svg, with text as text, and PATH.png; the same bytes each time."""
  import matplotlib

  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": PLOT}):
    for kind in ("svg", "png"):
      metadata = {"Date": None} if kind == "svg" else None
      file = path.with_name(f"{path.name}.{kind}")
      with publish.file(file) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)


def _drawable(rows: list[dict]) -> bool:
  return any(r["ratio"] and _point(r) is not None for r in rows)


def _point(row: dict, unit: str = "") -> tuple[float, float] | None:
  """(percent removed, perplexity), None if there is no finite one.

  Of another budget than parameters the first is what is left, measured if it is
  a time.
  """
  if row.get("perplexity") is None:
    return None
  value = float(row["perplexity"])
  left = row.get("measured_ms") or row.get("budget")
  at = left if unit else 100 * row["removed"]
  return (at, value) if math.isfinite(value) else None


def _amount(value: Any) -> str:
  return _number(value, "{:,.3f}" if isinstance(value, float) else "{:,}")


def _score(value: float | None) -> str:
  """An accuracy, or the perplexity that some tasks have."""
  return _number(value, "{:.1%}" if value is None or value <= 1 else "{:.3f}")


def _number(value: Any, form: str) -> str:
  return "" if value is None else form.format(value)
