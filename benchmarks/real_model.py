"""The paper's claims and our default on a real language model.

  python benchmarks/real_model.py --model=DIR --data=DIR --workdir=W \\
    --part=prune

DIR of --model is SmolLM2-135M-Instruct as a HuggingFace directory, made from
--gguf=FILE if it is missing; --data holds `text` and `eval`. Parts:

  prune    methods at 20 % (then 10 and 30 %), no training: loss on four texts
  tasks    the six commonsense tasks, of the models that `prune` has made
  length   loss by position up to the model's context
  recover  training on what pruning leaves, and on random weights
  answers  how alike they and the dense model answer, also after learning that
  report   the tables of docs/results.md and README.md, from all cells of --out;
           --docs=DIR writes them elsewhere

Each measurement is a line of benchmarks/real_model.jsonl, kept when it is done,
so that the same command goes on after a kill; --cells=1 measures one, with the
rates that it needs, and ends.
Models stay in the working directory, for the later parts.

Calibration is the first 4,000,000 bytes of c4_sample.txt, tuning (rates) the
next 200,000; reported are C4 from byte 4,250,000 on, WikiText-2, books and
Shakespeare, which nothing else reads.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as __main__ does

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

import real_model_report
from absl import app, flags
from real_model_bench import (
  ANSWERS,
  DEFAULT,
  DENSE,
  LARGE,
  SCRATCH,
  SMALL,
  WARM,
  Bench,
  Cell,
)

from adapt_pruner_jax.errors import UserError

HERE = Path(__file__).parent
FLAGS = flags.FLAGS
NAMES = ("prune", "tasks", "length", "recover", "answers", "report")
flags.DEFINE_enum("part", "prune", NAMES, "What is measured.")
flags.DEFINE_string("model", "", "HuggingFace directory.")
flags.DEFINE_string("gguf", "", "Made into --model if that is missing.")
flags.DEFINE_string(
  "data", "../shared/data", "Holds text/, eval/ and tinyshakespeare/."
)
flags.DEFINE_string("workdir", "", "For the models.")
flags.DEFINE_string("out", str(HERE / "real_model.jsonl"), "The cells.")
flags.DEFINE_string("docs", str(HERE.parent), "Holds docs/ and README.md.")
ONLY = {  # flags of numbers and names, and what of a cell they limit
  "methods": "method",
  "ratios": "ratio",
  "seeds": "seed",
  "tokens": "tokens",  # of calibration, a step
  "train_tokens": "train_tokens",
  "stages": "stages",
  "alphas": "alpha",  # of distillation
  "temperatures": "temperature",  # of distillation
}
for flag in ONLY:
  flags.DEFINE_list(flag, [], "Only these.")
flags.DEFINE_integer("cells", 0, "Measure so many and end; 0 = all.")
flags.DEFINE_integer("questions", 200, "A task; 0 = all.", lower_bound=0)
flags.DEFINE_bool("mmlu", False, "Ask these questions too; not averaged.")
flags.DEFINE_bool("full", False, "Recover with 10M tokens and three seeds.")

PAPER = "paper"
# In order of importance.
RIVALS = (
  "llm_pruner",
  "flap",
  "slicegpt",
  "shortgpt",
  "magnitude",
  "wanda_sp",
  "minitron",
  "surgeon",
)
BEST = ((DEFAULT, SMALL), (PAPER, LARGE), (DEFAULT, LARGE))
METHODS = {DENSE, PAPER, DEFAULT, WARM, SCRATCH, *RIVALS}
RATES = (3e-5, 1e-4, 3e-4)
SCRATCH_RATES = (1e-3, 3e-3)
FEW = 25_600  # tokens of training


# ---- What is measured --------------------------------------------------------


def prune(bench: Bench) -> Iterator[Cell]:
  """Methods at equal sizes, without training."""
  yield Cell("prune", DENSE)
  for ratio in (0.2, 0.1, 0.3):
    for method in (PAPER, *RIVALS):
      yield Cell("prune", method, ratio, 0, SMALL)
    for method, tokens in BEST:
      yield Cell("prune", method, ratio, 0, tokens)
  rivals = [(method, SMALL) for method in RIVALS]
  for seed, (method, tokens) in itertools.product(
    (1, 2), (*BEST, (PAPER, SMALL), *rivals)
  ):
    yield Cell("prune", method, 0.2, seed, tokens)
  for seed in (0, 1):
    yield Cell("prune", WARM, 0.2, seed, SMALL)


def of_pruned(part: str, bench: Bench) -> Iterator[Cell]:
  """A part's cells of the models that are there."""
  for cell in prune(bench):
    if cell in bench.found:
      yield cell._replace(part=part)


def length(bench: Bench) -> Iterator[Cell]:
  """Of the dense model, the paper's and the default's."""
  for cell in of_pruned("length", bench):
    wanted = cell.method in (PAPER, DEFAULT, WARM) and cell.ratio == 0.2
    if cell.method == DENSE or (wanted and not cell.seed):
      yield cell


