"""How far an evaluation is: told to whoever wants to show it.

The console is above this room, so what shows a phase is passed down:
`reporting.log.Log.phase`, or `silent`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Phase(Protocol):
  """What is told how much of the total is done."""

  def update(self, done: float) -> None: ...


# Called with a title, the total, and the unit of both.
Phases = Callable[[str, float, str], AbstractContextManager[Phase]]


class _Silence:
  def update(self, done: float) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def silent(title: str, total: float, unit: str) -> Iterator[Phase]:
  """A phase that nobody sees."""
  del title, total, unit
  yield _Silence()
