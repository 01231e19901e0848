"""Paths in a bucket, `gs://` and `s3://`, beside those on a disk.

They are etils' paths over fsspec (gcsfs, s3fs). What differs here: listings are
never taken from a cache, since others write too; while a bucket that was there
before says 503 or 429, or cannot be reached, the call waits; and whatever else
goes wrong is a `UserError`, but for a missing or an existing file.
"""

import errno
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from absl import logging as absl
from etils import epath

from adapt_pruner_jax.errors import UserError, first_line

PATIENCE = 600  # seconds that a bucket which was there may be away
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_LIBRARIES = (
  *("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google"),
  *("requests", "s3fs", "urllib3"),
)
_LOGIN = {
  "gs": "log in with `gcloud auth application-default login`, or set "
  "GOOGLE_APPLICATION_CREDENTIALS",
  "s3": "log in with `aws configure`, or set AWS_ACCESS_KEY_ID and "
  "AWS_SECRET_ACCESS_KEY",
}
# Words of what passes, of no credentials or old ones, of another region, of a
# lack of rights, of no room (a quota, or a server's disks), and of a clock that
# is wrong.
_PASSES = (
  *("SlowDown", "Service Unavailable", "ServiceUnavailable", "InternalError"),
  *("Too Many Requests", "rateLimitExceeded", "throttl", "request rate"),
  *("UNAVAILABLE", "DEADLINE_EXCEEDED"),
)
_CODES = re.compile(r"\((429|5\d\d)\)|, (429|5\d\d)$")
_CONNECTION = ("Connect", "Timeout", "Disconnected", "ClientOSError", "Payload")
_NOBODY = (
  *("NoCredentials", "CredentialsError", "credentials", "Anonymous caller"),
  *(", 401", "UNAUTHENTICATED", "ExpiredToken", "token has expired"),
  *("InvalidToken", "InvalidAccessKeyId", "Access Key Id you provided"),
  *("SignatureDoesNotMatch", "signature we calculated", "RefreshError"),
)
_REGION = (
  *("AuthorizationHeaderMalformed", "the region '", "PermanentRedirect"),
  *("using the specified endpoint", "IllegalLocation"),
)
_FORBIDDEN = ("Forbidden", "AccessDenied", "Access Denied", "PERMISSION_DENIED")
_FULL = (
  *("StorageFull", "QuotaExceeded", "Insufficient Storage", "(507)", ", 507"),
  *("minimum free drive", "quota has been exceeded", "billing account"),
)
_CLOCK = (
  *("TimeTooSkewed", "request time and the", "RequestExpired"),
  *("Token used too", "reasonable timeframe"),
)
_TENSORSTORE = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED"),
  *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
)
_known: set[str] = set()  # buckets that have answered this process


