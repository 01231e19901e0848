#!/usr/bin/env bash
# Prunes on a Cloud TPU, on all its workers, and follows worker 0's log:
#
#   bash launch/tpu.sh --name=pruner --zone=us-east5-b --type=v6e-8 --spot -- \
#     --config=configs/X.py --workdir=gs://BUCKET/RUN ...
#
# or, in the place of --workdir, --bucket=BUCKET before `--`: the run is then in
# gs://BUCKET/NAME. The TPU's service account has to read and write there.
#
# A TPU of that name is used if there is one, else a queued resource is made. The
# run goes on when this script is stopped; the same command follows it again.
#
#   --bucket=B    work in gs://B/NAME
#   --spot        a spot TPU: when it is preempted, make it again and continue
#   --version=V   runtime version (default: the one for --type)
#   --project=P   (default: gcloud's)
#   --delete      delete the TPU: after the run, or now if there is no `--`
#   --dry-run     print the gcloud commands, run none
#   -- FLAGS      for `adapt-pruner run`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

POLL_SECONDS=${POLL_SECONDS:-30}
CODE=(adapt_pruner_jax configs launch setup.py pyproject.toml)
name='' zone='' type='' version='' project='' bucket=''
spot='' delete='' dry_run=''
flags='' # "given" once -- is seen
ended='' # for a dry run, which asks nobody: followed to its end

fail() {
  echo "error: $*" >&2
  exit 1
}

say() {
  [[ -n $dry_run ]] || echo "tpu.sh: $*" >&2
}

# A gcloud command, quietly or as a line of a dry run.
tpus() {
  local command=(gcloud compute tpus "$@" --zone="$zone")
  command+=(${project:+--project="$project"} --quiet)
  if [[ -n $dry_run ]]; then
    printf '+%s\n' "$(printf ' %q' "${command[@]}")"
  else
    "${command[@]}"
  fi
}

# state_of KIND FIELD: a state in gcloud's words, or NONE. Waits where it could
# once be asked and now cannot: the network is away.
state_of() {
  until tpus "$1" describe "$name" --format="value($2)" 2>"$tmp/describe"; do
    if grep -q NOT_FOUND "$tmp/describe"; then
      echo NONE
      break
    fi
    [[ -f $tmp/described ]] ||
      fail "gcloud cannot describe $name: $(tail -n 1 "$tmp/describe")"
    say "gcloud cannot describe $name, trying again:" \
      "$(tail -n 1 "$tmp/describe")"
    sleep "$POLL_SECONDS"
  done
  touch "$tmp/described"
}

create() {
  say "asking for a $type named $name"
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" \
    ${spot:+"$spot"}
}

remove() {
  say "deleting $name"
  if [[ -n $dry_run || $(state_of queued-resources state.state) != NONE ]]; then
    tpus queued-resources delete "$name" --force
  elif [[ $(state_of tpu-vm state) != NONE ]]; then
    tpus tpu-vm delete "$name"
  fi
}

# Returns when the TPU is ready.
get_tpu() {
  local vm queue
  if [[ -n $dry_run ]]; then
    create
    return
  fi
  while true; do
    vm=$(state_of tpu-vm state)
    if [[ $vm == READY ]]; then
      return
    fi
    queue=$(state_of queued-resources state.state)
    case $queue,$vm in
      NONE,NONE) create ;;
      NONE,PREEMPTED | NONE,TERMINATED | NONE,STOPPED)
        fail "$name is $vm: start it, or delete it with --delete"
        ;;
      FAILED,* | SUSPENDED,*)
        [[ $queue == SUSPENDED && -n $spot ]] ||
          fail "the request for $name is $queue: delete it with --delete"
        remove
        ;;
      *) say "waiting for $name (request $queue, TPU $vm)" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# True if the run broke off because the spot TPU was taken away.
preempted() {
  sleep "$POLL_SECONDS" # the state lags behind
  [[ -n $spot && $(state_of tpu-vm state) != READY ]]
}

# on WORKER COMMAND...: runs tpu_worker.sh there.
on() {
  local worker=$1
  shift
  tpus tpu-vm ssh "$name" --worker="$worker" \
    --command="bash adapt-pruner/launch/tpu_worker.sh$(printf ' %q' "$@")"
}

