"""Asked to stop: by SIGTERM or SIGINT to any process.

All have to stop at the same moment, as each waits for the others in the next
collective. To ask them in each train step would be a collective of its own; so
nothing is sent until one is asked. A thread of each process then says how many
moments its process has passed, and all stop at the first that none has.

What takes long and knows nothing of a run (a refit, an evaluation, an export,
reading a model) calls `moment` at each batch or tensor.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from adapt_pruner_jax.distributed import processes
from adapt_pruner_jax.errors import StoppedError

SAID = "stopped; the same command continues"
HEAR = 1000  # milliseconds that a question to the coordinator may wait
_numbers = itertools.count()
_under_way: list["Stopping"] = []  # the last one counts
_alone: list[bool] = []  # what this process does now, the others do not


class Stopping:
  """Whether this run was asked to stop."""

  def __init__(self):
    """Not yet. All processes make one together."""
    self._asked = threading.Event()
    self._name = f"stop/{next(_numbers)}"
    self._lock = threading.Lock()
    self._passed = 0  # moments
    self._told = False  # the others know how many, or will
    self._first = 0  # moment at which all stop
    self._agreed = threading.Event()
    if processes.client() is not None:
      processes.in_background(self._tell)
      processes.in_background(self._hear)

  @property
  def here(self) -> bool:
    """Whether this process knows of it; for what it does alone."""
    return self._asked.is_set()

  def ask(self) -> None:
    """Asks to stop; from a handler of signals, too."""
    self._asked.set()

  def now(self) -> bool:
    """Whether all stop at this moment: the same on all processes.

    All have to call it at the same moments, such as each train step.
    """
    if processes.client() is None:
      return self.here
    with self._lock:
      self._passed += 1
      moment = self._passed
      if not self._told:
        return False
    self._agreed.wait()
    return moment >= self._first

  def _tell(self) -> bool:
    """Passes on to all processes that this one was asked."""
    if not self._asked.wait(HEAR / 1000):
      return False
    processes.client().key_value_set(self._name, "", allow_overwrite=True)
    return True

  def _hear(self) -> bool:
    """Waits until one was asked, and agrees with the others on the moment."""
    client = processes.client()
    client.blocking_key_value_get(self._name, HEAR)
    self.ask()
    with self._lock:
      if not self._told:
        self._told, self._first = True, self._passed + 1
    mine = f"{self._name}-first/{jax.process_index()}"
    client.key_value_set(mine, str(self._first), allow_overwrite=True)
    client.wait_at_barrier(f"{self._name}-told", processes.YEARS)
    found = client.key_value_dir_get(f"{self._name}-first/")
    self._first = max(int(first) for _, first in found)
    self._agreed.set()
    return True


@contextlib.contextmanager
def stop_signals() -> Iterator[Stopping]:
  """SIGTERM and SIGINT ask to stop; a second SIGINT ends at once."""
  stopping = Stopping()

  def ask(number: int, _: Any) -> None:
    stopping.ask()
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)

  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  _under_way.append(stopping)
  try:
    yield stopping
  finally:
    _under_way.remove(stopping)
    for number, handler in old.items():
      signal.signal(number, handler)


def moment() -> None:
  """A moment at which a run may stop; all processes come to it together.

  Raises:
    StoppedError: on all of them, if the run under way was asked to stop.
  """
  if not _under_way:
    return
  stopping = _under_way[-1]
  if stopping.here if _alone else stopping.now():
    raise StoppedError(SAID)


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """For what process 0 does while the others wait for it."""
  _alone.append(True)
  try:
    yield
  finally:
    _alone.pop()
