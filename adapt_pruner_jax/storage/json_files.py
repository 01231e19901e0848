"""JSON and JSONL files, whole or as they were before.

JSON is always valid JSON: NaN and the infinities, which it does not have, are
written as the strings "NaN", "Infinity" and "-Infinity" (`float` reads them).
"""

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage.places import bucket, in_bucket
from adapt_pruner_jax.storage.publish import unwritable, write_text

# ---- JSON --------------------------------------------------------------------


def read_json(path: Path) -> Any:
  """The content of a JSON file.

  Raises:
    UserError: it is not there, unreadable, or damaged.
  """
  try:
    return json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} is damaged, it is not JSON: {error}; restore it from a copy, or "
      "move it away"
    ) from error


def read_object(path: Path) -> dict[str, Any]:
  """The content of a JSON file that holds an object.

  Raises:
    UserError: as `read_json`, or it holds something else.
  """
  found = read_json(path)
  if not isinstance(found, dict):
    raise UserError(
      f"{path} is damaged, it holds no JSON object: restore it from a copy, or "
      "move it away"
    )
  return found


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
  """Writes a whole JSON file, or leaves the old one as it was.

  Raises:
    UserError: it cannot be written.
  """
  text = json.dumps(plain(value), indent=2, sort_keys=sort_keys)
  write_text(path, text + "\n")


# ---- JSON lines --------------------------------------------------------------


def read_lines(path: Path) -> list[Any]:
  """The rows of a JSONL file, none if there is no file.

  A last line without its newline was cut off by a kill, and is left out.

  Raises:
    UserError: unreadable, or another line is damaged.
  """
  try:
    *lines, _ = _content(path).split(b"\n")
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  rows = []
  for number, text in enumerate(lines, start=1):
    try:
      rows.append(json.loads(text))
    except ValueError as error:
      there = in_bucket(path)
      beside = f", or in {path.name}.parts/ beside it," if there else ""
      raise UserError(
        f"{path}, line {number}{beside} is damaged, it is not JSON: {error}; "
        "restore the file from a copy, or move it away"
      ) from error
  return rows


def _content(path: Path) -> bytes:
  if not in_bucket(path):
    return path.read_bytes()
  return bucket().grown(path)


def append_line(path: Path, row: Any) -> None:
  """Adds a row; a line that a kill had cut off before is removed first.

  One `write`, so that a kill leaves all or nothing of it; not synced to disk,
  as this is called often.
  """
  added = line(row).encode()
  try:
    with open(path, "ab+", buffering=0) as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(size - 1, 0))
      if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
      if file.write(added) != len(added):
        file.truncate(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  except OSError as error:
    raise unwritable(path, error) from error


def rewrite_lines(path: Path, rows: Iterable[Any]) -> None:
  """Writes a whole JSONL file, or leaves the old one as it was."""
  write_text(path, "".join(map(line, rows)))


def line(row: Any) -> str:
  """A row as it is written, with its newline."""
  return json.dumps(plain(row)) + "\n"


def plain(value: Any) -> Any:
  """`value` out of what JSON has: no numpy, no NaN, no infinities."""
  if isinstance(value, dict):
    return {key: plain(child) for key, child in value.items()}
  if isinstance(value, list | tuple):
    return [plain(child) for child in value]
  if hasattr(value, "tolist"):  # of numpy and JAX, which is not imported here
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return json.dumps(value)
  return value
