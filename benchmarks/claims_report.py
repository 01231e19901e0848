"""What claims.py shows: claims.md, and a plot a claim, from its cells.

A number is the mean over seeds, with half the range after it where there are
several. Cells that were not measured leave a dash.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adapt_pruner_jax import workdir
from adapt_pruner_jax.comparison import COLOURS, MARKERS

# One cell for each seed, their key without the seed: see `by_key`.
Key = tuple
Results = dict[Key, list[dict]]
Lines = dict[str, dict[float, list[dict]]]  # by method and place on the x axis
DENSE = ("dense", 0.0, 1, 0, 0.0, None)  # key of the unpruned model
NAMES = (  # fixes colours
  "paper",
  "paper+refit",
  "curvature+refit",
  "from_scratch",
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
    found: results of `claims.Cell`s.
    unit: tokens of a unit of training.
  """
  results = by_key(found)
  bases = list(dict.fromkeys(key[0] for key in results))
  parts = ["# The claims, measured"]
  for base in bases:
    own = {key[1:]: rows for key, rows in results.items() if key[0] == base}
    dense = own.get(DENSE)
    if dense is None:
      continue
    parts += [
      f"## {base}: {dense[0]['params']:,} parameters, loss "
      f"{dense[0]['test']:.3f} (test), {dense[0]['wikitext']:.3f} (wikitext)",
      *claim1(own),
      *decisive(own, unit),
      *claim2(own, unit),
      *claim3(own, unit),
      *ablations(own),
    ]
  workdir.write_text(out / "claims.md", "\n\n".join(parts) + "\n")
  for name, lines, label in (
    ("claim1", lines1, "parameters removed, %"),
    ("claim2", lines2, "training tokens"),
    ("claim3", lines3, "stages"),
  ):
    plot(results, bases, lines, label, out / name)


def by_key(found: dict) -> Results:
  """(base, method, ratio, stages, tokens, rate, change) -> a result a seed."""
  results: Results = {}
  for cell, result in sorted(found.items(), key=lambda item: item[0].seed):
    key = (
      *(cell.base, cell.method, cell.ratio, cell.stages),
      *(cell.tokens, cell.rate, cell.change),
    )
    results.setdefault(key, []).append(result)
  return results


# ---- Tables ------------------------------------------------------------------


def claim1(own: Results) -> list[str]:
  """Loss of each method at each ratio, without training."""
  plain = {k[:2]: rows for k, rows in own.items() if k[2:] == (1, 0, 0.0, None)}
  ratios = sorted({ratio for _, ratio in plain if ratio})
  names = list(dict.fromkeys(name for name, ratio in plain if ratio))
  names.sort(key=lambda name: _mean(plain.get((name, 0.4)), "test"))
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
    at = plain.get((name, 0.4), [])
    row += [f"{at[0]['params']:,}" if at else "-"]
    row += [_shown(at, "prune_seconds", "{:.0f}")]
    rows.append(row)
  return ["### Claim 1: without training", table(header, rows)]


def decisive(own: Results, unit: int) -> list[str]:
  """Test and wikitext loss by recovery tokens, of one shot and five stages."""
  names = ("paper", "paper+refit", "curvature+refit")
  keys = [k for k in own if k[0] in names and k[1] == 0.4 and k[-1] is None]
  chosen = {k for k in keys if not k[3] or _rate_of(own, k) == k[4]}
  budgets = sorted({k[3] for k in chosen})
  if len(budgets) < 2:
    return []
  header = ["method", "stages", "rate"]
  header += [f"{_units(b, unit)}" for b in budgets]
  header += [f"wikitext, {_units(b, unit)}" for b in budgets]
  rows = []
  for name in names:
    for stages in sorted({k[2] for k in chosen if k[0] == name}):
      mine = {k[3]: own[k] for k in chosen if (k[0], k[2]) == (name, stages)}
      if stages not in (1, 5):
        continue
      rate = next((k[4] for k in chosen if k[0] == name and k[3]), 0.0)
      row = [f"`{name}`", str(stages), f"{rate:.0e}"]
      for text in ("test", "wikitext"):
        row += [_shown(mine.get(b), text) for b in budgets]
      rows.append(row)
  return [
    "### Does the lead survive training? (40 % removed)",
    table(header, rows),
  ]


def claim2(own: Results, unit: int) -> list[str]:
  """Loss by tokens of pruned and random weights; tokens to the same loss."""
  scratch = curve(own, "from_scratch")
  if not scratch:
    return []
  budgets = sorted({*scratch, *curve(own, "paper")} - {0})
  rows = []
  for name in ("paper", "curvature+refit", "from_scratch"):
    mine = curve(own, name)
    rows.append([f"`{name}`"] + [_shown(mine.get(b), "test") for b in budgets])
  title = (
    "### Claim 2: pruned and trained, against random weights of that shape"
  )
  shown = table(["method", *[_units(b, unit) for b in budgets]], rows)
  lines = []
  for name in ("paper", "curvature+refit"):
    for tokens, cells in sorted(curve(own, name).items()):
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
  rows, header = [], None
  for name in ("paper", "paper+refit", "curvature+refit"):
    found = by_stages(own, name)
    if len(found[1]) < 2:
      continue
    tokens, mine = found
    header = header or ["method", *[f"{n} stage(s)" for n in sorted(mine)]]
    cells = {n: _shown(r, "test") for n, r in mine.items()}
    counts = [int(h.split()[0]) for h in header[1:]]
    rows.append([f"`{name}`", *[cells.get(n, "-") for n in counts]])
  if header is None:
    return []
  title = f"### Claim 3: {_units(tokens, unit)} in more stages (40 % removed)"
  return [title, table(header, rows)]


