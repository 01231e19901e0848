"""What real_model.py shows: tables in docs/results.md and README.md.

They stand between two comments in each file, `begin` and `end` below, and are
made from the cells alone.
"""

from pathlib import Path

import numpy as np
from real_model_bench import (
  DEFAULT,
  DENSE,
  OURS,
  SCRATCH,
  WARM,
  Cell,
  read_cells,
)
from real_model_numbers import (
  TASKS,
  TEXTS,
  Results,
  accuracy,
  answers,
  loss_difference,
  mean_rise,
  rise,
  score_difference,
  share_kept,
  shown,
)

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import markdown
from adapt_pruner_jax.storage import publish

NAMES = {
  DENSE: "dense",
  SCRATCH: "random weights in the paper's shape",
  "paper": "Adapt-Pruner (the paper's)",
  DEFAULT: "`configs/oneshot.py` (ours)",
  WARM: "ours with `prune.refit_temperature=2`",
  "llm_pruner": "LLM-Pruner",
  "flap": "FLAP",
  "wanda_sp": "Wanda-sp",
  "shortgpt": "ShortGPT",
  "slicegpt": "SliceGPT",
  "minitron": "Minitron's way",
  "surgeon": "LLM Surgeon",
}
MAIN = 0.2
BEGIN, END = "<!-- real_model.py: begin -->", "<!-- real_model.py: end -->"


def write(cells: Path, folder: Path) -> None:
  """Writes the tables into docs/results.md and README.md of a folder.

  Raises:
    UserError: the dense model was not measured, or a file has no place for
      tables.
  """
  found = read_cells(cells)
  if Cell("prune", DENSE) not in found:
    raise UserError(f"{cells} has no loss of the dense model: --part=prune")
  parts = [
    *(untrained(found, ratio) for ratio in (0.2, 0.1, 0.3)),
    against(found),
    by_task(found),
    by_length(found),
    recovered(found),
    alike(found),
  ]
  texts = {
    folder / "docs" / "results.md": "\n\n".join(filter(None, parts)),
    folder / "README.md": summary(found),
  }
  for file, whole in [(f, replaced(f, text)) for f, text in texts.items()]:
    publish.write_text(file, whole)


def replaced(file: Path, text: str) -> str:
  """A file's content with the text between the two comments.

  Raises:
    UserError: the comments are not there.
  """
  whole = file.read_text(encoding="utf-8")
  before, begin, rest = whole.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end:
    raise UserError(f"{file} has no place for the tables: {BEGIN} and {END}")
  return f"{before}{begin}\n\n{text}\n\n{end}{after}"


# ---- Tables ------------------------------------------------------------------