# State of the run: an exit code, "running", "none" or "unreachable".
job_state() {
  if [[ -n $dry_run ]]; then
    echo "${ended:-none}"
    return
  fi
  tpus tpu-vm ssh "$name" --worker=0 --command="cd adapt-pruner/launch \
2>/dev/null && bash tpu_worker.sh state || echo none" 2>/dev/null ||
    echo unreachable
}

# Fails if the run that is there was started with other flags.
require_same() {
  local flags
  flags=$(on 0 flags) || return 0 # asked again by what follows it
  [[ -z $flags || $flags == "$(printf '%s\n' "$@")" ]] ||
    fail "$name is busy with another run: adapt-pruner run ${flags//$'\n'/ };" \
      "give its flags to follow it, or another --name"
}

start() {
  local unpack="rm -rf adapt-pruner/launch adapt-pruner/configs \
adapt-pruner/adapt_pruner_jax && mkdir -p adapt-pruner && \
tar xzf adapt-pruner.tgz -C adapt-pruner"
  tpus tpu-vm scp "$tmp/adapt-pruner.tgz" "$name:" --worker=all &&
    tpus tpu-vm ssh "$name" --worker=all --command="$unpack" &&
    on all install &&
    on all start "$@"
}

# Starts or joins the run, and continues it until it has ended.
follow() {
  local state lost=0
  while true; do
    get_tpu
    state=$(job_state)
    if [[ $state == running ]]; then
      require_same "$@"
    elif [[ $state != unreachable ]]; then
      if ! start "$@"; then
        preempted || fail "the run could not be started on $name, see above"
        continue
      fi
    fi
    on 0 follow || true
    ended=0
    state=$(job_state)
    case $state in
      0) return ;;
      running | none | unreachable) say "lost the connection, trying again" ;;
      75)
        say "the run was stopped and has saved its state"
        [[ -n $spot ]] || exit 75
        ;;
      76 | 134 | 137 | 143) # a worker is gone: preempted, killed, or it stopped
        preempted || ((++lost <= ${RETRIES:-5})) || fail "a worker was gone" \
          "$lost times, its log says why; $name is kept"
        say "a worker is gone, starting again"
        ;;
      *) # a preempted worker ends the others with an error
        preempted || fail "the run ended with exit code $state, its log is" \
          "above; $name is kept"
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

while [[ $# -gt 0 && -z $flags ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --spot) spot=$1 ;;
    --delete) delete=$1 ;;
    --dry-run) dry_run=$1 ;;
    --) flags=given ;;
    *) fail "unknown flag $1: flags for adapt-pruner go after --" ;;
  esac
  shift
done

[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: see Google Cloud's documentation, CLI"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

if [[ -n $flags ]]; then
  [[ -n $type ]] || fail "--type is needed, for example --type=v6e-8"
  case $type in
    v[234]-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) default='' ;;
  esac
  version=${version:-$default}
  [[ -n $version ]] || fail "no default runtime for --type=$type: give --version"
  case " $* " in
    *" --workdir "* | *" -workdir"*) fail "give it as --workdir=PLACE" ;;
  esac
  if [[ -n $bucket ]]; then
    bucket=${bucket#gs://}
    [[ " $*" != *" --workdir="* ]] ||
      fail "give --bucket or --workdir, one of them"
    set -- --workdir="gs://${bucket%/}/$name" "$@"
  fi
  case " $* " in
    *" --workdir=gs://"* | *" --workdir=s3://"* | *" --workdir=/"*) ;;
    *) [[ -z $spot ]] ||
      fail "--spot needs --bucket=B, or --workdir=gs://B/... or /... on a" \
        "mounted disk: a preempted TPU loses its own" ;;
  esac
  [[ -n $dry_run ]] ||
    tar czf "$tmp/adapt-pruner.tgz" --exclude=__pycache__ "${CODE[@]}" ||
    fail "the code could not be packed in $tmp"
  follow "$@"
  say "the run is finished"
elif [[ -z $delete ]]; then
  fail "nothing to do: give -- and the flags of adapt-pruner run, or --delete"
fi
if [[ -n $delete ]]; then
  remove
fi
