"""`train.hours`: when training ends, whatever is left of its tokens."""

import time
from collections.abc import Callable

from adapt_pruner_jax.config import Config

TRAINED = 0.92  # share of the hours behind which nothing more is trained


def passed(recipe: Config, spent: float) -> Callable[[], bool]:
  """Says whether it is time to evaluate and export.

  Args:
    recipe: with `train.hours`; without, it is never.
    spent: seconds of the run before this process.
  """
  hours = recipe.train.hours
  end = time.monotonic() + hours * 3600 * TRAINED - spent
  return lambda: bool(hours) and time.monotonic() > end