def untrained(found: Results, ratio: float) -> str:
  """Nats above dense, tokens and seconds of each method at a ratio."""
  rows = []
  for cell, result in of_ratio(found, ratio):
    row = [*head(cell), f"{result['params']:,}"]
    row += [rise(found, cell, text) for text in TEXTS]
    row.append(f"{result['calibration_tokens']:,}")
    row.append(f"{result['prune_seconds']:.0f}")
    rows.append(row)
  if not rows:
    return ""
  header = ["method", "tokens a step", "seed", "parameters"]
  header += [*TEXTS.values(), "tokens in all", "CPU s"]
  return "\n\n".join(
    [
      f"#### {ratio:.0%} of all parameters removed, without training",
      "Nats a token above dense.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def against(found: Results) -> str:
  """Each method at MAIN minus the paper's at equal tokens and seed."""
  rows = []
  for cell, _ in of_ratio(found, MAIN):
    paper = cell._replace(method="paper")
    if cell.method == "paper" or paper not in found:
      continue
    row = head(cell)
    row += [loss_difference(found, cell, paper, text) for text in TEXTS]
    rows.append([*row, score_difference(found, cell, paper)])
  if not rows:
    return ""
  header = ["method", "tokens a step", "seed", *TEXTS.values(), "accuracy"]
  return "\n\n".join(
    [
      f"#### Against the paper's method, {MAIN:.0%} removed",
      "Loss minus its loss, accuracy minus its accuracy, at as many tokens a "
      "step, with intervals of 95 %. A lead is below 0 in loss and above 0 in "
      "accuracy.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def by_task(found: Results) -> str:
  """Accuracy by task at MAIN, and the mean against dense."""
  dense, rows = Cell("prune", DENSE), []
  for cell in (dense, *(cell for cell, _ in of_ratio(found, MAIN))):
    bits = answers(found, cell)
    if bits:
      row = [*head(cell), f"{sum(map(len, bits.values())):,}"]
      row += [f"{bits[task].mean():.3f}" for task in TASKS]
      row += [accuracy(found, cell), score_difference(found, cell, dense)]
      rows.append(row)
  if not rows:
    return ""
  header = ["method", "tokens a step", "seed", "questions", *TASKS]
  header += ["mean", "minus dense"]
  return "\n\n".join(
    [
      f"#### Task scores, {MAIN:.0%} removed, without training",
      "acc_norm, of winogrande acc; minus dense on the questions that both "
      "were asked. By chance .25 four times and .5 twice, mean .333.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def by_length(found: Results) -> str:
  """Loss by position, of all that was measured."""
  rows, ends = [], []
  for cell, result in found.items():
    if cell.part == "length":
      means = np.mean(result["losses"], 0)
      ends = np.arange(1, len(means) + 1) * result["context"] // len(means)
      rows.append([*head(cell), *(f"{mean:.3f}" for mean in means)])
  if not rows:
    return ""
  header = ["method", "tokens a step", "seed", *(f"{end:,}" for end in ends)]
  return "\n\n".join(
    [
      "#### Loss by position, on books",
      "Nats a token; each column up to that position, from the one before.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def recovered(found: Results) -> str:
  """Loss above dense and accuracy after training, and what is kept of it."""
  rows, dense = [], Cell("prune", DENSE)
  for cell in found:
    if cell.part != "recover":
      continue
    row = [*head(cell)[::2], f"{cell.train_tokens:,}", str(cell.stages)]
    row += [objective(cell), f"{cell.rate:.0e}", cell.source or "C4"]
    row += [rise(found, cell, text) for text in TEXTS]
    row += [accuracy(found, cell), share_kept(found, cell, dense)]
    rows.append(row)
  if not rows:
    return ""
  header = ["method", "seed", "trained on", "stages", "loss", "rate", "on"]
  header += [*TEXTS.values(), "accuracy", "kept"]
  return "\n\n".join(
    [
      f"#### After training, {MAIN:.0%} removed",
      "Nats a token above dense; the mean accuracy of six tasks, and how much "
      "of the dense model's lead over chance is kept, of 1. The loss is cross "
      "entropy, or KL divergence from the dense model at a temperature.",
      markdown.table(header, rows, header[1:]),
      against_trained(found),
      curves(found),
    ]
  )


def against_trained(found: Results) -> str:
  """Each training of ours minus each of the paper's of as many tokens."""
  rows = []
  for cell in found:
    for paper in trained_as_long(found, cell):
      row = [NAMES[cell.method], f"{cell.train_tokens:,}", str(cell.seed)]
      row += [str(cell.stages), objective(cell), objective(paper)]
      row += [loss_difference(found, cell, paper, text) for text in TEXTS]
      rows.append([*row, score_difference(found, cell, paper)])
  if not rows:
    return ""
  header = ["method", "trained on", "seed", "stages", "loss"]
  header += ["the paper's loss", *TEXTS.values(), "accuracy"]
  return "\n\n".join(
    [
      "Ours minus the paper's after as many tokens, each at its own best rate; "
      "a lead is below 0 in loss and above 0 in accuracy.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def trained_as_long(found: Results, cell: Cell) -> list[Cell]:
  """Of a training of ours the paper's, whatever their rates and losses."""
  if cell.part != "recover" or cell.method not in OURS:
    return []
  like = cell._replace(method="paper")
  own = {"alpha": cell.alpha, "temperature": cell.temperature}
  return [o for o in found if o._replace(rate=cell.rate, **own) == like]


def curves(found: Results) -> str:
  """Loss on the tuning text on the way."""
  cells = [cell for cell in found if cell.part == "recover"]
  ends = sorted({end for cell in cells for end, _ in found[cell]["curve"]})
  rows = []
  for cell in cells:
    losses = dict(found[cell]["curve"])
    row = [NAMES.get(cell.method, cell.method), str(cell.seed)]
    row += [f"{cell.train_tokens:,}", str(cell.stages), objective(cell)]
    row.append(cell.source or "C4")
    rows.append(row + [shown(losses.get(end), ".3f") for end in ends])
  header = ["method", "seed", "trained on", "stages", "loss", "on"]
  header += [f"{end:,}" for end in ends]
  return "\n\n".join(
    [
      "Nats a token of the tuning text after so many tokens of training.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def alike(found: Results) -> str:
  """KL from the dense model and agreement with it on its own answers."""
  rows = []
  for cell, result in found.items():
    if cell.part != "answers":
      continue
    row = [NAMES[cell.method], str(cell.seed)]
    trained_on = [
      f"{cell.train_tokens:,}",
      objective(cell),
      cell.source or "C4",
    ]
    row += trained_on if cell.train_tokens else ["-"] * 3
    row.append(f"{result['answer_tokens']:,}")
    row.append(shown(result["answer_kl"], ".3f"))
    row.append(f"{result['answer_agreement']:.1%}")
    trained = "recover" if cell.train_tokens else "prune"
    row += [rise(found, cell._replace(part=trained), text) for text in TEXTS]
    rows.append(row)
  if not rows:
    return ""
  header = ["method", "seed", "trained on", "loss", "on", "answers' tokens"]
  header += ["KL", "same token", *TEXTS.values()]
  return "\n\n".join(
    [
      "#### Answers, on prompts that were held out",
      "At each token of the dense model's own answers: KL divergence from it "
      "in nats, and how often both find the same token the likeliest; then "
      "nats a token of the texts above dense.",
      markdown.table(header, rows, header[1:]),
    ]
  )


def summary(found: Results) -> str:
  """README's table: each method once at MAIN, that with the most questions.

  Of these the one with the fewest tokens, which all methods were given.
  """
  best: dict[str, Cell] = {}
  asked = lambda cell: sum(map(len, answers(found, cell).values()))
  for cell, _ in of_ratio(found, MAIN):
    if cell.method == WARM:
      continue
    held = best.get(cell.method, cell)
    best[cell.method] = max(
      held, cell, key=lambda c: (asked(c), -c.tokens, -c.seed)
    )
  order = sorted(best.values(), key=lambda c: mean_rise(found, c))
  rows = []
  for cell in order:
    read = found[cell]["calibration_tokens"]
    row = [NAMES.get(cell.method, cell.method), f"{read:,}"]
    row += [rise(found, cell, text) for text in TEXTS]
    rows.append([*row, accuracy(found, cell)])
  dense = Cell("prune", DENSE)
  losses = found[dense]["texts"]
  row = ["dense (nats a token)", ""]
  row += [f"{np.mean(losses[text]):.3f}" for text in TEXTS]
  rows.insert(0, [*row, accuracy(found, dense)])
  header = [
    f"SmolLM2-135M, {MAIN:.0%} removed: nats above dense",
    "calibration tokens",
    *TEXTS.values(),
    "six tasks",
  ]
  return markdown.table(header, rows, header[1:])


def of_ratio(found: Results, ratio: float) -> list[tuple[Cell, dict]]:
  """Cells without training, the lowest rise first."""
  cells = [
    (cell, result)
    for cell, result in found.items()
    if cell.part == "prune" and cell.ratio == ratio
  ]
  return sorted(cells, key=lambda item: mean_rise(found, item[0]))


def objective(cell: Cell) -> str:
  """What a training lowers."""
  return f"KL at {cell.temperature:g}" if cell.alpha else "plain"


def head(cell: Cell) -> list[str]:
  name = NAMES.get(cell.method, cell.method)
  return [name, f"{cell.tokens:,}" if cell.tokens else "-", str(cell.seed)]
