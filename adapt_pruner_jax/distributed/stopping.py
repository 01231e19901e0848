"""Asked to stop: by SIGTERM, SIGINT, or a preemption of any process."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax

from adapt_pruner_jax.distributed import agreement

ASK_EVERY = 4  # train steps


@contextlib.contextmanager
def stop_signals() -> Iterator[dict]:
  """SIGTERM and SIGINT set ["asked"]; a second SIGINT ends at once."""
  stopping = {"asked": False}

  def ask(number: int, _: Any) -> None:
    stopping["asked"] = True
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)

  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stopping
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def asked_to_stop(stopping: dict, step: int) -> bool:
  """Whether to stop; of several processes all say the same at one step."""
  # To ask the others waits for the step before, so it is not done each time.
  if jax.process_count() > 1 and step % ASK_EVERY:
    return False
  return not agreement.all_agree(not stopping["asked"])