class BucketPath(type(epath.Path("gs://bucket"))):
  """A path in a bucket, with pathlib's methods."""

  @property
  def bucket(self) -> str:
    """The scheme and the name of the bucket."""
    scheme, _, rest = str(self).partition("://")
    return f"{scheme}://{rest.split('/')[0]}"

  @property
  def fs(self) -> fsspec.AbstractFileSystem:
    """What reads and writes there."""
    return file_system(self.bucket)

  def exists(self) -> bool:
    """Whether there is an object of this name, or any below it."""
    return bool(self._kind())

  def is_file(self) -> bool:
    """Whether there is an object of this name."""
    return self._kind() == "file"

  def is_dir(self) -> bool:
    """Whether there are objects below this name."""
    return self._kind() == "directory"

  def is_symlink(self) -> bool:
    """There are no links in a bucket."""
    return False

  def absolute(self) -> "BucketPath":
    """It always is."""
    return self

  def resolve(self, strict: bool = False) -> "BucketPath":
    """There are no links, and nothing is relative."""
    return self

  def iterdir(self) -> Iterator["BucketPath"]:
    """What is right below, by name; nothing if nothing is there."""
    try:
      found = call(self, lambda: self.fs.ls(str(self), detail=False))
    except FileNotFoundError:
      found = []
    own = str(self).partition("://")[2]  # a marker of the directory itself
    found = {name.rstrip("/") for name in found} - {own}
    return iter([self / name.rsplit("/", 1)[-1] for name in sorted(found)])

  def files(self) -> dict[str, dict]:
    """All objects below: size and more of each, by its name from here."""
    try:
      found = call(self, lambda: self.fs.find(str(self), detail=True))
    except FileNotFoundError:  # what gcsfs says where there is no bucket
      found = {}
    first = len(str(self).partition("://")[2]) + 1
    return {name[first:]: info for name, info in sorted(found.items())}

  def mkdir(self, *_: Any, **__: Any) -> None:
    """A bucket has no directories: there is nothing to make."""

  def size(self) -> int:
    """Bytes of the object."""
    return call(self, lambda: self.fs.info(str(self)))["size"]

  def version(self) -> str:
    """What changes with the object's content."""
    return version(call(self, lambda: self.fs.info(str(self))))

  def read_bytes(self) -> bytes:
    """All of the object."""
    return call(self, lambda: self.fs.cat_file(str(self)))

  def read_range(self, start: int, stop: int) -> bytes:
    """Bytes of the object, as many as there are of these."""
    read = self.fs.cat_file
    return call(self, lambda: read(str(self), start=start, end=stop))

  def read_text(self, encoding: str = "utf-8") -> str:
    """All of the object, decoded."""
    return self.read_bytes().decode(encoding)

  def write_bytes(self, data: bytes) -> None:
    """Writes the object whole, or leaves the old one as it was."""
    write(self, lambda: self.fs.pipe_file(str(self), data))

  def create(self, data: bytes) -> None:
    """Writes the object if there is none of this name, as the server sees it.

    Raises:
      FileExistsError: there is one.
    """
    write(self, lambda: self.fs.pipe_file(str(self), data, mode="create"))

  def unlink(self, missing_ok: bool = False) -> None:
    """Removes the object."""
    try:
      call(self, lambda: self.fs.rm_file(str(self)))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self, missing_ok: bool = False) -> None:
    """Removes all objects below, and the one of this name."""
    try:
      call(self, lambda: self.fs.rm(str(self), recursive=True))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def _kind(self) -> str:
    try:
      return call(self, lambda: self.fs.info(str(self)))["type"]
    except FileNotFoundError:
      return ""


@functools.cache
def file_system(url: str) -> fsspec.AbstractFileSystem:
  """fsspec's file system of a URL.

  Raises:
    UserError: its package is not installed.
  """
  _configure()
  scheme = url.partition("://")[0]
  try:
    return fsspec.filesystem(scheme)
  except ImportError as error:
    raise UserError(
      f"{url} needs the package {_PACKAGES[scheme]}: pip install "
      "'adapt_pruner_jax[bucket]'"
    ) from error


@functools.cache
def _configure() -> None:
  """Before the first use of fsspec and etils; what a user has set stays."""
  os.environ.setdefault("EPATH_USE_TF", "false")  # fsspec, as for the rest
  # It logs each error that it also raises, with a traceback.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  for scheme in ("s3", "gs", "gcs"):
    settings = fsspec.config.conf.setdefault(scheme, {})
    settings.setdefault("use_listings_cache", False)
  if "AWS_MAX_ATTEMPTS" not in os.environ:
    retries = {"retries": {"max_attempts": 8, "mode": "standard"}}
    fsspec.config.conf["s3"].setdefault("config_kwargs", retries)


def version(info: dict) -> str:
  """What changes with an object's content: S3's ETag, or GCS's generation."""
  return str(info.get("generation") or info.get("ETag") or info.get("etag"))


# ---- What goes wrong ---------------------------------------------------------


