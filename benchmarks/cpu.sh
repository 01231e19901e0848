#!/usr/bin/env bash
# What a CPU takes beside PyTorch, in one run on one core: train step, pruning
# step, generation, and evaluation of a model if one is given.
#
#   bash benchmarks/cpu.sh [MODEL TASKS_DIR] > cpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() {
  echo "== $*"
  "${PYTHON:-python}" "benchmarks/$@"
}
run train_step.py --rounds=11
run train_step.py --rounds=11 --tokens=1024 --batch=1
run prune_step.py --rounds=7
run generate.py --rounds=7
if [ $# -ge 2 ]; then
  run evaluate.py --model="$1" --tasks-dir="$2"
fi
