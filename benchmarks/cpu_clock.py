"""What a method costs on a CPU, whatever else runs beside it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax.monitoring

COMPILING = "/jax/core/compile/backend_compile_duration"


class CpuClock:
  """CPU seconds of this process, those that XLA compiled in taken off."""

  def __init__(self) -> None:
    self.seconds = self.compiling = 0.0
    self.running = False
    jax.monitoring.register_event_duration_secs_listener(self.note)

  def note(self, event: str, seconds: float, **_: Any) -> None:
    if self.running and event == COMPILING:
      self.compiling += seconds

  @contextlib.contextmanager
  def counting(self) -> Iterator[None]:
    before, begun = self.compiling, time.process_time()
    self.running = True
    try:
      yield
    finally:
      self.running = False
      compiled = self.compiling - before
      self.seconds += time.process_time() - begun - compiled