def recover(bench: Bench) -> Iterator[Cell]:
  """Plain loss and distillation, in one go and in four stages."""
  budgets = (102_400, 512_000)
  seeds = (1,)  # of it all questions were asked before training
  if FLAGS.full:
    budgets, seeds = (102_400, 1_024_000, 10_240_000), range(3)
  plain = Cell("recover", DEFAULT, 0.2, seeds[0], SMALL, 1, budgets[0])
  wanted = [
    plain._replace(
      method=method, stages=stages, alpha=alpha, temperature=temperature
    )
    for method in (PAPER, DEFAULT)
    for alpha, temperature in ((1.0, 1.0), (1.0, 2.0), (0.0, 2.0))
    for stages in (1, 4)
  ]
  wanted.append(plain._replace(method=SCRATCH))
  cells = [
    cell._replace(seed=seed, train_tokens=budget)
    for budget, seed, cell in itertools.product(budgets, seeds, wanted)
  ]
  # Of the recipe as it was, no more than there is.
  cells += [plain._replace(method=WARM, alpha=alpha) for alpha in (1.0, 0.0)]
  for cell in filter(chosen, cells):
    yield rated(bench, cell, seeds[0])
  # What a text gives to any model, and not back to a pruned one.
  dense = plain._replace(method=DENSE, ratio=0.0, tokens=0)
  if chosen(dense):
    yield dense._replace(rate=rated(bench, plain, seeds[0]).rate)


def rated(bench: Bench, cell: Cell, seed: int) -> Cell:
  """A training at the best rate of its method and loss."""
  rates = SCRATCH_RATES if cell.method == SCRATCH else RATES
  brief = cell._replace(seed=seed, stages=1, train_tokens=FEW)
  return cell._replace(rate=bench.best_rate(brief, rates))


def answers(bench: Bench) -> Iterator[Cell]:
  """With and without the dense model's answers among what is learnt from."""
  pruned = Cell("prune", DEFAULT, 0.2, 1, SMALL)
  brief = pruned._replace(part="recover", train_tokens=FEW, alpha=1.0)
  brief = brief._replace(temperature=1.0)
  brief = rated(bench, brief, brief.seed)
  learnt = brief._replace(source=ANSWERS)
  yield from (brief, learnt)
  trained = [cell for cell in bench.found if cell.part == "recover"]
  for cell in (pruned, pruned._replace(method=PAPER), *trained):
    if cell.method != SCRATCH:
      yield cell._replace(part="answers")


def tasks(bench: Bench) -> Iterator[Cell]:
  """Of all models, trained and untrained."""
  yield from of_pruned("tasks", bench)
  for cell in [*bench.found]:
    if cell.part == "recover":
      yield cell._replace(part="tasks")


def chosen(cell: Cell) -> bool:
  """Whether the flags ask for a cell; the dense model as it is always."""
  return cell == Cell(cell.part, DENSE) or all(
    getattr(cell, field) in asked(flag)
    for flag, field in ONLY.items()
    if FLAGS[flag].value
  )


def asked(flag: str) -> list:
  """What a flag of ONLY lists, as a cell has it.

  Raises:
    UsageError: it lists what is no number, or no method.
  """
  kind = Cell.__annotations__[ONLY[flag]]
  try:
    values = [kind(value) for value in FLAGS[flag].value]
  except ValueError as error:
    raise app.UsageError(f"--{flag}: {error}") from error
  if unknown := {*values} - METHODS if flag == "methods" else ():
    raise app.UsageError(
      f"--methods={','.join(sorted(unknown))}: known are "
      + ", ".join(sorted(METHODS))
    )
  return values


def make_model(gguf: str, out: str) -> None:
  """Turns a gguf file into a HuggingFace directory."""
  from adapt_pruner_jax import api

  api.save(api.load(gguf), out)


PARTS = {f.__name__: f for f in (prune, tasks, length, recover, answers)}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown words: {' '.join(argv[1:])}")
  try:
    run(Path(FLAGS.out))
  except UserError as error:
    sys.exit(f"real_model.py: {error}")


def run(out: Path) -> None:
  """Measures a part, or writes the report of what has been measured."""
  if FLAGS.part == "report":
    real_model_report.write(out, Path(FLAGS.docs))
    return
  for flag in ("model", "workdir"):
    if not FLAGS[flag].value:
      raise app.UsageError(f"--part={FLAGS.part} needs --{flag}")
  for flag in ONLY:
    asked(flag)
  if FLAGS.gguf and not Path(FLAGS.model).exists():
    make_model(FLAGS.gguf, FLAGS.model)
  bench = Bench(
    Path(FLAGS.model),
    Path(FLAGS.data),
    Path(FLAGS.workdir),
    out,
    FLAGS.questions,
    FLAGS.mmlu,
  )
  done = 0
  for cell in PARTS[FLAGS.part](bench):
    if not chosen(cell) or cell in bench.found:
      continue
    bench.get(cell)
    done += 1
    if done == FLAGS.cells:
      return
  if not done:
    print("nothing was measured: all that the flags name is in the file")


if __name__ == "__main__":
  app.run(main)
