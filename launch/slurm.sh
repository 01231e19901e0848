#!/usr/bin/env bash
# Prunes on the GPUs of several Slurm nodes, one process a GPU:
#
#   sbatch [--nodes=4 --gpus-per-node=8 --ntasks-per-node=8] launch/slurm.sh \
#     [--dry-run] --config=configs/X.py --workdir=/shared/DIR ...
#
# Submit it from the repository's root; that and the work directory are on a
# file system that all nodes share. If the nodes have no network, install before
# on one that has: bash -c '. launch/venv.sh && use_venv "${OF_RUNS[@]}" gpu'
# Near the time limit, or when preempted, the run saves its state, and the job
# goes back into the queue and continues; so it does, a few times, when one of the
# processes is gone (RETRIES, of all times that the job was started again).
#SBATCH --job-name=adapt-pruner
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
. launch/venv.sh

extra=$(gpu_extra)
use_venv "${OF_RUNS[@]}" "$extra"
all_of_gpu
# --distributed reads addresses and ranks from the variables that srun sets.
status=0
run srun --kill-on-bad-exit=0 \
  "$VENV/bin/adapt-pruner" run --distributed "$@" || status=$?
# 75: stopped and saved. 76, or 134 where JAX was faster to notice it: another
# process is gone, with its machine perhaps. 137 and 143: that one itself, of
# which srun tells rather than of the others.
case $status in
  75) again=1 ;;
  76 | 134 | 137 | 143)
    again=$((${SLURM_RESTART_COUNT:-0} < ${RETRIES:-5}))
    ;;
  *) again=0 ;;
esac
if [[ $again -eq 1 ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
