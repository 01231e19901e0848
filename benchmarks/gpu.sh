#!/usr/bin/env bash
# What one GPU does: kernels, train steps, pruning steps and refits, into one
# JSON file; at most eight minutes on an H200, and no network.
#
#   bash benchmarks/gpu.sh [OUT.json] [flags of benchmarks/gpu.py]
#
# Needs jax for CUDA, flax, optax and orbax-checkpoint; the package itself need
# not be installed.
set -euo pipefail
out=$(realpath "${1:-gpu.json}")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" benchmarks/gpu.py --out="$out" "${@:2}"
