"""Files that change at every step of a run.

On a disk each change is written at once. A bucket takes about one write a
second to an object, and none at its end: what changes is held and written at
most every `EVERY` seconds, rows as a small object of their own.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapt_pruner_jax.storage import json_files
from adapt_pruner_jax.storage.places import bucket, in_bucket

EVERY = 10.0  # seconds
MOST_PARTS = 500  # of a file, which is then written whole


class Outbox:
  """Writes such files, and holds what is not written yet."""

  def __init__(self) -> None:
    """Holds nothing."""
    self._rows: dict[Path, list[str]] = {}
    self._newest: dict[Path, Any] = {}
    self._written: dict[Path, float] = {}  # by the clock
    self._next: dict[Path, tuple[str, int]] = {}  # part: prefix, number

  def append(self, path: Path, row: Any) -> None:
    """Adds a row to a JSONL file."""
    if not in_bucket(path):
      json_files.append_line(path, row)
      return
    self._rows.setdefault(path, []).append(json_files.line(row))
    if self._is_due(path):
      self._write_rows(path)

  def replace(self, path: Path, value: Any) -> None:
    """Writes a JSON file of which only the newest content counts."""
    if not in_bucket(path):
      json_files.write_json(path, value)
      return
    self._newest[path] = value
    if self._is_due(path):
      self._write_newest(path)

  def remove(self, path: Path) -> None:
    """Removes a file, if it is there, and what is held for it."""
    self._newest.pop(path, None)
    path.unlink(missing_ok=True)

  def rows(self, path: Path) -> list[Any]:
    """The rows of a JSONL file, with those that are held."""
    self._write_rows(path)
    return json_files.read_lines(path)

  def rewrite(self, path: Path, rows: Iterable[Any]) -> None:
    """Writes a whole JSONL file, or leaves the old one as it was."""
    if not in_bucket(path):
      json_files.rewrite_lines(path, rows)
      return
    self._rows.pop(path, None)
    content = "".join(map(json_files.line, rows)).encode()
    before = bucket().whole(path)
    if content == before:  # its parts go first: they would belong to it
      self._remove_parts(path)
    path.write_bytes(content)
    self._remove_parts(path)

  def flush(self) -> None:
    """Writes all that is held."""
    for path in list(self._rows):
      self._write_rows(path)
    for path in list(self._newest):
      self._write_newest(path)

  def merge(self) -> None:
    """Writes all that is held, and JSONL files as one object each."""
    self.flush()
    for path in list(self._next):
      self._merge(path)

  def _is_due(self, path: Path) -> bool:
    return time.monotonic() - self._written.get(path, -EVERY) >= EVERY

  def _write_newest(self, path: Path) -> None:
    json_files.write_json(path, self._newest.pop(path))
    self._written[path] = time.monotonic()

  def _write_rows(self, path: Path) -> None:
    held = self._rows.get(path)
    if not held:
      return
    if path not in self._next:
      content = bucket().whole(path)
      number = len(bucket().parts(path, content))
      self._next[path] = bucket().part_prefix(content), number
    prefix, number = self._next[path]
    folder = path.with_name(path.name + bucket().PARTS)
    (folder / f"{prefix}{number:06d}.jsonl").write_bytes("".join(held).encode())
    self._rows.pop(path)
    self._next[path] = prefix, number + 1
    self._written[path] = time.monotonic()
    if number + 1 >= MOST_PARTS:
      self._merge(path)

  def _merge(self, path: Path) -> None:
    path.write_bytes(bucket().grown(path))
    self._remove_parts(path)

  def _remove_parts(self, path: Path) -> None:
    path.with_name(path.name + bucket().PARTS).rmtree(missing_ok=True)
    self._next.pop(path, None)
