"""Kills of four processes whose work directory is in a bucket on loopback.

`faults.py --bucket_kills=10` calls this: single processes and all of them are
killed at random, and what is left continues, until there were so many kills;
each run that ends is compared bit for bit with the same four processes,
uninterrupted, on a disk.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import bucket_server
import forked

N = 4
HANG = 600  # seconds; what is left of a run ends within the heartbeat, 30 s
FIELDS = {  # of the recipe in `faults.py`: less of everything
  "prune.method": "adapt",
  "prune.refit": "none",
  "prune.stages": 2,
  "prune.step_size": 0.1,
  "train.tokens": 8 * 256,
}
ENV = {
  "XLA_FLAGS": "--xla_force_host_platform_device_count=1 "
  "--xla_backend_optimization_level=0"
}
Make = Callable[[str | Path], list[str]]


def kills(count: int, scheme: str, make: Make, folder: Path) -> list[tuple]:
  """Kills runs at random moments; rows of (fault, times, outcome).

  Args:
    scheme: of the bucket, `s3` or `gs`.
    make: from a work directory to the arguments of `adapt-pruner`.
    folder: for the run on a disk, and what they say.
  """
  whole = folder / "four"
  finished(make(whole), ENV, folder)
  begun = time.monotonic()
  finished(make(folder / "timed"), ENV, folder)
  seconds = time.monotonic() - begun
  print(f"a run takes {seconds:.0f} s", flush=True)
  rng, counts, ended, lost = random.Random(0), {}, 0, 0
  with bucket_server.running(scheme) as server:
    env = ENV | server.environment
    os.environ |= server.environment  # of what looks into the bucket here
    from adapt_pruner_jax.storage import places

    while sum(counts.values()) < count:
      place = places.to_path(f"{server.bucket}/run-{ended}")
      while sum(counts.values()) < count and not _has_ended(place):
        which = rng.choice(["one of four", "all four"])
        arguments = make(str(place))
        if killed(arguments, env, folder, which, rng, rng.uniform(0, seconds)):
          counts[which] = counts.get(which, 0) + 1
          at = _progress(place)
          print(f"kill {sum(counts.values())}: {which}, {at}", flush=True)
      finished(make(str(place)), env, folder)
      ended += 1
      lost += not is_same(place, whole)
  verdict = f"LOST {lost}" if lost else "nothing lost, equal bit for bit"
  rows = [(f"`kill -9` of {which}", n, "") for which, n in counts.items()]
  return [
    *rows,
    (f"four processes, `{scheme}://`, {ended} runs", count, verdict),
  ]


def start(
  arguments: Sequence[str], env: dict[str, str], folder: Path
) -> list[BaseProcess]:
  """The processes of a run; what each says is added to a file in `folder`."""
  address = f"--coordinator=127.0.0.1:{bucket_server.free_port()}"
  flags = [address, f"--num_processes={N}"]
  return [
    forked.start(
      [*arguments, *flags, f"--process_id={me}"], env, folder / f"{me}.out"
    )
    for me in range(N)
  ]


def finished(
  arguments: Sequence[str], env: dict[str, str], folder: Path
) -> None:
  """Runs to the end."""
  codes = exit_codes(start(arguments, env, folder), folder)
  if any(codes):
    said = (folder / "0.out").read_text()
    raise RuntimeError(f"exit codes {codes}\n{said}")


def killed(
  arguments: Sequence[str],
  env: dict[str, str],
  folder: Path,
  which: str,
  rng: random.Random,
  seconds: float,
) -> bool:
  """Starts a run and kills it or one of it then; False if it had ended."""
  running = start(arguments, env, folder)
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if all(process.exitcode is not None for process in running):
      return False
    time.sleep(0.05)
  for process in running if which == "all four" else [rng.choice(running)]:
    process.kill()
  exit_codes(running, folder)  # the others notice it
  return True


def exit_codes(running: list[BaseProcess], folder: Path) -> list[int]:
  """Waits for their ends.

  Args:
    folder: has what each says.

  Raises:
    RuntimeError: one does not end.
  """
  for me, process in enumerate(running):
    process.join(HANG)
    if process.exitcode is None:
      said = [file.read_text()[-2000:] for file in folder.glob("?.out")]
      raise RuntimeError(
        "\n\n".join([f"process {me} neither goes on nor ends", *said])
      )
  return [process.exitcode for process in running]


def is_same(place: Path, whole: Path) -> bool:
  """Whether two runs have come to the same, bit for bit."""
  names = ("model/model.safetensors", "kept.json", "trace.jsonl")
  return all(
    (place / name).read_bytes() == (whole / name).read_bytes() for name in names
  )


def _has_ended(place: Path) -> bool:
  return (place / "summary.json").exists()


def _progress(place: Path) -> str:
  """What a killed run has left in the bucket."""
  steps = [p.name for p in (place / "checkpoints").iterdir()]
  found = [f"checkpoint {max(steps, key=int)}"] if steps else []
  for name in ("pruning.json", "evaluated.json", "model/incomplete"):
    found += [name] * (place / name).exists()
  return " and ".join(found) or "nothing yet"
