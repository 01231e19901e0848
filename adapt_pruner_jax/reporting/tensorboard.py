"""TensorBoard's event files, one directory for each kind of row.

tensorboardX has the format. Its `SummaryWriter` is not used: it writes from a
thread, and when the disk is full that thread dies and the run waits for ever.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapt_pruner_jax.storage import cache, publish
from adapt_pruner_jax.storage.places import bucket, in_bucket

FLUSH = 10.0  # seconds; a kill loses no more of the curves than this


class Events:
  """A new event file in `directory`."""

  def __init__(self, directory: Path, restart: int | None):
    """Makes the file.

    Args:
      restart: the first step that this file has anew; older files' values from
        there on are no longer shown. None = nothing was there before.

    Raises:
      UserError: it cannot be written, as in `add` and `close`.
    """
    with _without_torch():
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2
    self._event = event_pb2.Event
    self._directory = directory  # what is written, and where it is shown
    self._bucket = directory if in_bucket(directory) else None
    if self._bucket:
      self._directory = directory = cache.beside(directory)
    # The file's own name only has the second in it.
    suffix = f".{os.getpid()}.{time.monotonic_ns()}"
    with self._explained():
      directory.mkdir(parents=True, exist_ok=True)
      self._file = EventsWriter(str(directory / "events"), suffix)
      if restart is not None:
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(step=restart, session_log=start))
    (self._path,) = directory.glob(f"*{suffix}")
    self._flushed, self._pause = time.monotonic(), FLUSH

  def add(self, step: int, scalars: Mapping[str, float]) -> None:
    """The values of one step."""
    event = self._event(step=step, wall_time=time.time())
    for name, value in scalars.items():
      event.summary.value.add(tag=name, simple_value=value)
    with self._explained():
      self._file.write_event(event)
      if time.monotonic() - self._flushed >= self._pause:
        self._file.flush()
        self._upload()
        self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what is still held."""
    with self._explained():
      self._file.close()
      self._upload()
      if self._bucket:
        self._path.unlink()

  def _upload(self) -> None:
    """Of a file in a bucket, which cannot grow: all of it, and the more seldom
    the longer that takes."""
    if self._bucket:
      begun = time.monotonic()
      bucket().put(self._path, self._bucket / self._path.name)
      self._pause = max(FLUSH, 20 * (time.monotonic() - begun))

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise publish.unwritable(self._directory, error) from error


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """tensorboardX imports it if it is there: seconds and 400 MB for nothing."""
  if "torch" in sys.modules:
    yield
    return
  sys.modules["torch"] = None
  try:
    yield
  finally:
    del sys.modules["torch"]
