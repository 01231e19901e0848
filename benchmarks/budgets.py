"""What docs/budgets.md promises, on a real language model, a command each.

  python benchmarks/budgets.py --model=DIR --data=DIR --workdir=W

DIR of --model is SmolLM2-135M-Instruct (benchmarks/real_model.py), --data holds
`text` and `eval`. Each row is one `adapt-pruner run`, which is printed and kept
with what it gave: bits per byte of four texts, the six commonsense tasks (not
of FLOPs, cache and quality), and what the budget is. Rows named so that
`_params` is at the end are pruned to the parameters at which the budget of the
row before is met too, with the same scores; nothing else differs.

Each is a line of benchmarks/budgets.jsonl, kept when it is done, so that the
same command goes on after a kill; --rows=a,b measures these alone. --report
writes the tables of docs/budgets.md from what is there.

Calibration, vocabulary and training read the first 4,000,000 bytes of
c4_sample.txt; reported are C4 from byte 4,250,000 on, WikiText-2, books and
Shakespeare.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as __main__ does

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

import budgets_report
from absl import app, flags
from budgets_bench import ROWS, Bench

HERE = Path(__file__).parent
FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HuggingFace directory.")
flags.DEFINE_string("data", "../shared/data", "Holds text/ and eval/.")
flags.DEFINE_string("workdir", None, "For the runs.")
flags.DEFINE_string("out", str(HERE / "budgets.jsonl"), "What is measured.")
flags.DEFINE_list("rows", [], f"Only these of {', '.join(ROWS)}.")
flags.DEFINE_integer("questions", 50, "A task; 0 = all.", lower_bound=0)
flags.DEFINE_bool("report", False, "Write the tables of docs/budgets.md.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown words: {' '.join(argv[1:])}")
  if FLAGS.report:
    docs = HERE.parent / "docs" / "budgets.md"
    budgets_report.write(Path(FLAGS.out), docs)
    return
  paths = FLAGS.model, FLAGS.data, FLAGS.workdir, FLAGS.out
  bench = Bench(*map(Path, paths), FLAGS.questions)
  for name in FLAGS.rows or ROWS:
    bench.get(name)


if __name__ == "__main__":
  app.run(main)
