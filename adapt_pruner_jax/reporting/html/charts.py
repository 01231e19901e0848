"""The report's charts, each a `<div class="chart">` with SVG."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapt_pruner_jax.reporting.html import svg
from adapt_pruner_jax.reporting.html.svg import DEPTH, DIVERGING, REMOVED, TONE

POINTS = 400  # of a line; longer ones are thinned out

Widths = Mapping[str, Sequence[int]]  # {"kv_groups": [L], "ffn": [L]}
Row = Mapping[str, Any]  # a line of trace.jsonl or metrics.jsonl


def removed(before: Widths, trace: Sequence[Row], group: Sequence[int]) -> str:
  """Heads and MLP width of each layer: what is left, what went when.

  Args:
    group: query heads of a KV group of each layer.
  """
  stages = widths_by_stage(before, trace)
  last = stages[-1]
  sizes = " and ".join(map(str, sorted({*group})))
  together = f" (removed in groups of {sizes})" if {*group} - {1} else ""
  titles = {"kv_groups": f"Attention heads{together}", "ffn": "MLP width"}
  scale = {"kv_groups": np.array(group), "ffn": 1}

  def draw(figure, narrow, tooltips):
    for axes, kind in zip(figure.subplots(2, 1), before, strict=True):
      whole, kept = (np.array(w[kind]) * scale[kind] for w in (before, last))
      layers = np.arange(len(whole))
      parts = [("kept", TONE["kept"], np.zeros_like(kept), kept)]
      # What the last stage took lies nearest to what is left.
      for i in reversed(range(1, len(stages))):
        low = np.array(stages[i][kind]) * scale[kind]
        high = np.array(stages[i - 1][kind]) * scale[kind]
        tint = bucket(i - 1, len(stages) - 2, REMOVED)
        parts.append((f"stage{i}", TONE[f"removed{tint}"], low, high))
      for part, colour, low, high in parts:
        bars = axes.bar(layers, high - low, 0.82, low, color=colour)
        for layer, bar in enumerate(bars):
          if high[layer] > low[layer]:
            gid = f"{kind}-{part}-{layer}"
            bar.set_gid(gid)
            tooltips[gid] = f"layer {layer}: {whole[layer]:,} → {kept[layer]:,}"
          else:
            bar.remove()
      axes.set_title(titles[kind])
      axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
      _layer_axis(axes, len(layers))
    axes.set_xlabel("layer")

  return svg.render(
    draw, "removed", 4.2, "Heads and MLP width left in each layer"
  )


def importance(trace: Sequence[Row]) -> str:
  """Relative importance of each layer, a row a stage (or a step)."""
  rows, label = importance_rows(trace)

  def draw(figure, narrow, tooltips):
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    for y, (name, values) in enumerate(rows):
      for layer, value in enumerate(values):
        if value is None:
          continue
        level = bucket(value + 1, 2, DIVERGING)
        gid = f"cell-{y}-{layer}"
        axes.add_patch(
          Rectangle(
            (layer - 0.46, y - 0.44),
            0.92,
            0.88,
            color=TONE[f"importance{level}"],
            linewidth=0,
            gid=gid,
          )
        )
        tooltips[gid] = f"{label} {name}, layer {layer}: {value:+.2f}"
    axes.set_ylim(len(rows) - 0.5, -0.5)
    shown = range(0, len(rows), -(-len(rows) // 10))
    axes.set_yticks(list(shown), [str(rows[i][0]) for i in shown])
    axes.set_ylabel(label)
    axes.grid(False)
    _layer_axis(axes, len(rows[0][1]))
    axes.set_xlabel("layer")

  height = 0.9 + 0.22 * len(rows)
  return svg.render(draw, "importance", height, "Importance of each layer")


def sparsity(before: Widths, trace: Sequence[Row]) -> str:
  """Share of each layer that is gone, over the pruning steps."""

  def draw(figure, narrow, tooltips):
    shape = (2, 1) if narrow else (1, 2)
    panels = figure.subplots(*shape, sharex=True, sharey=True).ravel()
    titles = {"kv_groups": "Heads", "ffn": "MLP width"}
    for axes, kind in zip(panels, before, strict=True):
      for layer, whole in enumerate(before[kind]):
        if not whole:
          continue
        left = [row["layers"][layer][kind] for row in trace]
        gone = 100 * (1 - np.array([whole, *left]) / whole)
        colour = TONE[f"depth{bucket(layer, len(before[kind]) - 1, DEPTH)}"]
        gid = f"path-{kind}-{layer}"
        axes.plot(
          gone, color=colour, gid=gid, linewidth=1.2, drawstyle="steps-post"
        )
        tooltips[gid] = f"layer {layer}: {gone[-1]:.1f} % removed"
      _boundaries(axes, stage_starts(trace))
      axes.set_title(f"{titles[kind]}, % removed")
      _whole_numbers(axes)
    panels[-1].set_ylim(bottom=0)  # of both, when both are drawn
    panels[-1].set_xlabel("pruning step")

  return svg.render(
    draw, "sparsity", 2.7, "Share removed from each layer by step", 4.2
  )


def pruning(
  params_before: int | None,
  target: int | None,
  trace: Sequence[Row],
  questions: bool = False,
) -> str:
  """Parameters, and the loss on calibration text, over the pruning steps.

  Args:
    questions: a quality that is kept is of questions.
  """

  def draw(figure, narrow, tooltips):
    shape = (2, 1) if narrow else (1, 2)
    rises = [row.get("rise") for row in trace]
    curve = None not in rises
    left, right = figure.subplots(*shape, sharex=not curve).ravel()
    steps = np.arange(1, len(trace) + 1)
    params = [row["params"] for row in trace]
    if params_before:
      steps, params = np.arange(len(trace) + 1), [params_before, *params]
    left.plot(steps, params, color=TONE["accent"], gid="params")
    if target:
      left.axhline(target, color=TONE["muted"], linestyle="--", linewidth=1)
      left.annotate(
        "target",
        (0.01, target),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=TONE["muted"],
      )
    left.set_title("Parameters")
    left.yaxis.set_major_formatter(lambda value, _: short(value))
    _boundaries(left, stage_starts(trace))
    _whole_numbers(left)
    if curve:
      left.set_xlabel("pruning step")
      _rises(right, params[-len(trace) :], rises, questions)
      return
    right.plot(
      np.arange(1, len(trace) + 1),
      [as_number(row["loss"]) for row in trace],
      color=TONE["accent"],
      gid="calibration-loss",
    )
    right.set_title("Loss on calibration text, before each step")
    _boundaries(right, stage_starts(trace))
    _whole_numbers(right)
    right.set_xlabel("pruning step")

  return svg.render(
    draw, "pruning", 2.7, "Parameters and calibration loss by step", 4.2
  )


def _rises(
  axes, params: Sequence[int], rises: Sequence[float], questions: bool
) -> None:
  """What is lost by size, of a run that keeps a quality."""
  title = "Loss above the original's on the tuning text"
  if questions:
    title = "Share of the original's accuracy lost, tuning questions"
  axes.plot(params, rises, color=TONE["accent"], marker="o", gid="quality")
  axes.set_title(title)
  axes.xaxis.set_major_formatter(lambda value, _: short(value))
  axes.set_xlabel("parameters left")


def training(rows: Sequence[Row]) -> str:
  """Loss and learning rate over the train steps, with stage boundaries."""
  thin = rows[:: -(-len(rows) // POINTS)]

  def draw(figure, narrow, tooltips):
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = {"loss": "Training loss", "learning_rate": "Learning rate"}
    for axes, (field, title) in zip(panels, names.items(), strict=True):
      found = [row for row in thin if field in row]
      axes.plot(
        [row["step"] for row in found],
        [as_number(row[field]) for row in found],
        color=TONE["accent"],
        gid=field,
        linewidth=1.2,
      )
      starts = [
        (after["step"] - 0.5, after["stage"])
        for row, after in itertools.pairwise(rows)
        if row.get("stage") != after.get("stage")
      ]
      _boundaries(axes, starts, named=field == "loss")
      axes.set_title(title)
    panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    _whole_numbers(panels[1])
    panels[1].set_xlabel("train step")

  return svg.render(
    draw, "training", 3.4, "Training loss and learning rate by step"
  )


def perplexity(points: Sequence[tuple[int, float]]) -> str:
  """Perplexity after each stage; stage 0 is the original."""

  def draw(figure, narrow, tooltips):
    axes = figure.subplots()
    stages, values = zip(*points, strict=True)
    axes.plot(stages, values, color=TONE["accent"], gid="perplexity")
    axes.plot(stages, values, "o", color=TONE["accent"], markersize=5)
    for stage, value in points if len(points) <= (6 if narrow else 13) else ():
      axes.annotate(
        f"{value:.4g}", (stage, value), (0, 6), textcoords="offset points",
        ha="center",
      )  # fmt: skip
    axes.margins(x=0.08, y=0.22)
    axes.set_title("Perplexity")
    _whole_numbers(axes)
    axes.set_xlabel("stage (0 = the original)")

  return svg.render(draw, "perplexity", 2.3, "Perplexity after each stage")


def scores(before: Mapping[str, float], after: Mapping[str, float]) -> str:
  """Task scores as pairs of dots."""
  names = [name for name in before if name in after]

  def draw(figure, narrow, tooltips):
    axes = figure.subplots()
    for y, name in enumerate(names):
      pair = (before[name], after[name])
      axes.plot(pair, (y, y), color=TONE["grid"], linewidth=4, zorder=1)
      for value, tone, part in zip(
        pair, ("muted", "accent"), ("before", "after"), strict=True
      ):
        gid = f"{part}-{y}"
        axes.plot([value], [y], "o", color=TONE[tone], markersize=7, gid=gid)
        tooltips[gid] = f"{name} {part}: {value:.4g}"
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")

  height = 0.6 + 0.28 * len(names)
  return svg.render(draw, "scores", height, "Task scores before and after")


# ---- What is drawn -----------------------------------------------------------


def widths_by_stage(before: Widths, trace: Sequence[Row]) -> list[Widths]:
  """Widths of all layers: the original's, then after each stage."""
  ends = {row["stage"]: row for row in trace}  # the last row of a stage stays
  return [before] + [
    {kind: [layer[kind] for layer in row["layers"]] for kind in before}
    for row in ends.values()
  ]


