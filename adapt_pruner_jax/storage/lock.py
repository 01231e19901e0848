"""One run at a time in a work directory, by a lock that a kill gives back."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from adapt_pruner_jax.distributed.agreement import on_writer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import publish
from adapt_pruner_jax.storage.places import in_bucket

LOCK = "run.lock"
# What flock says on a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the work directory and holds it; freed however the process ends.

  Raises:
    UserError: another run holds it, or it cannot be written to.
  """
  with contextlib.ExitStack() as stack:
    on_writer(lambda: stack.enter_context(_locked(workdir)))
    yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
  if in_bucket(workdir):
    from adapt_pruner_jax.storage import bucket_lock

    with bucket_lock.lock(workdir, LOCK):
      yield
    return
  file = _take(workdir)
  try:
    yield
  finally:
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
    publish.require_renames(workdir)
    os.ftruncate(file, 0)
    os.pwrite(file, holder.encode(), 0)
  except UserError:
    os.close(file)
    raise
  except OSError as error:
    os.close(file)
    raise publish.unwritable(path, error) from error
  return file
