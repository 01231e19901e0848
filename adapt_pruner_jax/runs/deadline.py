"""`train.hours`: when training ends, whatever is left of its tokens."""

import dataclasses
import time

from adapt_pruner_jax.distributed.stopping import Stopping

TRAINED = 0.92  # share of the hours behind which nothing more is trained


@dataclasses.dataclass(frozen=True)
class Ending:
  """As `stop_signals` gives, and asked too when the time is over.

  Attributes:
    signals: from `stop_signals`.
    clock: asked when a process finds that the time is over.
    end: of `time.monotonic`.
  """

  signals: Stopping
  clock: Stopping
  end: float

  def now(self) -> bool:
    """As `Stopping.now`."""
    if time.monotonic() > self.end:
      self.clock.ask()
    # Both, as all processes have to ask each of them at the same moments.
    return any([self.signals.now(), self.clock.now()])


def stopping(
  hours: float, signals: Stopping, spent: float, later: float = 0.0
) -> Stopping | Ending:
  """What ends training: signals and, of a run that has hours, the clock.

  Args:
    hours: `train.hours`; 0 = no limit.
    signals: from `stop_signals`.
    spent: seconds of the run until now.
    later: seconds that evaluating the result will take.
  """
  if not hours:
    return signals
  seconds = hours * 3600 * TRAINED - spent - later
  return Ending(signals, Stopping(), time.monotonic() + seconds)