def call(path: BucketPath, action: Callable[[], Any]) -> Any:
  """What `action` returns; waits while the bucket is away for a while.

  Raises:
    FileNotFoundError, FileExistsError: as `action`.
    UserError: anything else that a bucket's library raises.
  """
  end, pause = time.monotonic() + PATIENCE, 1.0
  while True:
    try:
      found = action()
      break
    except (FileExistsError, FileNotFoundError, UserError):
      raise
    except Exception as error:
      known = path.bucket in _known and _is_passing(error)
      if not known or time.monotonic() > end:
        _known.discard(path.bucket)  # nobody waits for it once more
        reason = explain(error, path)
        if reason is None:
          raise
        raise UserError(reason) from error
      absl.warning("%s: %s; waiting", path, first_line(error))
      time.sleep(pause)
      pause = min(2 * pause, 30)
  _known.add(path.bucket)
  return found


def write(path: BucketPath, action: Callable[[], Any]) -> None:
  """As `call`, for what needs nothing to be there but the bucket."""
  try:
    call(path, action)
  except FileNotFoundError as error:
    raise UserError(f"{path}: there is no bucket {path.bucket}") from error


def explain(error: BaseException, path: str | os.PathLike) -> str | None:
  """What a bucket's library or TensorStore complains of, in one line.

  Args:
    error: what it raised.
    path: what was read or written.

  Returns:
    None if it is of something else.
  """
  text = f"{type(error).__name__}: {_of_one_line(error)}"[:300]
  library = type(error).__module__.split(".")[0] in _LIBRARIES
  if not (library or isinstance(error, OSError) or _says(text, _TENSORSTORE)):
    return None
  if _says(text, _CLOCK):
    return (
      f"{path}: not taken for this machine's clock ({text}): set it right and "
      "run the same command again"
    )
  if _is_full(error):
    return (
      f"{path}: the bucket is full, or its quota is used up ({text}): what was "
      "there is intact; make room there and run the same command again"
    )
  if _says(text, _NOBODY):
    return f"{path}: no credentials that it takes ({text}): " + _login(path)
  if _says(text, _REGION):
    return (
      f"{path}: the bucket is in another region ({text}): set AWS_REGION to it "
      "and run the same command again"
    )
  if "Bad Request" in text:  # an answer to HEAD has no words
    return (
      f"{path}: refused ({text}), as with a token that has expired, or a "
      f"bucket in another region: what was there is intact; {_login(path)}, or "
      "set AWS_REGION, and run the same command again"
    )
  if isinstance(error, PermissionError) or _says(text, _FORBIDDEN):
    return (
      f"{path}: not allowed ({text}): what was there is intact; get the right "
      "to list, read and write objects there, or give another place"
    )
  if _is_passing(error):
    return (
      f"{path}: the bucket cannot be reached ({text}): what was there is "
      "intact; see to the network and the name, and run the same command again"
    )
  return (
    f"{path}: {text}: what was there is intact; mend that and run the same "
    "command again, or give another place"
  )


def _of_one_line(error: BaseException) -> str:
  """What it says; gcsfs has the reason in a second line."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return ": ".join(line.strip() for line in lines[:2])


def _login(path: str | os.PathLike) -> str:
  return _LOGIN[str(path).partition("://")[0]]


def _is_passing(error: BaseException) -> bool:
  if isinstance(error, PermissionError) or _is_full(error):
    return False
  names = " ".join(kind.__name__ for kind in type(error).__mro__)
  text = first_line(error)
  busy = getattr(error, "errno", None) == errno.EBUSY  # what s3fs makes of it
  known = _says(names, _CONNECTION) or _says(text, _PASSES)
  return busy or known or _CODES.search(text) is not None


def _is_full(error: BaseException) -> bool:
  return _says(_of_one_line(error), _FULL)


def _says(text: str, words: tuple[str, ...]) -> bool:
  return any(word in text for word in words)
