"""How far a phase of a run is, and numbers in a form for people.

The clock is one that never goes backwards.
"""

import math
import time
from collections.abc import Callable
from typing import Any


class Phase:
  """How far something is. `Log.phase` makes it; `update` tells it."""

  def __init__(
    self,
    title: str,
    total: float,
    unit: str,
    peak_seconds: float | None,
    show: "Callable[[Phase], None]",
  ):
    """See `Log.phase`.

    Args:
      peak_seconds: what a unit takes at the devices' peak, None if not known.
      show: called at each update.
    """
    self.title, self.total, self.unit = title, total, unit
    self.done: float = 0
    self.fields: dict[str, Any] = {}
    self._peak_seconds, self._show = peak_seconds, show
    self._begin = time.monotonic()
    # Of the first update, so that neither compiling nor what an earlier process
    # did counts in the rate: (seconds, done).
    self._first: tuple[float, float] | None = None
    # Known at the end: seconds, and bytes of a device at its fullest.
    self._took: float | None = None
    self._memory: int | None = None

  def begin(self) -> None:
    """Shows it before its first update, which may be minutes away."""
    self._show(self)

  def update(self, done: float, **fields: Any) -> None:
    """`done` of `total` units are done; `fields` are shown under their names.

    A field stays until it is given again.
    """
    self.done = done
    self.fields |= fields
    if self._first is None:
      self._first = (time.monotonic(), done)
    self._show(self)

  def end(self, memory: int | None = None) -> None:
    """From now on `details` has how long it took.

    Args:
      memory: bytes of the fullest device, at most until now, if that is known.
    """
    self._took = time.monotonic() - self._begin
    self._memory = memory

  def result(self) -> dict[str, Any]:
    """What it took, for metrics.jsonl."""
    return {
      "title": self.title,
      "seconds": self._took,
      "done": self.done,
      "unit": self.unit,
      "per_second": self.rate,
      "mfu": self.mfu,
      "memory_peak": self._memory,
    }

  @property
  def rate(self) -> float | None:
    """Units a second since the first update, None before the second."""
    if self._first is None or self.done <= self._first[1]:
      return None
    seconds = time.monotonic() - self._first[0]
    return (self.done - self._first[1]) / max(seconds, 1e-9)

  @property
  def mfu(self) -> float | None:
    """Model FLOPs utilisation: share of the devices' peak, if that is known."""
    if self.rate is None or self._peak_seconds is None:
      return None
    return self.rate * self._peak_seconds

  def line(self) -> str:
    """Title and details."""
    return f"{self.title}: {self.details()}"

  def details(self) -> str:
    """Such as '512 / 4,096 tokens, loss 3.21, 900 tokens/s, 4 s left'."""
    if self._first is None and self._took is None:
      return f"{show(self.total)} {self.unit}, compiling first"
    parts = [f"{show(self.done)} / {show(self.total)} {self.unit}"]
    for name, value in self.fields.items():
      parts.append(f"{name.replace('_', ' ')} {show(value)}")
    if self.rate is not None:
      parts.append(f"{show(self.rate)} {self.unit}/s")
    if self.mfu is not None:
      parts.append(f"MFU {self.mfu:.1%}")
    if self._took is not None:
      parts.append(f"took {duration(self._took)}")
      if self._memory is not None:
        parts.append(f"memory at most {self._memory / 1e9:.2f} GB")
    elif self.rate is not None:
      parts.append(f"{duration((self.total - self.done) / self.rate)} left")
    return ", ".join(parts)


class Pace:
  """How fast train steps follow each other.

  What it says of a step is of the time since the step before, so that the first
  has nothing, nor has one behind a `pause`.
  """

  def __init__(self, tokens: int, flops: float, chips: int, peak: float | None):
    """Nothing is timed yet.

    Args:
      tokens: of a step.
      flops: of a step, the model's own: what is computed twice or for padding
        counts once or not at all.
      chips: devices of all processes.
      peak: FLOP/s of one, None if not known.
    """
    self._tokens, self._flops = tokens, flops
    self._chips, self._peak = chips, peak
    self._last: float | None = None

  def step(self) -> dict[str, float]:
    """Of the step that has ended: step_seconds, tokens_per_second_per_chip,
    and mfu, if the peak is known."""
    last, self._last = self._last, time.monotonic()
    if last is None:
      return {}
    seconds = max(self._last - last, 1e-9)
    rate = 1 / seconds / self._chips
    found = {
      "step_seconds": seconds,
      "tokens_per_second_per_chip": self._tokens * rate,
    }
    if self._peak:
      found["mfu"] = self._flops * rate / self._peak
    return found

  def pause(self) -> None:
    """Something else than steps comes now."""
    self._last = None


def show(value: Any) -> str:
  """A value for people: 1,234, 0.01235, '-' for None."""
  if value is None:
    return "-"
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
    return f"{value:,.0f}"
  return f"{value:.4g}"


def duration(seconds: float) -> str:
  """Seconds for people: '42 s', '3 min 20 s', '2 h 05 min'."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes >= 60:
    return f"{minutes // 60} h {minutes % 60:02d} min"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
