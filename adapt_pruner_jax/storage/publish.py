"""Files of a run that survive anything: one writer, whole files or none.

JSON is always valid JSON: NaN and the infinities, which it does not have, are
written as the strings "NaN", "Infinity" and "-Infinity" (`float` reads them).
"""

import contextlib
import os
import shutil
from pathlib import Path

from adapt_pruner_jax.errors import UserError


def require_space(directory: Path, num_bytes: int, what: str) -> None:
  """Raises a UserError if `num_bytes` more do not fit into `directory`."""
  free = shutil.disk_usage(directory).free
  needed = num_bytes + num_bytes // 50 + 2**20  # indices and metadata
  if free < needed:
    raise UserError(
      f"{what} needs {needed / 1e9:.3f} GB, and {directory} has "
      f"{free / 1e9:.3f} GB free: make room for {(needed - free) / 1e9:.3f} GB "
      "more and run the same command again, or give a --workdir on a larger "
      "disk"
    )


def write_text(path: Path, text: str) -> None:
  """Writes a whole file, or leaves the old one as it was."""
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise unwritable(path, error) from error


def sync_directory(path: Path) -> None:
  """Makes the renames in a directory survive a power cut."""
  directory = os.open(path, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def unwritable(path: Path, error: OSError) -> UserError:
  """What to raise when writing a file failed."""
  return UserError(
    f"cannot write {path}: {error.strerror}; what was there before is intact: "
    "mend it and run the same command again"
  )
