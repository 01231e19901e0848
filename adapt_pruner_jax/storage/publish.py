"""One way to publish a file or a directory: write beside it, sync, rename.

Whatever comes in between (a kill, a full disk, a power cut), under its name is
the old one or the new one, whole. What a kill leaves beside it has a name of
its own, which whoever publishes there an hour later removes.
"""

import contextlib
import ctypes
import glob
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from adapt_pruner_jax.config import is_recipe
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage.places import bucket, in_bucket

AGAIN = "mend that and run the same command again, or give another place"
SHOWS = 90  # seconds that another machine's file may take to show
_ABANDONED = 3600  # seconds: what nobody touched for so long is nobody's
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextlib.contextmanager
def file(path: Path, advice: str = AGAIN) -> Iterator[Path]:
  """A name to write a file at, which becomes `path` at the end.

  If anything is raised inside, `path` stays as it was.

  Args:
    path: in a directory that exists.
    advice: the end of the message when it cannot be written.

  Raises:
    UserError: it cannot be written.
  """
  with _beside(_written_at(path), advice) as temporary:
    yield temporary
    if in_bucket(path):
      bucket().put(temporary, path)
      return
    _sync(temporary)
    real = Path(os.path.realpath(path))
    os.replace(temporary, real)
    _sync(real.parent)


@contextlib.contextmanager
def directory(
  path: Path, *, replace: bool = False, advice: str = AGAIN
) -> Iterator[Path]:
  """A directory to fill, which becomes `path` at the end.

  If anything is raised inside, `path` stays as it was. Files in it are synced
  together, at the end.

  Args:
    replace: takes the place of a directory that is there; else that stays,
      which is a UserError unless `path` is empty.
    advice: the end of the message when it cannot be written.

  Raises:
    UserError: it cannot be written.
  """
  put_back(path)
  with _beside(_written_at(path), advice) as temporary:
    temporary.mkdir()
    yield temporary
    if in_bucket(path):
      bucket().put_directory(temporary, path, replace)
      return
    for found in sorted(temporary.rglob("*"), reverse=True):
      _sync(found)  # what is in a directory, and then the directory
    _sync(temporary)
    _take_place(temporary, Path(os.path.realpath(path)), replace)


