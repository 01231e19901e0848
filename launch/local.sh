#!/usr/bin/env bash
# Prunes on this machine's CPU; with no arguments the embedded default.
#
#   bash launch/local.sh [--dry-run] [--config=configs/X.py --workdir=DIR ...]
#
# Needs Python 3.11 or newer, nothing else. Arguments go to `adapt-pruner run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

# shellcheck disable=SC2119
use_venv
# The TPU compiler, which tests bring, would look for a TPU and say so.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
large_pages
run exec "$VENV/bin/adapt-pruner" run --workdir="${WORKDIR:-runs/tiny}" "$@"
