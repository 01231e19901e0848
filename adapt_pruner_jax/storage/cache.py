"""Where things are kept between runs that can be made again."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

import jax
from absl import logging

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest
from adapt_pruner_jax.storage.places import in_bucket, to_path

ADVICE = (
  "mend that, or set ADAPT_PRUNER_CACHE to a directory that can be written, "
  "and run the same command again"
)
LARGEST = 4 * 2**30  # bytes of compiled programs that are kept


def home() -> Path:
  """$ADAPT_PRUNER_CACHE, else ~/.cache/adapt_pruner_jax; it may not exist yet.

  It is on this machine: of a bucket that is named only `tokens` makes use. A
  user without a home has a folder of the system's temporary one.
  """
  given = os.environ.get("ADAPT_PRUNER_CACHE")
  if given and not in_bucket(given):
    return Path(os.path.expanduser(given))
  with contextlib.suppress(RuntimeError):  # no HOME and no entry in passwd
    return Path.home() / ".cache" / "adapt_pruner_jax"
  folder = Path(tempfile.gettempdir()) / f"adapt_pruner_jax-{os.getuid()}"
  logging.warning(
    "there is no home directory: %s is the cache; ADAPT_PRUNER_CACHE names "
    "another",
    folder,
  )
  return folder


def beside(workdir: Path) -> Path:
  """A folder for what belongs to a work directory and can be made again.

  It is in the work directory, or on this machine for one in a bucket.
  """
  if not in_bucket(workdir):
    return workdir / "cache"
  name = digest.of_bytes(str(workdir).encode())[:16]
  return home() / "workdirs" / name


def tokens(workdir: Path) -> Path:
  """Where the tokens of texts are kept, for the runs of all work directories.

  Several processes may be on several machines, and have only the work directory
  and what $ADAPT_PRUNER_CACHE names in common.
  """
  given = os.environ.get("ADAPT_PRUNER_CACHE", "")
  if in_bucket(given):
    return to_path(given) / "tokens"
  if jax.process_count() > 1 and not given:
    return workdir / "cache"
  return home() / "tokens"


def make(folder: Path) -> None:
  """Makes a folder of the cache.

  Raises:
    UserError: it cannot be made.
  """
  try:
    if folder.is_relative_to(home()):  # compiled programs want it private
      home().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"cannot write {folder}: {reason}: {ADVICE}") from error


def keep_compiled_programs() -> None:
  """Lets JAX keep them in the cache, unless it has been given a place.

  JAX keys them by the program and its devices; beyond `LARGEST` those that
  were not used for the longest go.

  Not where others could write, since what is there is run: one line says so.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  folder = home() / "jax"
  problem = _why_not_private(folder)
  if problem:
    logging.warning("compiled programs are not kept: %s", problem)
  else:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)


def _why_not_private(folder: Path) -> str:
  """Makes the folder if need be; empty = nobody else can write to it."""
  try:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found, above = folder.stat(), folder.parent.stat()
  except OSError as error:
    return (
      f"{error.filename or folder}: {error.strerror}; set ADAPT_PRUNER_CACHE "
      "to a directory that can be written"
    )
  others = stat.S_IWGRP | stat.S_IWOTH
  sticky = above.st_mode & stat.S_ISVTX  # nobody can put another one there
  if found.st_uid != os.getuid() or found.st_mode & others:
    shared = folder
  elif above.st_uid not in (0, os.getuid()) or (
    above.st_mode & others and not sticky
  ):
    shared = folder.parent
  else:
    return ""
  return (
    f"{shared} can be written to by others; make it yours alone (chmod 700), "
    "or set ADAPT_PRUNER_CACHE to another directory"
  )