def importance_rows(
  trace: Sequence[Row], most: int = 12
) -> tuple[list[tuple[int, list[float | None]]], str]:
  """Rows of the importance chart, ([(name, [L])], "stage" or "step").

  A stage's row is the mean of its steps. Attention and MLP of a layer have the
  same importance; None = neither may be pruned.
  """

  def values(row: Row) -> list[float | None]:
    pairs = [(x["mlp_importance"], x["attn_importance"]) for x in row["layers"]]
    found = [as_number(b if a is None else a) for a, b in pairs]
    return [None if np.isnan(value) else value for value in found]

  groups: dict[int, list] = {}
  for row in trace:
    groups.setdefault(row["stage"], []).append(values(row))
  label = "stage"
  if len(groups) == 1:
    label, groups = "step", {row["step"]: [values(row)] for row in trace}
  rows = [
    (name, [_mean(column) for column in zip(*found, strict=True)])
    for name, found in groups.items()
  ]
  if len(rows) > most:  # evenly spread, the first and the last among them
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, most).astype(int)]
  return rows, label


def stage_starts(trace: Sequence[Row]) -> list[tuple[float, int]]:
  """(step on the axis, stage) at which each stage but the first begins."""
  return [
    (i + 1, after["stage"])
    for i, (row, after) in enumerate(itertools.pairwise(trace))
    if row["stage"] != after["stage"]
  ]


