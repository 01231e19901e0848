"""What a run keeps, and when."""

import pytest

from adapt_pruner_jax.config import Checkpoint
from adapt_pruner_jax.runs import state


@pytest.mark.parametrize(
  ("minutes", "seconds", "steps"),
  [
    *((0, None, 500), (0, 9.0, 500)),
    *((1, None, state.TIMED), (1, 2.0, 30), (1, 99.0, 1), (1, 0.01, 500)),
  ],
)
def test_saves_by_steps_or_time(minutes, seconds, steps):
  settings = Checkpoint(steps=500, minutes=minutes)
  assert state.steps_to_save(settings, seconds) == steps
