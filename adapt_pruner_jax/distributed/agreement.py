"""Of several processes one writes and decides, and all come to the same end."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.distributed import processes
from adapt_pruner_jax.errors import UserError


def is_writer() -> bool:
  """True on process 0, the only one that writes files and speaks."""
  return jax.process_index() == 0


def all_agree(ok: bool) -> bool:
  """True if `ok` is true on every process; all processes have to call it."""
  if jax.process_count() == 1:
    return ok
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def from_writer(value: np.ndarray) -> np.ndarray:
  """An array as process 0 has it; all have to call it, with one shape."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.broadcast_one_to_all(value))


def on_writer(action: Callable[[], Any]) -> Any:
  """What `action` returns on process 0, where alone it is called; else None.

  The others wait as long as it takes.

  Raises:
    UserError: `action` raised one; on all processes.
  """
  result, refusal = None, None
  if is_writer():
    try:
      result = action()
    except UserError as error:
      refusal = error
  processes.meet()
  if not all_agree(refusal is None):
    raise refusal or UserError("process 0 stopped; see its message")
  return result
