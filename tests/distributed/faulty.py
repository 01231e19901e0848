"""`adapt-pruner` in a process that sees another world than process 0.

  1  a bit of the lowest score of each kind of unit is another
  2  the newest checkpoint is not in any listing, and pruning.json is another
  3  what was renamed shows three seconds later, and the clock is a day ahead

With FAULTS=version process 1 has another version of JAX instead.
"""

import builtins
import contextlib
import functools
import json
import os
import pathlib
import sys
import time

import numpy as np

from adapt_pruner_jax import cli
from adapt_pruner_jax.storage import digest

LATE = 3.0  # seconds
said = set()


def say(fault):
  if fault not in said:
    said.add(fault)
    print(f"fault: {fault}", flush=True)


def another_score():
  from adapt_pruner_jax.pruning import scores

  original = scores.measure

  def measure(*arguments, **options):
    found = original(*arguments, **options)
    for unit, values in found.scores.items():
      other = np.array(values)
      bits = other.view(f"u{other.itemsize}").reshape(-1)
      bits[np.argmin(other)] ^= 1 << (8 * other.itemsize - 3)  # now the largest
      found.scores[unit] = other
    say("another score")
    return found

  scores.measure = measure  # before `methods` takes it


def another_listing(work):
  folder = os.path.join(work, "checkpoints")
  listdir, scandir = os.listdir, os.scandir
  read = pathlib.Path.read_bytes

  def newest(path):
    if os.path.abspath(os.fspath(path)) != folder:
      return None
    return max((n for n in listdir(path) if n.isdigit()), key=int, default=None)

  def less(path="."):
    return [name for name in listdir(path) if name != newest(path)]

  @contextlib.contextmanager
  def scan(path="."):
    with scandir(path) as entries:
      yield (e for e in entries if e.name != newest(path))

  def another(self):
    if self.name != "pruning.json":
      return read(self)
    record = json.loads(read(self))
    record["content"]["trace"] = record["content"]["trace"][:1]
    record["sha256"] = digest.of_json(record["content"])
    return json.dumps(record).encode()

  os.listdir, os.scandir, pathlib.Path.read_bytes = less, scan, another


def late_renames(work):
  """What is below `work` and not a folder of several things, at first look."""
  os_stat, os_open = os.stat, builtins.open
  looked = {}

  def check(path):
    if not isinstance(path, str | os.PathLike):
      return
    path = os.path.abspath(os.fspath(path))
    inside = path.removeprefix(work + os.sep)
    if inside == path or "tmp" in inside:  # of others, or its own
      return
    parts = inside.split(os.sep)
    if parts[0] == "checkpoints":
      parts = parts[:2]  # it is the step that was renamed
    if parts == ["run.lock"]:
      return
    at = os.path.join(work, *parts)
    try:
      os_stat(at)
    except OSError:
      return
    now = time.monotonic()
    if now - looked.setdefault(at, now) < LATE:
      say("late")
      raise FileNotFoundError(2, "No such file or directory", path)

  def late(function):
    @functools.wraps(function)
    def call(path, *arguments, **options):
      check(path)
      return function(path, *arguments, **options)

    return call

  os.stat, builtins.open = late(os_stat), late(os_open)


def another_clock():
  clock = time.time
  time.time = lambda: clock() + 86_400


def another_version():
  from adapt_pruner_jax.runs import fingerprints

  fingerprints.versions = lambda: {"jax": "0.0.1"}


def main():
  words = dict(w.split("=", 1) for w in sys.argv[1:] if "=" in w)
  me, work = int(words["--process_id"]), os.path.abspath(words["--workdir"])
  if os.environ.get("FAULTS") == "version":
    if me == 1:
      another_version()
  elif me == 1:
    another_score()
  elif me == 2:
    another_listing(work)
  elif me == 3:
    late_renames(work)
    another_clock()
  cli.main()


if __name__ == "__main__":
  main()
