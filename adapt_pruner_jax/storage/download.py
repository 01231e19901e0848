"""Copies of what is in a bucket, for what has to be a file of this machine."""

from pathlib import Path

import filelock

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import bucket, cache, digest, publish
from adapt_pruner_jax.storage.bucket_path import BucketPath


def copy(path: BucketPath) -> Path:
  """A copy in the cache of a directory or an object as it is now.

  It is made once for each content of the bucket, by one process of a machine.

  Raises:
    UserError: nothing is there, it is not whole, or it changed meanwhile.
  """
  if path.is_file():
    path, name = path.parent, path.name
  else:
    name = ""
  found = _listing(path, name)
  if not found:
    raise UserError(f"{path / name} does not exist")
  key = digest.of_json([str(path), found])[:16]
  folder = cache.home() / "downloads" / key / path.name
  cache.make(folder.parent)
  with filelock.FileLock(folder.parent / "lock"):
    if not folder.exists():
      needed = sum(size for size, _ in found.values())
      publish.require_space(folder.parent, needed, f"a copy of {path}")
      with publish.directory(folder) as temporary:
        _fill(path, name, found, temporary)
  return folder / name


def _listing(path: BucketPath, name: str) -> dict[str, list]:
  found = bucket.listing(path)
  return {n: f for n, f in found.items() if not name or n == name}


def _fill(
  path: BucketPath, only: str, found: dict[str, list], folder: Path
) -> None:
  for name, (size, _) in found.items():
    file = folder / name
    if folder not in file.resolve().parents:
      raise UserError(f"{path / name} would be outside of its directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    bucket.get(path / name, file)
    if file.stat().st_size != size:
      raise UserError(f"{path / name} arrived cut off: run this again")
  if _listing(path, only) != found:
    raise UserError(
      f"{path} was changed while it was read: run this again when nobody "
      "writes there"
    )
