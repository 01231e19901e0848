"""Orbax without what it writes to the terminal besides what it raises.

It logs what it does and each error that it also raises: a full disk would be a
hundred lines of traceback and ours. Where an array is damaged it leaves the
reads of the others behind, and each of them complains when it ends or when it
is collected, which may be long after the error was handled.
"""

import functools
import sys
import warnings
from logging import LogRecord, getLogger
from typing import Any

from absl import logging


@functools.cache
def orbax() -> None:
  """Call before Orbax is used; from then on, to the end of the process."""
  logging.get_absl_logger().addFilter(
    lambda record: "/orbax/checkpoint/" not in record.pathname
  )
  getLogger("asyncio").addFilter(lambda record: not _left_behind(record))
  warnings.filterwarnings(
    "ignore",
    r"coroutine '(Store\.|async_deserialize|_read_).*' was never awaited",
    RuntimeWarning,
  )
  hook = sys.unraisablehook

  def without_reads(found: Any) -> None:
    code = getattr(found.object, "cr_code", None)
    coroutine = code is not None and "/orbax/checkpoint/" in code.co_filename
    closed = str(found.exc_value) == "Event loop is closed"
    if not coroutine and not (closed and found.object is None):
      hook(found)

  sys.unraisablehook = without_reads


def _left_behind(record: LogRecord) -> bool:
  """Whether asyncio speaks of one of Orbax's tasks or TensorStore's futures."""
  text = record.getMessage()
  return "/orbax/checkpoint/" in text or "tensorstore" in text
