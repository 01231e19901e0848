#!/usr/bin/env bash
# Runs the linter and all tests but the long ones, or what the arguments ask of
# pytest. `bash .ci/run` runs these and then the long ones:
#
#   bash launch/test.sh [tests/pruning/adapt_test.py -k name ...]
#
# Needs Python 3.11 or newer, nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

# The TPU compiler needs no TPU; its wheels are for this platform.
extras=(test)
if [[ $(uname -sm) == "Linux x86_64" ]]; then
  extras+=(tpu)
fi
use_venv "${extras[@]}"
large_pages
if [[ $# -eq 0 ]]; then
  run "$VENV/bin/ruff" check
  run "$VENV/bin/ruff" format --check
  set -- -n 2 --dist worksteal --durations=10 -m "not slow"
fi
run exec "$VENV/bin/python" -m pytest "$@"
