"""Kills of four processes whose work directory is in a bucket on loopback.

`faults.py --bucket_kills=10` calls this: single processes and all of them are
killed at random, and what is left continues, until there were so many kills;
each run that ends is compared bit for bit with the same four processes,
uninterrupted, on a disk.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import bucket_server

N = 4
FIELDS = {  # of the recipe in `faults.py`: less of everything
  "prune.stages": 2,
  "prune.ranking.step_size": 0.1,
  "data.batch": 8,
  "train.tokens": 8 * 256,
}
Make = Callable[[str | Path], list[str]]


def kills(count: int, make: Make, folder: Path) -> list[tuple]:
  """Kills runs at random moments; rows of (fault, times, outcome).

  Args:
    make: from a work directory to the arguments of a run.
    folder: for the run on a disk, and what they say.
  """
  env = {"ADAPT_PRUNER_CACHE": str(folder / "cache")}
  env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
  whole = folder / "four"
  finished(make(whole), env, folder)
  begun = time.monotonic()
  finished(make(folder / "timed"), env, folder)
  seconds = time.monotonic() - begun
  want = (whole / "model" / "model.safetensors").read_bytes()
  rng, counts = random.Random(0), {"one of four": 0, "all four": 0}
  ended = lost = 0
  with bucket_server.running() as port:
    env |= bucket_server.environment(port)
    while sum(counts.values()) < count:
      place = f"{bucket_server.BUCKET}/run-{ended}"
      while sum(counts.values()) < count and not _is_there(port, place):
        which = rng.choice(list(counts))
        if _killed(make(f"s3://{place}"), env, folder, which, rng, seconds):
          counts[which] += 1
          print(f"kill {sum(counts.values())}: {which}", flush=True)
      finished(make(f"s3://{place}"), env, folder)
      ended += 1
      got = bucket_server.ask(port, f"{place}/model/model.safetensors")
      lost += got != want
  verdict = f"LOST {lost}" if lost else "nothing lost, equal bit for bit"
  rows = [(f"`kill -9` of {w}", n, "") for w, n in counts.items()]
  return [*rows, (f"four processes, {ended} runs in all", count, verdict)]


def start(
  arguments: list[str], env: dict[str, str], folder: Path
) -> list[subprocess.Popen]:
  """The processes of a run; what each says is added to a file in `folder`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  found = []
  for me in range(N):
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={N}"]
    with open(folder / f"{me}.out", "a") as output:
      found.append(
        subprocess.Popen(
          [*arguments, *flags, f"--process_id={me}"],
          env=os.environ | env,
          stdout=output,
          stderr=output,
        )
      )
  return found


def finished(arguments: list[str], env: dict[str, str], folder: Path) -> None:
  """Runs to the end."""
  codes = [p.wait() for p in start(arguments, env, folder)]
  if any(codes):
    said = (folder / "0.out").read_text()
    raise RuntimeError(f"exit codes {codes}\n{said}")


def _killed(
  arguments: list[str],
  env: dict[str, str],
  folder: Path,
  which: str,
  rng: random.Random,
  seconds: float,
) -> bool:
  """Starts a run and kills it or one of it; False if it had ended before."""
  running = start(arguments, env, folder)
  chosen = running if which == "all four" else [rng.choice(running)]
  end = time.monotonic() + rng.uniform(0, seconds)
  while time.monotonic() < end:
    if all(p.poll() is not None for p in running):
      return False
    time.sleep(0.05)
  for process in chosen:
    process.send_signal(signal.SIGKILL)
  for process in running:  # the others notice it
    process.wait()
  return True


def _is_there(port: int, place: str) -> bool:
  try:
    bucket_server.ask(port, f"{place}/summary.json")
  except OSError:
    return False
  return True
