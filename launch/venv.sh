# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root.
#
#   PYTHON=...   the interpreter to use (default: the newest found, 3.11 or newer)
#   VENV=...     the virtual environment (default .venv)
#   --dry-run    as the first argument: print the commands, run none

VENV=${VENV:-.venv}
# Extras that a run on accelerators may need: texts of the hub, tasks, buckets.
# shellcheck disable=SC2034
OF_RUNS=(data eval bucket)

# On a CPU: large arrays in large pages, which spares a sixth of a train step.
large_pages() {
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

fail() {
  echo "error: $*" >&2
  exit 1
}

run() {
  if [[ -n $dry_run ]]; then
    printf '+%s\n' "$(printf ' %q' "$@")"
  else
    "$@"
  fi
}

# True if $1 runs (a version manager's shim may not), is new enough and can make
# virtual environments (Debian packages that apart).
usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1
}

find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer" \
      "with venv: $("$PYTHON" --version 2>&1 | head -n 1)"
    echo "$PYTHON"
    return
  fi
  for name in python3.13 python3.12 python3.11 python3; do
    if usable "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer with venv found: install python3.12 (on" \
    "Debian and Ubuntu also python3.12-venv) or set PYTHON=/path/to/python"
}

# True if $VENV has a working Python, of the version of PYTHON if that is set.
venv_works() {
  local version
  version=$("$VENV/bin/python" --version 2>/dev/null) || return 1
  [[ -z ${PYTHON:-} || $version == "$("$PYTHON" --version 2>/dev/null)" ]]
}

# use_venv [EXTRA...]: makes $VENV hold this package with these extras. Does
# nothing, and needs no network, if it does already: $VENV/.installed names the
# place, the checksum of what names the dependencies, and the extras.
use_venv() {
  # Of two launches at once one waits for the other.
  if [[ -z $dry_run ]] && command -v flock >/dev/null &&
    (: >>"$VENV.lock") 2>/dev/null; then
    exec 9>>"$VENV.lock"
    flock 9
  fi
  make_venv "$@"
  exec 9>&-
}

make_venv() {
  local sum place='' had='' extras='' extra spec=. python
  sum=$(cat setup.py pyproject.toml | cksum)
  if [[ -f $VENV/.installed ]]; then
    { read -r place && read -r had && read -r extras; } <"$VENV/.installed" ||
      true
  fi
  if [[ $place != "$PWD" ]] || ! venv_works; then
    if [[ -e $VENV && ! -f $VENV/.installed && -z $dry_run ]]; then
      fail "$VENV was not made by these scripts and is not overwritten: move" \
        "it away, or give another place: VENV=.venv-pruner"
    fi
    python=$(find_python)
    echo "making $VENV with $("$python" --version)" >&2
    if [[ -z $dry_run ]]; then # ours from the start: a kill may come at once
      rm -rf "$VENV"
      mkdir -p "$VENV"
      printf '%s\n\n\n' "$PWD" >"$VENV/.installed"
    fi
    run "$python" -m venv "$VENV"
    had='' extras=''
  fi
  for extra in "$@"; do
    if [[ ,$extras, != *,$extra,* ]]; then
      extras=${extras:+$extras,}$extra had=''
    fi
  done
  if [[ $had == "$sum" ]]; then
    return
  fi
  if [[ -n $extras ]]; then
    spec=".[$extras]"
  fi
  echo "installing into $VENV, about 1 GB the first time" >&2
  run "$VENV/bin/python" -m pip install --no-input \
    --disable-pip-version-check --editable "$spec" ||
    fail "the installation failed, see above; the same command tries again"
  if [[ -z $dry_run ]]; then
    printf '%s\n' "$PWD" "$sum" "$extras" >"$VENV/.installed"
  fi
}

# The extra for the GPU driver of this machine: CUDA 13 needs driver 580.
gpu_extra() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader \
    2>/dev/null) ||
    fail "nvidia-smi finds no GPU; launch/local.sh runs on the CPU"
  if [[ ${driver%%.*} -ge 580 ]]; then echo gpu; else echo gpu-cuda12; fi
}

# What `adapt-pruner plan` counts with: JAX would take 75 % of a GPU's memory.
all_of_gpu() {
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
}
