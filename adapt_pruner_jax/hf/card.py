"""SHA256SUMS and model card of an exported directory."""

import hashlib
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig

SUMS = "SHA256SUMS"
CARD = "README.md"
CHUNK = 1 << 22


def write(
  folder: Path,
  config: ModelConfig,
  written: ModelConfig,
  source: Path | None,
  facts: dict[str, Any],
  notes: list[str],
) -> None:
  write_sums(folder)


def write_sums(folder: Path) -> None:
  """SHA256SUMS of all files, in the format of `sha256sum`."""
  lines = [f"{_sha256(file)}  {file.name}\n" for file in _files(folder)]
  (folder / SUMS).write_text("".join(lines))


def verify(path: Path) -> None:
  """Checks a directory against its SHA256SUMS.

  Raises:
    UserError: a file is missing, changed, or not listed.
  """
  try:
    lines = (path / SUMS).read_text().splitlines()
  except OSError as error:
    raise UserError(f"{path} has no {SUMS}: it cannot be checked") from error
  expected = {}
  for line in lines:
    digest, _, name = line.partition("  ")
    if len(digest) != 64 or not name or Path(name).name != name:
      raise UserError(f"{path / SUMS} is damaged: {line[:80]!r}")
    expected[name] = digest
  names = {file.name for file in _files(path)}
  for name in sorted(expected.keys() | names):
    if name not in names:
      raise UserError(f"{path / name} is missing")
    if name not in expected:
      raise UserError(f"{path / name} is not in {SUMS}")
    if _sha256(path / name) != expected[name]:
      raise UserError(f"{path / name} was changed after it was written")


def _files(folder: Path) -> list[Path]:
  return sorted(f for f in folder.iterdir() if f.is_file() and f.name != SUMS)


def _sha256(file: Path) -> str:
  digest = hashlib.sha256()
  with open(file, "rb") as opened:
    while chunk := opened.read(CHUNK):
      digest.update(chunk)
  return digest.hexdigest()
