"""Errors that a user can act on.

A `UserError` is one clear line: what is wrong, where, what is allowed, what to
type next. `cli.py` prints it without a traceback and exits with `EXIT_ERROR`.
Anything else that escapes is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_ERROR = 1
# A run that was asked to stop, saved its state and can be continued with the
# same command (BSD's EX_TEMPFAIL).
EXIT_STOPPED = 75
# Another process of the run died; all of them, started again, continue.
EXIT_PEER = 76
# Ctrl-C twice, or where nothing is to be saved; as a shell has it of SIGINT.
EXIT_INTERRUPTED = 130


class UserError(Exception):
  """Bad input or an environment that cannot do what was asked."""


class StoppedError(Exception):
  """The run was asked to stop; what it did is saved."""


def first_line(error: Exception) -> str:
  """What another package's error says, in one line; never empty."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Returns ' (did you mean X?)' for the allowed name nearest to `name`."""
  found = difflib.get_close_matches(name, list(allowed), n=1)
  return f" (did you mean {found[0]}?)" if found else ""
