"""One run at a time in a work directory in a bucket.

The lock is the object of the highest number in a folder. Its owner has created
it on the condition that there was none, writes it anew every `BEAT` seconds,
and marks it as free at the end. Who finds one that has not changed for `DEAD`
seconds, by his own clock, creates the next number; of several who try, the
server lets one. An owner that was taken for dead sees a higher number at its
next beat, and ends at once.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from adapt_pruner_jax.errors import EXIT_ERROR, UserError
from adapt_pruner_jax.storage.bucket_path import BucketPath

BEAT = 10  # seconds
DEAD = 45
RUN = secrets.token_hex(8)  # of this process, and of no other on any machine


@contextlib.contextmanager
def lock(workdir: BucketPath, name: str) -> Iterator[None]:
  """Holds the lock of a work directory; freed, or dead, at the end.

  Args:
    name: of the folder in it.

  Raises:
    UserError: another run holds it, or it cannot be written to.
  """
  if set(str(workdir)) & set("*?["):  # fsspec would look for what matches
    raise UserError(
      f"--workdir={workdir}: a name in a bucket may not have * ? or [; give "
      "another one"
    )
  mine = _take(workdir, workdir / name)
  ended = threading.Event()
  beating = threading.Thread(
    target=_beat, args=(workdir, mine, ended), daemon=True
  )
  beating.start()
  try:
    yield
  finally:
    ended.set()
    beating.join(BEAT)
    with contextlib.suppress(UserError):  # it will be found dead
      mine.write_bytes(_content(free=True))


def _take(workdir: BucketPath, folder: BucketPath) -> BucketPath:
  """Creates the next number, once the one before is free or dead."""
  end, seen = None, None
  while True:
    numbers = _numbers(folder)
    content = _read(folder / numbers[-1]) if numbers else b""
    held = _held(content)
    if content != seen and seen is not None and not held["free"]:
      raise UserError(
        f"--workdir={workdir} is in use by another run ({held['who']}): wait "
        "for it to end, stop it, or give another directory"
      )
    if seen is None and not held["free"]:
      end = time.monotonic() + DEAD
    dead = held["free"] or _was_here(held) or time.monotonic() > end
    if dead:
      mine = folder / f"{int(numbers[-1]) + 1 if numbers else 1:09d}"
      if _create(mine, _content()):
        for number in numbers:
          (folder / number).unlink(missing_ok=True)
        return mine
    elif seen is None:
      logging.warning(
        "%s is, or was, in use by %s: a live run shows within %d s",
        workdir,
        held["who"],
        DEAD,
      )
    seen = content
    time.sleep(0.2 if dead else 2)


def _create(mine: BucketPath, content: bytes) -> bool:
  """Whether this process has created it; False if another was faster."""
  try:
    mine.create(content)
  except FileExistsError:
    # Or it was this one, whose request was repeated as its answer was lost.
    return _read(mine) == content
  return True


def _read(path: BucketPath) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError:  # the next owner has just removed it
    return b""


def _held(content: bytes) -> dict:
  """What a lock says; nothing = there is none."""
  unknown = {"who": "whoever has written what is no lock", "free": False}
  try:
    found = json.loads(content or b'{"free": true}')
  except ValueError:
    return unknown
  return unknown | found if isinstance(found, dict) else unknown


def _beat(
  workdir: BucketPath, mine: BucketPath, ended: threading.Event
) -> None:
  count = 0
  while not ended.wait(BEAT):
    count += 1
    try:
      if _numbers(mine.parent)[-1:] > [mine.name]:
        _lost(workdir)
      mine.write_bytes(_content(beat=count))
    except Exception as error:  # the run itself will hear of it as well
      logging.warning("%s", error)


def _lost(workdir: BucketPath) -> None:
  """Ends the process: whatever it did from now on would be in another's way."""
  message = (
    f"error: --workdir={workdir} was taken over by another run, as this one "
    f"was not seen for {DEAD} s (frozen, or cut off from the bucket); it ends\n"
  )
  sys.stdout.flush()
  sys.stderr.flush()
  os.write(2, message.encode())
  os._exit(EXIT_ERROR)


def _numbers(folder: BucketPath) -> list[str]:
  return [p.name for p in folder.iterdir() if p.name.isdecimal()]


def _content(free: bool = False, beat: int = 0) -> bytes:
  who = f"process {os.getpid()} on {socket.gethostname()}"
  content = {"who": who, "run": RUN, "free": free, "beat": beat}
  return json.dumps(content | {"pid": os.getpid()} | _here()).encode()


def _here() -> dict[str, str]:
  """What tells this machine, since it was started, from all others."""
  facts = {"host": socket.gethostname()}
  with contextlib.suppress(OSError):  # not on Linux
    facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    facts["pids"] = os.readlink("/proc/self/ns/pid")
  return facts


def _was_here(held: dict) -> bool:
  """Whether the owner was a process of this machine that has ended."""
  here = _here()
  if "boot" not in here or not here.items() <= held.items():
    return False
  try:
    os.kill(held["pid"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    return False
  return False
