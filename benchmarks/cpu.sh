#!/usr/bin/env bash
# What a CPU does beside Transformers and lean PyTorch, one after the other:
# train steps, a pruning step, evaluation, generation; the same threads for all.
#
#   bash benchmarks/cpu.sh MODEL TASKS OUT.txt
#
# MODEL is a HuggingFace directory, TASKS a folder with lm-eval's questions as
# jsonl files, as `evaluate --tasks_dir` takes them.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$(realpath "$1") tasks=$(realpath "$2") out=$(realpath "$3")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() {
  echo "== $*" | tee -a "$out"
  "${PYTHON:-python}" "benchmarks/$1" "${@:2}" 2>&1 | tee -a "$out"
}
: >"$out"
run train_step.py
run train_step.py --tokens=1024 --batch=1
run prune_step.py
run evaluate.py --model="$model" --tasks-dir="$tasks"
run generate.py --model="$model"
