#!/usr/bin/env bash
# A row of results for a model, on this machine's TPU, GPUs or CPU: plan, prune,
# recover, evaluate, report.
#
#   bash launch/prove.sh [--dry-run] MODEL [--config.FIELD=VALUE ...]
#
# MODEL is a directory, a hub id, or gs://... or s3://... The same command goes on
# where it was cut off. $WORKDIR/summary.json then is the row: sizes, tasks and
# perplexity before and after, seconds, hardware, versions.
#
#   WORKDIR=...  default runs/prove-NAME; or gs://BUCKET/...
#   RATIO=0.2    of the parameters that go
#   TOKENS=...   to recover with, default 100_000_000
#                (in bfloat16 on a TPU or GPUs)
#   TEXT=...     what is learnt from, text:FILE or hf:NAME; default fineweb-edu
#   TASKS=...    default wikitext,arc_easy,hellaswag,piqa,winogrande
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

[[ $# -gt 0 && $1 != --* ]] ||
  fail "which model? bash launch/prove.sh MODEL [--config.FIELD=VALUE ...]"
model=${1%/}
shift
text=${TEXT:-hf:HuggingFaceFW/fineweb-edu,subset=sample-10BT}
workdir=${WORKDIR:-runs/prove-${model##*/}}

extras=(data eval) dtype=float32
if [[ "$model $workdir $text" == *://* ]]; then
  extras+=(bucket)
fi
if command -v nvidia-smi >/dev/null; then
  extra=$(gpu_extra)
  extras+=("$extra") dtype=bfloat16
  all_of_gpu
elif compgen -G '/dev/accel*' >/dev/null ||
  compgen -G '/dev/vfio/[0-9]*' >/dev/null; then # /dev/vfio/vfio is anywhere
  extras+=(tpu) dtype=bfloat16
fi
recipe=(--config=configs/accel.py --config.model.path="$model"
  --config.prune.ratio="${RATIO:-0.2}"
  --config.calibration.source="$text" --config.data.source="$text"
  --config.train.tokens="${TOKENS:-100_000_000}" --config.train.dtype="$dtype"
  --config.eval.tasks="${TASKS:-wikitext,arc_easy,hellaswag,piqa,winogrande}"
  "$@")
use_venv "${extras[@]}"
run "$VENV/bin/adapt-pruner" plan "${recipe[@]}"
run "$VENV/bin/adapt-pruner" run --workdir="$workdir" "${recipe[@]}"
run "$VENV/bin/adapt-pruner" report --workdir="$workdir"
