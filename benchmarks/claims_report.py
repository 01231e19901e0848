"""What claims.py shows: claims.md, and a plot a claim, from its cells.

A number is the mean over seeds, with half the range after it where there are
several. Cells that were not measured leave a dash.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from adapt_pruner_jax.formats import markdown
from adapt_pruner_jax.runs.compare_table import save_figure, style
from adapt_pruner_jax.storage import publish


class Key(NamedTuple):
  """A `claims_bench.Cell` without its seed."""

  base: str
  method: str
  ratio: float
  stages: int
  tokens: int
  rate: float
  change: tuple | None


Results = dict[Key, list[dict]]  # a result for each seed
Lines = dict[str, dict[float, list[dict]]]  # by method and place on the x axis
RATIO = 0.4  # of all tables but the first
TEXTS = ("test", "wikitext")
OURS = ("paper", "paper+refit", "curvature+refit")
SCRATCH = "from_scratch"
NAMES = (  # fixes colours
  *OURS,
  SCRATCH,
  "flap",
  "slicegpt",
  "llm_pruner",
  "uniform",
  "magnitude",
  "shortgpt",
)
HIGHEST = 6.0  # nats above the dense model that a plot shows


def write(found: dict, unit: int, out: Path) -> None:
  """Writes claims.md and the plots.

  Args:
    found: results of `claims_bench.Cell`s.
    unit: tokens of a unit of training.
  """
  results = by_key(found)
  bases = list(dict.fromkeys(key.base for key in results))
  parts = ["# The claims, measured"]
  for base in bases:
    own = of_base(results, base)
    dense = unpruned(own)
    parts += [
      f"## {base}: {dense['params']:,} parameters, loss "
      f"{dense['test']:.3f} (test), {dense['wikitext']:.3f} (wikitext)",
      *claim1(own),
      *decisive(own, unit),
      *claim2(own, unit),
      *claim3(own, unit),
      *ablations(own),
    ]
  publish.write_text(out / "claims.md", "\n\n".join(parts) + "\n")
  for name, lines, label in (
    ("claim1", lines1, "parameters removed, %"),
    ("claim2", lines2, "training tokens"),
    ("claim3", lines3, "stages"),
  ):
    plot(results, bases, lines, label, out / name)


def by_key(found: dict) -> Results:
  results: Results = {}
  for cell, result in sorted(found.items(), key=lambda item: item[0].seed):
    key = Key(*(getattr(cell, name) for name in Key._fields))
    results.setdefault(key, []).append(result)
  return results


def of_base(results: Results, base: str) -> Results:
  return {key: rows for key, rows in results.items() if key.base == base}


def unpruned(own: Results) -> dict:
  """The result of the dense model, which each base begins with."""
  return next(
    rows[0]
    for key, rows in own.items()
    if key.method == "dense" and key.change is None
  )


def untrained(own: Results) -> dict[tuple[str, float], list[dict]]:
  """Results without training or changes, by method and ratio."""
  return {
    (key.method, key.ratio): rows
    for key, rows in own.items()
    if key.ratio and not key.tokens and key.change is None
  }


# ---- Tables ------------------------------------------------------------------


def claim1(own: Results) -> list[str]:
  """Loss of each method at each ratio, without training."""
  plain = untrained(own)
  ratios = sorted({ratio for _, ratio in plain})
  names = list(dict.fromkeys(name for name, _ in plain))
  names.sort(key=lambda name: _mean(plain.get((name, RATIO)), "test"))
  header = ["method"]
  for ratio in ratios:
    header += [f"test, {ratio:.0%}", f"wikitext, {ratio:.0%}"]
  header += ["parameters at 40 %", "CPU s at 40 %"]
  rows = []
  for name in names:
    row = [f"`{name}`"]
    for ratio in ratios:
      cells = plain.get((name, ratio))
      row += [_shown(cells, "test"), _shown(cells, "wikitext")]
    at = plain.get((name, RATIO), [])
    row += [f"{at[0]['params']:,}" if at else "-"]
    row += [_shown(at, "prune_seconds", "{:.0f}")]
    rows.append(row)
  return ["### Claim 1: without training", table(header, rows)]


def decisive(own: Results, unit: int) -> list[str]:
  """Test and wikitext loss by recovery tokens, of one shot and five stages."""
  lines = {}
  for name in OURS:
    rate = chosen_rate(own, name)
    for stages in (1, 5):
      lines[name, stages, rate] = by_tokens(own, name, stages)
  lines = {key: mine for key, mine in lines.items() if mine}
  budgets = sorted({tokens for mine in lines.values() for tokens in mine})
  if len(budgets) < 2:
    return []
  header = ["method", "stages", "rate"]
  header += [_units(b, unit) for b in budgets]
  header += [f"wikitext, {_units(b, unit)}" for b in budgets]
  rows = []
  for (name, stages, rate), mine in lines.items():
    row = [f"`{name}`", str(stages), f"{rate:.0e}"]
    for text in TEXTS:
      row += [_shown(mine.get(b), text) for b in budgets]
    rows.append(row)
  return [
    "### Does the lead survive training? (40 % removed)",
    table(header, rows),
  ]


def claim2(own: Results, unit: int) -> list[str]:
  """Loss by tokens of pruned and random weights; tokens to the same loss."""
  scratch = by_tokens(own, SCRATCH)
  if not scratch:
    return []
  budgets = sorted({*scratch, *by_tokens(own, "paper")} - {0})
  rows = []
  for name in ("paper", "curvature+refit", SCRATCH):
    mine = by_tokens(own, name)
    rows.append([f"`{name}`"] + [_shown(mine.get(b), "test") for b in budgets])
  title = (
    "### Claim 2: pruned and trained, against random weights of that shape"
  )
  shown = table(["method", *[_units(b, unit) for b in budgets]], rows)
  lines = []
  for name in ("paper", "curvature+refit"):
    for tokens, cells in sorted(by_tokens(own, name).items()):
      if tokens:
        lines += [
          f"- `{name}` after {tokens:,} tokens: {reach(scratch, cells, tokens)}"
        ]
  return [title, shown, "\n".join(lines)]


def reach(scratch: dict, cells: list[dict], tokens: int) -> str:
  """How many more tokens random weights need for the loss of `cells`."""
  wanted = _mean(cells, "test")
  points = sorted((b, _mean(rows, "test")) for b, rows in scratch.items())
  for (b0, l0), (b1, l1) in itertools.pairwise(points):
    if l1 <= wanted <= l0:
      share = (l0 - wanted) / (l0 - l1)
      needed = math.exp(math.log(b0) + share * math.log(b1 / b0))
      return f"random weights need {needed / tokens:.0f} times as many"
  last, loss = points[-1]
  if wanted < loss:
    return (
      f"random weights need more than {last / tokens:.0f} times as many (then "
      f"{loss:.3f} against {wanted:.3f})"
    )
  return f"random weights need fewer than {points[0][0] / tokens:.0f} times"


def claim3(own: Results, unit: int) -> list[str]:
  """Loss by number of stages, at equal tokens."""
  found = {name: by_stages(own, name) for name in OURS}
  found = {name: mine for name, mine in found.items() if len(mine[1]) > 1}
  if not found:
    return []
  counts = sorted({n for _, mine in found.values() for n in mine})
  rows = [
    [f"`{name}`", *[_shown(mine.get(n), "test") for n in counts]]
    for name, (_, mine) in found.items()
  ]
  tokens = max(tokens for tokens, _ in found.values())
  title = f"### Claim 3: {_units(tokens, unit)} in more stages (40 % removed)"
  return [title, table(["method", *[f"{n} stage(s)" for n in counts]], rows)]


def ablations(own: Results) -> list[str]:
  """A method with one setting changed."""
  rows = []
  for key, cells in own.items():
    if key.change is None:
      continue
    same = own.get(key._replace(change=None))
    name, value = key.change
    rows.append(
      [
        f"`{key.method}`",
        f"`{name}`",
        str(value),
        f"{key.tokens:,}",
        *(_shown(x, text) for text in TEXTS for x in (cells, same)),
      ]
    )
  if not rows:
    return []
  header = ["method", "setting", "value", "tokens"]
  for text in TEXTS:
    header += [text, f"{text}, unchanged"]
  return ["### One setting changed (40 % removed)", table(header, rows)]


def by_tokens(
  own: Results, name: str, stages: int = 1
) -> dict[int, list[dict]]:
  """Results by tokens, at the chosen rate."""
  rate = chosen_rate(own, name)
  return {
    key.tokens: rows
    for key, rows in own.items()
    if (key.method, key.ratio, key.stages) == (name, RATIO, stages)
    and key.rate in (0, rate)
    and key.change is None
  }


def by_stages(own: Results, name: str) -> tuple[int, dict[int, list[dict]]]:
  """The tokens that most runs in stages had, and results at these by stages."""
  rate = chosen_rate(own, name)
  runs = {
    key: rows
    for key, rows in own.items()
    if (key.method, key.ratio, key.rate) == (name, RATIO, rate)
    and key.change is None
  }
  numbers: dict[int, int] = {}
  for key, rows in runs.items():
    if key.stages > 1:
      numbers[key.tokens] = numbers.get(key.tokens, 0) + len(rows)
  if not numbers:
    return 0, {}
  most = max(numbers, key=numbers.get)
  return most, {k.stages: rows for k, rows in runs.items() if k.tokens == most}


def chosen_rate(own: Results, name: str) -> float:
  """The rate that most runs have: the chosen one of the grid; 0 if none."""
  runs: dict[float, int] = {}
  for key, rows in own.items():
    if key.method == name and key.tokens and key.change is None:
      runs[key.rate] = runs.get(key.rate, 0) + len(rows)
  return max(runs, key=runs.get, default=0.0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return markdown.table(header, rows, numbers=header[1:])


def _mean(cells: list[dict] | None, text: str) -> float:
  return float(np.mean([c[text] for c in cells])) if cells else math.inf


def _shown(cells: list[dict] | None, text: str, form: str = "{:.3f}") -> str:
  if not cells:
    return "-"
  values = [c[text] for c in cells]
  half = np.ptp(values) / 2
  shown = form.format(np.mean(values))
  return f"{shown} ± {form.format(half)}" if len(values) > 1 else shown


def _units(tokens: int, unit: int) -> str:
  return f"{round(tokens / unit)} x {unit:,} tokens" if tokens else "0 tokens"


# ---- Plots -------------------------------------------------------------------


def plot(
  results: Results, bases: list[str], lines: Callable, label: str, path: Path
) -> None:
  """A panel for each base that has such lines, as SVG and PNG."""
  panels = {}
  for base in bases:
    own = of_base(results, base)
    found = {name: points for name, points in lines(own).items() if points}
    if found:
      panels[base] = found, unpruned(own)["test"]
  if not panels:
    return
  across = min(len(panels), 2)
  down = -(-len(panels) // across)
  figure = Figure((2 + 4 * across, 1 + 3.5 * down), layout="constrained")
  axes = figure.subplots(down, across, squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  handles = {}
  for axis, (base, (found, dense)) in zip(
    axes.flat[: len(panels)], panels.items(), strict=True
  ):
    for name, points in found.items():
      draw(axis, name, points)
    axis.axhline(dense, color="0.5", linestyle=":", label="dense")
    axis.set_title(base)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(top=min(axis.get_ylim()[1], dense + HIGHEST))
    if "tokens" in label:
      axis.set_xscale("log")
    else:
      axis.set_xticks(sorted({x for points in found.values() for x in points}))
    shown, names = axis.get_legend_handles_labels()
    handles |= dict(zip(names, shown, strict=True))
  for axis in axes[:, 0]:
    axis.set_ylabel("loss, nats per token")
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=5,
    frameon=False,
  )
  save_figure(figure, path)


def lines1(own: Results) -> Lines:
  """By parameters removed, in per cent, without training."""
  found: Lines = {}
  for (name, ratio), rows in untrained(own).items():
    found.setdefault(name, {})[100 * ratio] = rows
  return found


def lines2(own: Results) -> Lines:
  """By training tokens, in one go."""
  found = {name: by_tokens(own, name) for name in (*OURS, SCRATCH)}
  return {
    name: {n: rows for n, rows in points.items() if n}
    for name, points in found.items()
  }


def lines3(own: Results) -> Lines:
  """By number of stages."""
  return {name: by_stages(own, name)[1] for name in OURS}


def draw(axis, name: str, points: dict[float, list[dict]]) -> None:
  """One method; it has the same colour in all panels."""
  xs = sorted(points)
  values = [[c["test"] for c in points[x]] for x in xs]
  axis.errorbar(
    xs,
    [np.mean(v) for v in values],
    yerr=[np.ptp(v) / 2 for v in values],
    **style(NAMES.index(name)),
    capsize=2,
    label=name,
  )
