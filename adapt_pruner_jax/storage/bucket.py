"""Files and directories in a bucket, where nothing is renamed or appended to.

A file is one object, there whole or not at all. A directory that is being
written, or that a kill left half-written, has an object `INCOMPLETE` in it,
from before its first change until behind its last one. A file of JSON lines
grows by numbered objects beside it, see `grown`.
"""

import functools
from pathlib import Path

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest
from adapt_pruner_jax.storage.bucket_path import BucketPath, call, version

INCOMPLETE = "incomplete"
PARTS = ".parts"


def put(local: Path, path: BucketPath) -> None:
  """Copies a file into the bucket, whole or not at all.

  Raises:
    UserError: it cannot be written, or arrived cut off.
  """
  call(path, lambda: path.fs.put_file(str(local), str(path)))
  if path.size() != local.stat().st_size:
    raise UserError(f"{path} arrived cut off: run the same command again")


def put_directory(local: Path, path: BucketPath, replace: bool) -> None:
  """Makes `path` what the directory `local` is.

  Args:
    replace: what is there may go.

  Raises:
    UserError: something is there that may not go; or it cannot be written,
      which INCOMPLETE then says.
  """
  if not replace and path.exists():
    raise UserError(f"{path} exists: give another place")
  marker = path / INCOMPLETE
  marker.write_bytes(b"")
  wanted = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
  for name in {*path.files()} - wanted - {INCOMPLETE}:
    (path / name).unlink(missing_ok=True)
  for name in sorted(wanted):
    put(local / name, path / name)
  marker.unlink()


def get(path: BucketPath, local: Path) -> None:
  """Copies an object to a file of this machine; `local` may be cut off."""
  call(path, lambda: path.fs.get_file(str(path), str(local)))


def listing(path: BucketPath) -> dict[str, list]:
  """Size and version of each object below, by its name.

  Raises:
    UserError: the directory was not written to its end.
  """
  files = path.files()
  if INCOMPLETE in files:
    raise UserError(
      f"{path} is not whole: writing it was cut off, or goes on; run the "
      "command that writes it again"
    )
  return {name: [info["size"], version(info)] for name, info in files.items()}


def move(path: BucketPath, target: BucketPath) -> None:
  """Gives all objects below `path` another name, one after the other."""
  for name in path.files():
    one, other = str(path / name), str(target / name)
    call(path, functools.partial(path.fs.cp_file, one, other))
  path.rmtree()


# ---- JSON lines --------------------------------------------------------------


def grown(path: BucketPath) -> bytes:
  """What a file has, with what was added since it was last written whole."""
  content = whole(path)
  added = parts(path, content)
  found = call(path, lambda: path.fs.cat([str(part) for part in added]))
  return content + b"".join(found[name] for name in sorted(found))


def whole(path: BucketPath) -> bytes:
  """What it had when it was last written whole; b"" if it never was."""
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return b""


def parts(path: BucketPath, content: bytes) -> list[BucketPath]:
  """The objects that were added to the file of this content, in order.

  Others belong to what the file was before: a kill came between writing it
  anew and removing them.
  """
  prefix = part_prefix(content)
  found = path.with_name(path.name + PARTS).iterdir()
  return [part for part in found if part.name.startswith(prefix)]


def part_prefix(content: bytes) -> str:
  """What the names of the parts of a file begin with."""
  return digest.of_bytes(content)[:16] + "-"
