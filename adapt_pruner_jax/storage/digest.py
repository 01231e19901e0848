"""SHA-256 of bytes, of files, and of JSON in one fixed form."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PARTS, PART_BYTES = 64, 4096  # of a file, that `of_parts` reads


def of_bytes(*parts: bytes | np.ndarray) -> str:
  """SHA-256, in hexadecimal, of bytes and arrays, one after the other."""
  total = hashlib.sha256()
  for part in parts:
    total.update(np.ascontiguousarray(part).data if len(part) else b"")
  return total.hexdigest()


def of_file(path: Path) -> str:
  """SHA-256 of a file's content, as `sha256sum` prints it."""
  with open(path, "rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def of_json(content: Any) -> str:
  """SHA-256 of JSON with sorted keys: the same before and after writing it."""
  content = json.loads(json.dumps(content))  # keys become strings, then sorted
  return of_bytes(json.dumps(content, sort_keys=True).encode())


def of_parts(paths: Sequence[Path]) -> str:
  """SHA-256 of files' names and sizes, and of parts of what is in them.

  Of large files of weights, another model differs in each of the parts.
  """
  total = hashlib.sha256()
  for path in paths:
    size = path.stat().st_size
    total.update(f"{path.name} {size}".encode())
    with open(path, "rb") as opened:
      for part in range(PARTS):
        opened.seek(part * size // PARTS)
        total.update(opened.read(PART_BYTES))
  return total.hexdigest()
