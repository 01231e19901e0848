"""Numbers of real_model.py's tables, with their intervals, as they are shown.

Intervals are of 95 %, by paired bootstrap: over windows of a text, over
questions within each task. They say nothing of other seeds. Percentiles are
those of the expanded interval (Hesterberg, arXiv 1411.5279): of eight normal
windows it holds the mean in 94 % of cases, the plain one in 89 %.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats
from real_model_bench import DENSE, Cell
from real_model_questions import from_hex

TEXTS = {
  "c4": "C4",
  "wikitext": "WikiText-2",
  "books": "books",
  "shakespeare": "Shakespeare",
}
TASKS = {  # accuracy by chance
  "arc_easy": 0.25,
  "arc_challenge": 0.25,
  "hellaswag": 0.25,
  "openbookqa": 0.25,
  "piqa": 0.5,
  "winogrande": 0.5,
}
RESAMPLES = 10_000
Results = dict[Cell, dict]


def rises(found: Results, cell: Cell, text: str) -> np.ndarray:
  dense = found[Cell("prune", DENSE)]["texts"][text]
  return np.array(found[cell]["texts"][text]) - dense


def mean_rise(found: Results, cell: Cell) -> float:
  return float(np.mean([rises(found, cell, text) for text in TEXTS]))


def rise(found: Results, cell: Cell, text: str) -> str:
  return shown(rises(found, cell, text).mean(), "+.3f")


def answers(found: Results, cell: Cell) -> dict[str, np.ndarray]:
  """Which questions are right, by task; {} if they were not asked."""
  result = found.get(cell._replace(part="tasks"))
  if result is None:
    return {}
  return {
    task: from_hex(result["correct"][task], result["questions"][task])
    for task in TASKS
    if task in result["correct"]
  }


def accuracy(found: Results, cell: Cell) -> str:
  """Mean over tasks."""
  bits = answers(found, cell)
  if not bits:
    return "-"
  return shown(np.mean([x.mean() for x in bits.values()]), ".3f")


def share_kept(found: Results, cell: Cell, dense: Cell) -> str:
  """Of the dense model's lead over chance, with an interval over questions."""
  mine, theirs = answers(found, cell), answers(found, dense)
  if not mine or not theirs:
    return "-"
  rng = np.random.default_rng(0)
  chance = np.mean([TASKS[task] for task in mine])

  share = lambda own, whole: (own - chance) / (whole - chance)
  pairs = [  # [2, questions]: those that both were asked
    np.stack([*zip(mine[task], theirs[task], strict=False)], 1) for task in mine
  ]
  middle = share(*np.mean([pair.mean(1) for pair in pairs], 0))
  drawn = share(*np.mean([resampled(rng, pair) for pair in pairs], 0))
  low, high = bounds(drawn, min(pair.shape[1] for pair in pairs))
  return f"{shown(middle, '.2f')} ({shown(low, '.2f')} to {shown(high, '.2f')})"


def loss_difference(found: Results, cell: Cell, other: Cell, text: str) -> str:
  gains = rises(found, cell, text) - rises(found, other, text)
  return interval([gains], "+.3f")


def score_difference(found: Results, cell: Cell, other: Cell) -> str:
  """Of the mean over tasks, on the questions that both were asked."""
  mine, theirs = answers(found, cell), answers(found, other)
  if not mine or not theirs or cell == other:
    return "-"
  gains = []
  for task in mine:
    number = min(len(mine[task]), len(theirs[task]))
    gains.append(mine[task][:number] - theirs[task][:number])
  return interval(gains, "+.3f")


def interval(gains: Sequence[np.ndarray], form: str) -> str:
  """Mean over groups of their means, with its interval."""
  rng = np.random.default_rng(0)
  drawn = np.mean([resampled(rng, x) for x in gains], 0)
  low, high = bounds(drawn, min(map(len, gains)))
  mean = np.mean([x.mean() for x in gains])
  return f"{shown(mean, form)} ({shown(low, form)} to {shown(high, form)})"


def resampled(rng: np.random.Generator, x_N: np.ndarray) -> np.ndarray:
  """Means over the last axis of what is drawn from it, [..., RESAMPLES]."""
  at = rng.integers(x_N.shape[-1], size=(RESAMPLES, x_N.shape[-1]))
  return x_N[..., at].mean(-1)


def bounds(drawn: np.ndarray, number: int) -> np.ndarray:
  """Both ends of the interval of a mean of so many, from resampled ones."""
  wide = np.sqrt(number / (number - 1)) * scipy.stats.t(number - 1).ppf(0.975)
  low = 100 * scipy.stats.norm.cdf(-wide)
  return np.percentile(drawn, [low, 100 - low])


def shown(value: float | None, form: str) -> str:
  """A number without the zero before its point; "-" for none."""
  if value is None:
    return "-"
  return (
    format(value, form).replace("0.", ".", 1)
    if abs(value) < 1
    else (format(value, form))
  )