def bucket(value: float, top: float, number: int) -> int:
  """0 ... number - 1 for a value in [0, top]."""
  if not top:
    return number - 1
  return int(np.clip(round(value / top * (number - 1)), 0, number - 1))


def as_number(value: Any) -> float:
  """A float; JSON has NaN and the infinities as strings, or as null."""
  return float("nan") if value is None else float(value)


def short(value: float) -> str:
  """1234567 -> '1.23M'."""
  for size, letter in (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"):
    if abs(value) >= size:
      return f"{value / size:.3g}{letter}"
  return f"{value:.3g}"


def _mean(values: Sequence[float | None]) -> float | None:
  found = [value for value in values if value is not None]
  return sum(found) / len(found) if found else None


def _layer_axis(axes, num_layers: int) -> None:
  axes.set_xlim(-0.6, num_layers - 0.4)
  _whole_numbers(axes)


def _whole_numbers(axes) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _boundaries(axes, starts, named: bool = False) -> None:
  """Dotted lines where stages begin; with their numbers if there is room."""
  for at, stage in starts:
    axes.axvline(at, color=TONE["muted"], linewidth=0.7, linestyle=":")
    if named and len(starts) <= 12:
      axes.annotate(
        f" {stage}", (at, 0.98), xycoords=("data", "axes fraction"),
        va="top", color=TONE["muted"], fontsize=8,
      )  # fmt: skip
