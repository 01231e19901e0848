#!/usr/bin/env bash
# Prunes on all NVIDIA GPUs of this machine, in one process.
#
#   bash launch/gpu.sh [--dry-run] --config=configs/X.py --workdir=DIR ...
#
# Arguments go to `adapt-pruner run`; --config.mesh.* says how the GPUs are used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

extra=$(gpu_extra)
use_venv "${OF_RUNS[@]}" "$extra"
all_of_gpu
run exec "$VENV/bin/adapt-pruner" run "$@"
