#!/usr/bin/env bash
# What tpu.sh calls on a TPU's workers:
#
#   install | start FLAGS | flags | state | follow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

# The process that leads the job's process group.
job=$(cat job.pid 2>/dev/null || true)
alive() {
  [[ -n $job ]] && kill -0 "$job" 2>/dev/null
}

case $1 in
  install)
    # The images have an older Python.
    if ! (find_python) >/dev/null 2>&1; then
      PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
      python3 -m uv python install 3.12
      PYTHON=$(python3 -m uv python find 3.12)
    fi
    use_venv "${OF_RUNS[@]}" tpu
    ;;
  start)
    shift
    if alive; then # left over, waiting for a worker that is gone
      kill -KILL -- "-$job"
    fi
    rm -f job.exit
    printf '%s\n' "$@" >job.flags
    # shellcheck disable=SC2016
    setsid bash -c '"$@"; echo $? >job.exit' job \
      "$VENV/bin/adapt-pruner" run --distributed "$@" \
      </dev/null >job.log 2>&1 &
    echo $! >job.pid
    ;;
  flags) # of the run, one a line
    cat job.flags 2>/dev/null || true
    ;;
  state) # the exit code, "running", or "none"
    if alive; then
      echo running
    else
      cat job.exit 2>/dev/null || echo none
    fi
    ;;
  follow)
    tail -n 100 -f --pid="$job" job.log
    ;;
  *) fail "unknown command $1" ;;
esac
