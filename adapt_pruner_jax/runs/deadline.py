"""`train.hours`: when training ends, whatever is left of its tokens."""

import dataclasses
import time
from collections.abc import Mapping

TRAINED = 0.92  # share of the hours behind which nothing more is trained


@dataclasses.dataclass(frozen=True)
class Stopping:
  """As `stop_signals` gives, and asked too when the time is over.

  Attributes:
    signals: from `stop_signals`.
    end: of `time.monotonic`.
  """

  signals: Mapping[str, bool]
  end: float

  def __getitem__(self, name: str) -> bool:
    return self.signals[name] or time.monotonic() > self.end


def stopping(hours: float, signals: Mapping, spent: float) -> Mapping:
  """What ends training: signals and, of a run that has hours, the clock.

  Args:
    hours: `train.hours`; 0 = no limit.
    signals: from `stop_signals`.
    spent: seconds of the run before this process.
  """
  if not hours:
    return signals
  seconds = hours * 3600 * TRAINED - spent
  return Stopping(signals, time.monotonic() + seconds)
