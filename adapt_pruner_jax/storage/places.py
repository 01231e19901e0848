"""A place that a user names: on a disk, or in a bucket.

Both have pathlib's methods, so that most code need not know which it is. What
has to be done in another way in a bucket asks `in_bucket` and is in `bucket`,
which is imported when it is needed.
"""

import os
import re
import types
from pathlib import Path

from adapt_pruner_jax.errors import UserError, first_line

SCHEMES = ("gs://", "s3://")


def to_path(text: str | os.PathLike) -> Path:
  """The path that a user has given: pathlib's, or a `BucketPath`.

  Raises:
    UserError: it is a URL of another kind, or names no bucket or nobody's home.
  """
  if not in_bucket(text):
    if "://" in str(text):
      raise UserError(
        f"{text} is not a place for files: give a path on a disk, or in a "
        "bucket, gs://BUCKET/... or s3://BUCKET/..."
      )
    try:
      return Path(text).expanduser()
    except RuntimeError as error:
      raise UserError(f"{text}: {first_line(error)}") from error
  if not re.match(r"[a-z0-9]+://[^/]", str(text)):
    raise UserError(f"{text} names no bucket: give {SCHEMES[0]}BUCKET/...")
  from adapt_pruner_jax.storage.bucket_path import BucketPath

  return BucketPath(str(text).rstrip("/"))


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether it is in a bucket."""
  return str(path).startswith(SCHEMES)


def bucket() -> types.ModuleType:
  """The module that does what is done in another way in a bucket."""
  from adapt_pruner_jax.storage import bucket

  return bucket


def size(path: Path) -> int:
  """Bytes of a file."""
  return path.size() if in_bucket(path) else path.stat().st_size