def ablations(own: Results) -> list[str]:
  """A method with one setting changed."""
  rows = []
  for key, cells in own.items():
    if key[-1] is None:
      continue
    same = own.get((*key[:-1], None))
    name, value = key[-1]
    rows.append(
      [
        f"`{key[0]}`",
        f"`{name}`",
        str(value),
        f"{key[3]:,}",
        _shown(cells, "test"),
        _shown(same, "test"),
      ]
    )
  if not rows:
    return []
  header = ["method", "setting", "value", "tokens", "test", "unchanged"]
  return ["### One setting changed (40 % removed)", table(header, rows)]


def curve(own: Results, name: str) -> dict[int, list[dict]]:
  """Results at 40 % by tokens, in one go, at the chosen rate."""
  found = {}
  for key, rows in own.items():
    plain = key[:3] == (name, 0.4, 1) and key[-1] is None
    if plain and (not key[3] or key[4] == _rate_of(own, key)):
      found[key[3]] = rows
  return found


def by_stages(own: Results, name: str) -> tuple[int, dict[int, list[dict]]]:
  """Results at 40 % by stages, at the tokens that most were given."""
  numbers: dict[tuple[int, float], int] = {}
  for key, rows in own.items():
    if key[:2] == (name, 0.4) and key[2] > 1 and key[-1] is None:
      numbers[key[3:5]] = numbers.get(key[3:5], 0) + len(rows)
  if not numbers:
    return 0, {}
  most, rate = max(numbers, key=numbers.get)
  return most, {
    k[2]: rows
    for k, rows in own.items()
    if k[:2] == (name, 0.4) and k[3:] == (most, rate, None)
  }


def _rate_of(own: Results, key: Key) -> float:
  """The rate that most seeds have: the chosen one of the grid."""
  seeds: dict[float, int] = {}
  for other, rows in own.items():
    if other[0] == key[0] and other[3] and other[-1] is None:
      seeds[other[4]] = seeds.get(other[4], 0) + len(rows)
  return max(seeds, key=seeds.get)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown, numbers to the right."""
  rule = ["---", *["---:"] * (len(header) - 1)]
  return "\n".join(f"| {' | '.join(r)} |" for r in (header, rule, *rows))


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
    own = {k[1:]: rows for k, rows in results.items() if k[0] == base}
    found = {name: points for name, points in lines(own).items() if points}
    if found:
      panels[base] = found, own[DENSE][0]["test"]
  if not panels:
    return
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "c"}):
    figure = Figure((2 + 4 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for axis, (base, (found, dense)) in zip(axes, panels.items(), strict=True):
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
        axis.set_xticks(
          sorted({x for points in found.values() for x in points})
        )
      shown, names = axis.get_legend_handles_labels()
      handles |= dict(zip(names, shown, strict=True))
    axes[0].set_ylabel("loss, nats per token")
    figure.legend(
      handles.values(),
      handles.keys(),
      loc="outside lower center",
      ncols=5,
      frameon=False,
    )
    for kind in ("svg", "png"):
      metadata = {"Date": None} if kind == "svg" else None
      figure.savefig(f"{path}.{kind}", dpi=120, metadata=metadata)


def lines1(own: Results) -> Lines:
  """By parameters removed, in per cent, without training."""
  found: Lines = {}
  for key, rows in own.items():
    if key[1] and key[2:] == (1, 0, 0.0, None):
      found.setdefault(key[0], {})[100 * key[1]] = rows
  return found


def lines2(own: Results) -> Lines:
  """By training tokens, in one go."""
  found = {name: curve(own, name) for name in NAMES}
  return {
    name: {n: rows for n, rows in points.items() if n}
    for name, points in found.items()
    if len(points) > 1
  }


def lines3(own: Results) -> Lines:
  """By number of stages."""
  return {name: by_stages(own, name)[1] for name in NAMES}


def draw(axis, name: str, points: dict[float, list[dict]]) -> None:
  """One method; it has the same colour in all panels."""
  number = NAMES.index(name)
  xs = sorted(points)
  values = [[c["test"] for c in points[x]] for x in xs]
  axis.errorbar(
    xs,
    [np.mean(v) for v in values],
    yerr=[np.ptp(v) / 2 for v in values],
    color=COLOURS[number % len(COLOURS)],
    marker=MARKERS[number % len(MARKERS)],
    linestyle="-" if number < len(COLOURS) else "--",
    capsize=2,
    label=name,
  )
