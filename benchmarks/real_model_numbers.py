"""Numbers of real_model.py's tables, with their intervals, as they are shown.

Intervals are of 95 %, by paired bootstrap: over windows of a text, over
questions within each task.
"""

from collections.abc import Callable, Sequence

import numpy as np
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


def fewest(found: Results) -> int | None:
  """How many questions of a task all models were asked; None = no question."""
  cells = [cell for cell in found if cell.part == "tasks"]
  asked = [x for cell in cells for x in answers(found, cell).values()]
  return min(map(len, asked), default=None)


def accuracy(found: Results, cell: Cell, number: int | None = None) -> str:
  """Mean over tasks, on the first questions of each; None = all."""
  bits = answers(found, cell)
  if not bits:
    return "-"
  return shown(np.mean([x[:number].mean() for x in bits.values()]), ".3f")


def share_kept(found: Results, cell: Cell, dense: Cell) -> str:
  """Of the dense model's lead over chance, with an interval over questions."""
  mine, theirs = answers(found, cell), answers(found, dense)
  if not mine or not theirs:
    return "-"
  rng = np.random.default_rng(0)
  chance = np.mean([TASKS[task] for task in mine])

  def share(pick: Callable) -> float:
    pairs = [pick(mine[task], theirs[task]) for task in mine]
    own, whole = np.mean(pairs, 0)
    return (own - chance) / (whole - chance)

  def resampled(own: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    number = min(len(own), len(whole))
    at = rng.integers(number, size=number)
    return own[at].mean(), whole[at].mean()

  drawn = [share(resampled) for _ in range(RESAMPLES // 5)]
  middle = share(lambda own, whole: (own.mean(), whole[: len(own)].mean()))
  low, high = np.percentile(drawn, [2.5, 97.5])
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
  draw: Callable = lambda x: rng.choice(x, (RESAMPLES, len(x))).mean(1)
  drawn = np.mean([draw(x) for x in gains], 0)
  low, high = np.percentile(drawn, [2.5, 97.5])
  mean = np.mean([x.mean() for x in gains])
  return f"{shown(mean, form)} ({shown(low, form)} to {shown(high, form)})"


def shown(value: float | None, form: str) -> str:
  """A number without the zero before its point; "-" for none."""
  if value is None:
    return "-"
  return (
    format(value, form).replace("0.", ".", 1)
    if abs(value) < 1
    else (format(value, form))
  )
