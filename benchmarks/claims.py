"""The paper's three claims, and what goes beyond it, on small real models.

  python benchmarks/claims.py --data=DIR --base=DIR --out=DIR

DIR of --data holds `models` and `text` as the shared data does; --base is what
base_model.py made. Each measurement is a cell (base, seed, method, ratio,
stages, tokens, rate); a finished one is a line of OUT/cells.jsonl, so that the
same command goes on after a kill. Then claims.md and a plot a claim are written
from all cells. --only=claim1,decisive,claim2,claim3,samples,temperature,
ablations and --bases pick some.

Loss is nats per token on text that neither calibration nor training saw:
`test` is of the training text's kind, `wikitext` is not. Learning rates are
chosen for each base and method on a third text, with seed 0 and 3 units of
tokens; a unit is the 512 x 64 tokens of the paper's calibration. A seed is of
calibration windows, training order and random weights.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as main.py does

import claims_report
from claims_bench import (
  BEST_TEMPERATURE,
  DENSE,
  REFIT_SAMPLES,
  SCRATCH,
  Bench,
  Cell,
)

from adapt_pruner_jax.config import CHOICES

UNIT = 512 * 64  # tokens: the paper's calibration, and a unit of training
STAGED = 3 * UNIT  # tokens of runs in several stages
SEEDS = 3
RATIOS = (0.4, 0.2, 0.6)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SCRATCH_RATES = (1e-3, 3e-3)
PUBLISHED = (
  "paper",
  "llm_pruner",
  "flap",
  "slicegpt",
  "shortgpt",
  "magnitude",
  "uniform",
)
DECISIVE = ("paper", "paper+refit", "curvature+refit")
ABLATIONS = {
  "curvature+refit": {
    "refit": ("final", "4"),
    "refit_all": (False,),
    "ranking.step_size": (0.02, 0.1),
    "ranking.cap": (0.1, 1.0),
    "samples": (16, 256),
  },
  "paper": {
    "amplitude": (0.0, 0.01, 0.05),
    "gqa_fold": ("aligned",),
    "layer_importance": CHOICES["prune.layer_importance"][1:],
    "group_importance": CHOICES["prune.group_importance"][1:],
    "step_size": (0.01, 0.05, 0.1),
    "samples": (16, 256, 512),
  },
}


# ---- What is measured --------------------------------------------------------


def best_rate(bench: Bench, base: str, method: str) -> float:
  """The best of the grid on the tuning text."""
  grid = SCRATCH_RATES if method == SCRATCH else RATES
  cells = [Cell(base, 0, method, tokens=3 * UNIT, rate=rate) for rate in grid]
  return min(cells, key=lambda cell: bench.get(cell)["tune"]).rate


def claim1(bench: Bench, base: str) -> Iterator[Cell]:
  """Methods at equal sizes, without training."""
  for ratio in RATIOS:
    for method in (*PUBLISHED, *DECISIVE[1:]):
      for seed in range(1 if method in ("magnitude", "shortgpt") else SEEDS):
        yield Cell(base, seed, method, ratio)


def decisive(bench: Bench, base: str) -> Iterator[Cell]:
  """Whether the lead survives training."""
  for method in DECISIVE:
    rate = best_rate(bench, base, method)
    for seed in range(SEEDS):
      yield Cell(base, seed, method)
      for units in bench.units:
        yield Cell(base, seed, method, tokens=units * UNIT, rate=rate)


def claim2(bench: Bench, base: str) -> Iterator[Cell]:
  """Random weights in the shape that the paper leaves."""
  yield from decisive(bench, base)
  rate = best_rate(bench, base, SCRATCH)
  for seed in range(SEEDS):
    for units in (3, *(10 * u for u in bench.units[:2])):
      yield Cell(base, seed, SCRATCH, tokens=units * UNIT, rate=rate)


def claim3(bench: Bench, base: str) -> Iterator[Cell]:
  """Equal tokens in more and more stages."""
  for method in DECISIVE:
    rate = best_rate(bench, base, method)
    for stages in (1, 2, 5, 10) if method == "paper" else (1, 5):
      for seed in range(SEEDS):
        yield Cell(base, seed, method, 0.4, stages, STAGED, rate)


def ablations(bench: Bench, base: str) -> Iterator[Cell]:
  """One setting changed at a time, without training; carried moments with."""
  for method, settings in ABLATIONS.items():
    for name, values in settings.items():
      for value in values:
        for seed in range(SEEDS):
          yield Cell(base, seed, method, change=(name, value))
  rate = best_rate(bench, base, "paper")
  for seed in range(SEEDS):
    cell = Cell(base, seed, "paper", 0.4, 5, STAGED, rate)
    yield dataclasses.replace(cell, change=("carry_moments", False))


def samples(bench: Bench, base: str) -> Iterator[Cell]:
  """As many samples a step as the paper draws, without training."""
  for method in ("paper", "curvature+refit"):
    for seed in range(SEEDS):
      yield Cell(base, seed, method, change=("samples", REFIT_SAMPLES))


def temperature(bench: Bench, base: str) -> Iterator[Cell]:
  """Each text at its best temperature: is a lead only one of confidence?"""
  yield Cell(base, 0, DENSE, 0.0, change=BEST_TEMPERATURE)
  for method in DECISIVE:
    rate = best_rate(bench, base, method)
    for seed in range(SEEDS):
      cell = Cell(base, seed, method, tokens=3 * UNIT, rate=rate)
      yield dataclasses.replace(cell, change=BEST_TEMPERATURE)


EXPERIMENTS = {
  "claim1": claim1,
  "decisive": decisive,
  "claim2": claim2,
  "claim3": claim3,
  "samples": samples,
  "temperature": temperature,
  "ablations": ablations,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", type=Path, required=True)
  parser.add_argument("--base", type=Path, help="of base_model.py")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--only", default=",".join(EXPERIMENTS))
  parser.add_argument("--bases", default="stories260K,char361,char105,base")
  parser.add_argument("--units", default="1,3,10", help="of training")
  flags = parser.parse_args()
  flags.out.mkdir(parents=True, exist_ok=True)
  text = flags.data / "text"
  stories = text / "tinystories_train.txt", text / "tinystories_heldout.txt"
  models = flags.data / "models"
  where = {
    "stories260K": (models / "stories260K", *stories),
    "char361": (models / "babyllama-char361-960K", *stories),
    "char105": (models / "babyllama-char105-930K", *stories),
    "wikitext": text / "wikitext2_raw_test.txt",
  }
  if flags.base:
    texts = flags.base / "train.txt", flags.base / "heldout.txt"
    where["base"] = (flags.base / "model", *texts)
  units = [int(number) for number in flags.units.split(",")]
  bench = Bench(flags.out, where, units)
  for base in flags.bases.split(","):
    bench.get(Cell(base, 0, DENSE, 0.0))
    for name in flags.only.split(","):
      for cell in EXPERIMENTS[name](bench, base):
        bench.get(cell)
  claims_report.write(bench.found, UNIT, flags.out)


if __name__ == "__main__":
  main()