def write_text(path: Path, text: str) -> None:
  """Writes a whole file, or leaves the old one as it was.

  Raises:
    UserError: it cannot be written.
  """
  if in_bucket(path):
    path.write_bytes(text.encode())
    return
  with file(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def put_back(path: Path) -> None:
  """Undoes a replacement of a directory that was cut off in the middle.

  That is between two renames, on file systems that cannot swap two names.
  """
  if in_bucket(path):
    return
  aside = _aside(path)
  if aside.is_dir() and not path.exists():
    with contextlib.suppress(OSError):  # another process was faster
      aside.rename(path)
      logging.warning("%s was put back: its replacement was cut off", path)


def remove_cut_off(path: Path) -> None:
  """Deletes at once what killed processes were writing as `path`.

  For those who alone publish there, as they hold a lock.
  """
  real = _written_at(path)
  _remove_abandoned(real.parent, _prefix(real), 0)


def wait_for(path: Path, seconds: float | None = None) -> bool:
  """Waits until what process 0 has published shows here too.

  Mounts of a bucket, and NFS, look again after up to a minute only.

  Args:
    seconds: give up then; default `SHOWS`.

  Returns:
    Whether it is there.
  """
  end = time.monotonic() + (SHOWS if seconds is None else seconds)
  while not path.exists():
    if time.monotonic() > end:
      return False
    time.sleep(0.2)
    with contextlib.suppress(OSError):  # some ask the server only for this
      any(path.parent.iterdir())
  return True


def require_shared(path: Path) -> None:
  """As `wait_for`, in all processes but 0, for what all of them need.

  Raises:
    UserError: it does not show.
  """
  # Those who only publish need no JAX.
  from adapt_pruner_jax.distributed import agreement

  if not agreement.is_writer() and not wait_for(path):
    raise UserError(
      f"{path}, which process 0 has written, did not show here in {SHOWS} s: "
      "all processes need a --workdir (and ADAPT_PRUNER_CACHE) on one file "
      "system that they share"
    )


# ---- May I write here? -------------------------------------------------------


def require_free(
  path: Path, overwrite: bool, marks: Sequence[str] = ()
) -> None:
  """Makes the parent of `path`, and raises unless `path` may be published.

  Args:
    overwrite: whether what is there may go.
    marks: a directory goes only if it is empty or has one of these files;
      () = `path` is a file.

  Raises:
    UserError: something is there that has to stay, or the parent cannot be
      written to.
  """
  put_back(path)
  if not marks and path.is_dir():
    raise UserError(f"{path} is a directory: give the name of a file in it")
  if path.exists():
    if not overwrite:
      raise UserError(f"{path} exists: give another --out, or --overwrite")
    if marks and not _is_ours(path, marks):
      raise UserError(
        f"{path} is not a model directory and is not overwritten: give another "
        "name"
      )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise unwritable(path, error) from error
  if in_bucket(path):  # where else than in the parent, it will show
    return
  with _beside(path, AGAIN) as temporary:
    temporary.touch()


def require_renames(folder: Path) -> None:
  """Raises a UserError where a directory cannot be renamed: mounted buckets.

  Args:
    folder: a work directory.
  """
  tried = folder / f"{_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}"
  renamed = tried.with_name(f"{tried.name}.renamed")
  try:
    tried.mkdir()
    (tried / "file").touch()
  except OSError as error:
    _remove(tried)
    raise unwritable(folder, error) from error
  try:
    tried.rename(renamed)
  except OSError as error:
    raise UserError(
      f"--workdir={folder}: directories cannot be renamed there "
      f"({error.strerror}), which checkpoints and exports need: give the "
      "bucket itself, --workdir=gs://BUCKET/... or s3://BUCKET/..., or a disk "
      "or NFS; or mount it with --rename-dir-limit=200000 (Cloud Storage FUSE)"
    ) from error
  finally:
    _remove(tried)
    _remove(renamed)


def require_space(directory: Path, num_bytes: int, what: str) -> None:
  """Raises a UserError if `num_bytes` more do not fit into `directory`.

  Args:
    what: the subject of the message, such as "the export".
  """
  if in_bucket(directory):
    return
  free = shutil.disk_usage(directory).free
  needed = num_bytes + num_bytes // 50 + 2**20  # indices and metadata
  if free < needed:
    raise UserError(
      f"{what} needs {needed / 1e9:.3f} GB, and {directory} has "
      f"{free / 1e9:.3f} GB free: make room for {(needed - free) / 1e9:.3f} GB "
      "more and run the same command again, or give a --workdir on a larger "
      "disk"
    )


def unwritable(path: Path, error: OSError, advice: str = AGAIN) -> UserError:
  """What to raise when a file or directory could not be written."""
  return UserError(
    f"cannot write {path}: {error.strerror or error}; what was there before is "
    f"intact: {advice}"
  )


def _is_ours(path: Path, marks: Sequence[str]) -> bool:
  if in_bucket(path):  # one that was not written to its end, too
    marks = (*marks, bucket().INCOMPLETE)
  if not path.is_dir() or is_recipe(_json_in(path / "config.json")):
    return False  # a work directory: all of its run would go
  return not any(path.iterdir()) or any(
    (path / name).is_file() for name in marks
  )


def _json_in(file: Path) -> Any:
  """The content of a JSON file; None if there is none in it."""
  try:
    return json.loads(file.read_bytes())
  except (OSError, ValueError):
    return None


def remove(path: Path) -> None:
  """Deletes a file, or a directory with all in it, if it is there."""
  if in_bucket(path):
    path.rmtree(missing_ok=True)
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
  """Renames a directory, or copies and deletes what is in it in a bucket."""
  if in_bucket(path):
    bucket().move(path, target)
  else:
    path.rename(target)


# ---- How it is done ----------------------------------------------------------


def _written_at(path: Path) -> Path:
  """Where on this machine a file or directory is written, to be published."""
  if not in_bucket(path):
    return path
  from adapt_pruner_jax.storage import cache

  folder = cache.beside(path.parent) / "uploads"
  cache.make(folder)
  return folder / path.name


@contextlib.contextmanager
def _beside(path: Path, advice: str) -> Iterator[Path]:
  """A new name beside `path`; what is left under it is removed at the end."""
  real = Path(os.path.realpath(path))  # a link stays one
  prefix = _prefix(real)
  temporary = real.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
  try:
    _remove_abandoned(real.parent, prefix, _ABANDONED)
    yield temporary
  except OSError as error:
    raise unwritable(path, error, advice) from error
  finally:
    _remove(temporary)


def _take_place(new: Path, path: Path, replace: bool) -> None:
  if not replace or not path.exists():
    new.rename(path)
  elif not _swap(new, path):
    aside = _aside(path)
    _remove(aside)
    path.rename(aside)
    try:
      new.rename(path)
    except OSError:
      aside.rename(path)
      raise
  _sync(path.parent)
  _remove(_aside(path))


def _swap(one: Path, other: Path) -> bool:
  """Swaps two names in one moment; False where the system cannot."""
  try:
    swap = ctypes.CDLL(None, use_errno=True).renameat2
  except AttributeError:  # not on Linux
    return False
  names = os.fsencode(one), _AT_FDCWD, os.fsencode(other)
  return swap(_AT_FDCWD, *names, _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
  """Makes a file's content, or the names in a directory, survive a power cut.

  Links are left alone.
  """
  if path.is_symlink():
    return
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


def _aside(path: Path) -> Path:
  real = Path(os.path.realpath(path))
  return real.with_name(f".{real.name}.old")


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


def _prefix(path: Path) -> str:
  return f".{path.name}.tmp-"


def _remove_abandoned(folder: Path, prefix: str, seconds: float) -> None:
  """Deletes what killed processes were writing, untouched for so long.

  By the clock of the file system, which may be another machine's.
  """
  found, now = list(folder.glob(f"{glob.escape(prefix)}*")), math.inf
  if found and seconds:
    with tempfile.TemporaryFile(dir=folder) as probe:
      now = os.fstat(probe.fileno()).st_mtime
  for path in found:
    with contextlib.suppress(FileNotFoundError):  # its process has renamed it
      touched = [p.stat().st_mtime for p in (path, *path.rglob("*"))]
      if now - max(touched) >= seconds:
        _remove(path)
