"""Files of a run that survive anything: one writer, whole files or none.

JSON is always valid JSON: NaN and the infinities, which it does not have, are
written as the strings "NaN", "Infinity" and "-Infinity" (`float` reads them).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from adapt_pruner_jax import peers
from adapt_pruner_jax.errors import UserError

LOCK = "run.lock"
# What flock says on a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def is_writer() -> bool:
  """True on process 0, the only one that writes files and speaks."""
  return jax.process_index() == 0


def all_agree(ok: bool) -> bool:
  """True if `ok` is true on every process; all processes have to call it."""
  if jax.process_count() == 1:
    return ok
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def on_writer(action: Callable[[], Any]) -> Any:
  """What `action` returns on process 0, where alone it is called; else None.

  The others wait as long as it takes. If it raises a UserError, all processes
  raise one.
  """
  result, refusal = None, None
  if is_writer():
    try:
      result = action()
    except UserError as error:
      refusal = error
  peers.meet()
  if not all_agree(refusal is None):
    raise refusal or UserError("process 0 stopped; see its message")
  return result


# ---- One run at a time -------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the work directory and holds it; freed however the process ends.

  Raises:
    UserError: another run holds it, or it cannot be written to.
  """
  file = on_writer(lambda: _take(workdir))
  try:
    yield
  finally:
    if file is not None:
      os.close(file)


def _take(workdir: Path) -> int:
  path = workdir / LOCK
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written to: {error.strerror}; give a "
      "directory that you may write to"
    ) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.read(file, 1000).decode(errors="replace") or "a process"
    os.close(file)
    raise UserError(
      f"--workdir={workdir} is in use by another run ({holder}): wait for it "
      "to end, stop it, or give another directory"
    ) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      os.close(file)
      raise
    logging.warning(
      "%s: no file locks here (%s); a second run would not be refused",
      path,
      error.strerror,
    )
  holder = f"process {os.getpid()} on {socket.gethostname()}"
  try:
    os.ftruncate(file, 0)
    os.pwrite(file, holder.encode(), 0)
  except OSError as error:
    os.close(file)
    raise unwritable(path, error) from error
  return file


def require_space(directory: Path, num_bytes: int, what: str) -> None:
  """Raises a UserError if `num_bytes` more do not fit into `directory`."""
  free = shutil.disk_usage(directory).free
  needed = num_bytes + num_bytes // 50 + 2**20  # indices and metadata
  if free < needed:
    raise UserError(
      f"{what} needs {needed / 1e9:.3f} GB, and {directory} has "
      f"{free / 1e9:.3f} GB free: make room for {(needed - free) / 1e9:.3f} GB "
      "more and run the same command again, or give a --workdir on a larger "
      "disk"
    )


# ---- JSON --------------------------------------------------------------------


def read_json(path: Path) -> Any:
  """The content of a JSON file.

  Raises:
    UserError: it is not there, unreadable, or damaged.
  """
  try:
    return json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:
    raise UserError(
      f"{path} is damaged, it is not JSON: {error}; restore it from a copy, or "
      "move it away"
    ) from error


def write_text(path: Path, text: str) -> None:
  """Writes a whole file, or leaves the old one as it was."""
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
  """Writes a whole JSON file, or leaves the old one as it was."""
  write_text(path, json.dumps(plain(value), indent=2) + "\n")


def digest(content: Any) -> str:
  """sha256 of JSON in one fixed form, the same before and after writing."""
  content = json.loads(json.dumps(content))  # keys become strings, then sorted
  return hashlib.sha256(
    json.dumps(content, sort_keys=True).encode()
  ).hexdigest()


# ---- JSON lines --------------------------------------------------------------


def read_lines(path: Path) -> list[Any]:
  """The rows of a JSONL file, none if there is no file.

  A last line without its newline was cut off by a kill, and is left out.

  Raises:
    UserError: unreadable, or another line is damaged.
  """
  try:
    *lines, _ = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      raise UserError(
        f"{path}, line {number} is damaged, it is not JSON: {error}; restore "
        "the file from a copy, or move it away"
      ) from error
  return rows


def append_line(path: Path, row: Any) -> None:
  """Adds a row; a line that a kill had cut off before is removed first.

  One `write`, so that a kill leaves all or nothing of it; not synced to disk,
  as this is called often.
  """
  line = json.dumps(plain(row)).encode() + b"\n"
  try:
    with open(path, "ab+", buffering=0) as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(size - 1, 0))
      if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
      if file.write(line) != len(line):
        file.truncate(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  except OSError as error:
    raise unwritable(path, error) from error


def rewrite_lines(path: Path, rows: Iterable[Any]) -> None:
  """Writes a whole JSONL file, or leaves the old one as it was."""
  write_text(path, "".join(json.dumps(plain(row)) + "\n" for row in rows))


def plain(value: Any) -> Any:
  """`value` out of what JSON has: no numpy, no NaN, no infinities."""
  if isinstance(value, dict):
    return {key: plain(child) for key, child in value.items()}
  if isinstance(value, list | tuple):
    return [plain(child) for child in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return json.dumps(value)
  return value


def sync_directory(path: Path) -> None:
  """Makes the renames in a directory survive a power cut."""
  directory = os.open(path, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def unwritable(path: Path, error: OSError) -> UserError:
  """What to raise when writing a file failed."""
  return UserError(
    f"cannot write {path}: {error.strerror}; what was there before is intact: "
    "mend it and run the same command again"
  )
