"""Files of text and of rows, as people have them.

A name is a file, a directory or a pattern such as `shards/*.jsonl.zst`; the
files of the last two are one sequence, in the order of their names. `.gz` and
`.zst` are known by their first bytes, whatever their names.
"""

import fnmatch
import functools
import glob
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.storage.places import in_bucket, to_path

# What the files of a directory end in, with .gz or .zst after it or not.
SUFFIXES = {
  "text": (".txt", ".text", ".md"),
  "jsonl": (".jsonl", ".json", ".ndjson"),
  "parquet": (".parquet",),
}
PACKED = (".gz", ".zst")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # or pzstd's
UNREADABLE = {
  b"\xff\xfe": "UTF-16: convert it, e.g. iconv -f utf-16 -t utf-8",
  b"\xfe\xff": "UTF-16: convert it, e.g. iconv -f utf-16 -t utf-8",
  b"BZh": "packed with bzip2: unpack it, or pack it with gzip or zstd",
  b"\xfd7zXZ": "packed with xz: unpack it, or pack it with gzip or zstd",
  b"PK\3\4": "a zip archive: unpack it",
}
READ = 1 << 16  # bytes that are unpacked at a time
BATCH = 256  # rows of a parquet file at a time
SPACE = re.compile(r"\s*")


def files_of(kind: str, name: str) -> list[Path]:
  """Finds the files that a source names, sorted.

  A single file is returned whether it is there or not.

  Args:
    kind: text, jsonl or parquet.
    name: a file, a directory (with all below it) or a pattern.

  Raises:
    UserError: no file of a directory or a pattern, or a pipe.
  """
  if in_bucket(name):
    return _in_bucket(kind, to_path(name))
  path = Path(name)
  if path.is_dir():
    return _files_below(kind, path)
  if path.exists() and not path.is_file():  # its tokens are kept by its date
    raise UserError(f"{kind}:{name} is no file, and is read more than once")
  if path.exists() or not glob.has_magic(name):
    return [path]
  found = [Path(p) for p in glob.glob(name, recursive=True)]
  found = sorted(p for p in found if p.is_file())
  if not found:
    raise UserError(f"{kind}:{name}: no file has a name like that")
  return found


def lines(path: str | Path, most: int = -1) -> Iterator[str]:
  """Reads lines of a UTF-8 file, unpacked, with \\n as in Python's text mode.

  Args:
    most: bytes of a line; a longer one comes in pieces. -1 = as it is.

  Raises:
    UserError: missing, unreadable, cut off, or not UTF-8 (says which byte).
  """
  offset = 0
  try:
    with _opened(path) as file:
      for line in file if most < 0 else _pieces(file, most):
        text = line.decode()
        if not offset:
          text = text.removeprefix("\ufeff")  # the byte order mark
        if "\r" in text:
          text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield text
        offset += len(line)
  except UnicodeDecodeError as error:
    at = offset + error.start
    raise UserError(
      f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
      f"{at}; convert it, e.g. iconv -f latin1 -t utf-8"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: {_reason(error)}") from error


def _pieces(file: Any, most: int) -> Iterator[bytes]:
  """Lines, of longer ones parts that end behind a space, or a character."""
  rest = b""
  while piece := rest + file.readline(most - len(rest)):
    rest = b""
    if len(piece) == most and not piece.endswith(b"\n"):
      end = piece.rfind(b" ") + 1 or _last_character(piece)
      piece, rest = piece[:end], piece[end:]
    yield piece


def _last_character(piece: bytes) -> int:
  """Where it begins, so that none is cut; the end if that is nowhere."""
  begin = len(piece) - 1
  while begin > 0 and (piece[begin] & 0xC0 == 0x80 or piece[begin] == 13):
    begin -= 1
  return begin or len(piece)


def _reason(error: OSError) -> str:
  """Why a file cannot be read; of what is in no bucket libraries say little."""
  if error.strerror is None and isinstance(error, FileNotFoundError):
    return "there is no such object, or no such bucket"
  return error.strerror or first_line(error)


def json_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
  """Reads rows of JSON: where each one is, and the row.

  A row is a line, or an item of one JSON array or of the `instances` of one
  object, as LMFlow writes them.

  Raises:
    UserError: as `lines`, or not JSON (says which line).
  """
  numbered = enumerate(lines(path), 1)
  first = True
  for number, line in numbered:
    if not line.strip():
      continue
    where = f"{path} line {number}"
    if first and line.strip().startswith("["):
      before = "\n" * (number - 1)  # which count
      text = before + line + "".join(text for _, text in numbered)
      yield from _array(path, text)
      return
    if first and line.strip() == "{":
      text = line + "".join(text for _, text in numbered)
      yield from _instances(str(path), _parsed(str(path), text))
      return
    first = False
    yield from _instances(where, _parsed(where, line))


def parquet_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
  """Reads rows of a parquet file: where each one is, and the row.

  Raises:
    UserError: missing, or not parquet.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      f"{path} needs the package pyarrow: pip install 'adapt_pruner_jax[data]'"
    ) from error
  number = 0
  try:
    opened = _binary(path) if in_bucket(path) else str(path)
    with pyarrow.parquet.ParquetFile(opened) as file:
      for batch in file.iter_batches(batch_size=BATCH):
        for row in batch.to_pylist():
          yield f"{path} row {number}", row
          number += 1
  except OSError as error:
    raise UserError(f"{path}: {_reason(error)}") from error
  except pyarrow.ArrowException as error:
    raise UserError(
      f"{path} cannot be read as parquet: {first_line(error)}"
    ) from error


def _in_bucket(kind: str, path: Path) -> list[Path]:
  """As `files_of`; in a bucket a name may end in a pattern, `*.jsonl`."""
  if path.is_dir():
    return _files_below(kind, path)
  if not glob.has_magic(path.name) or path.is_file():
    return [path]
  below = path.parent.iterdir()
  found = [p for p in below if fnmatch.fnmatch(p.name, path.name)]
  if not found:
    raise UserError(f"{kind}:{path}: no object has a name like that")
  return found


def _files_below(kind: str, folder: Path) -> list[Path]:
  """The files of a kind in a directory, without hidden ones."""
  endings = tuple(
    s + packed for s in SUFFIXES[kind] for packed in ("", *PACKED)
  )
  if in_bucket(folder):
    below = [folder / name for name in folder.files()]
  else:
    below = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  every = [
    path
    for path in below
    if not any(p.startswith(".") for p in path.relative_to(folder).parts)
  ]
  found = [path for path in every if path.name.lower().endswith(endings)]
  if not found:
    have = ", ".join(path.name for path in every[:3]) or "no files"
    raise UserError(
      f"{kind}:{folder} is a directory without a file that ends in "
      f"{', '.join(SUFFIXES[kind])} (or these with {' or '.join(PACKED)}); it "
      f"has {have}"
    )
  return found


class _Unpacked(io.RawIOBase):
  """Unpacks the bytes of a file, which may have several frames."""

  def __init__(self, path: str | Path, file: Any, make: Callable[[], Any]):
    """`make` gives an object that unpacks one frame, as zlib's do."""
    self._path, self._file, self._make = path, file, make
    self._frame, self._packed, self._bytes = None, b"", b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._bytes:
      self._packed = self._packed or self._file.read(READ)
      if not self._packed:
        if self._frame is not None:
          raise OSError(None, "the file is cut off: its packed data has no end")
        return 0
      if self._frame is None:
        self._frame = self._make()
      try:
        self._bytes = self._frame.decompress(self._packed)
      except Exception as error:  # zlib.error and ZstdError
        raise OSError(None, f"cannot be unpacked: {error}") from error
      self._packed = b""
      if self._frame.eof:
        # gzip files may be padded with zeros.
        self._packed = self._frame.unused_data.lstrip(b"\0")
        self._frame = None
    size = min(len(buffer), len(self._bytes))
    buffer[:size], self._bytes = self._bytes[:size], self._bytes[size:]
    return size

  def close(self) -> None:
    self._file.close()
    super().close()


def _opened(path: str | Path) -> Any:
  """A file of bytes, open for reading and unpacked."""
  file = _binary(path)
  try:
    start = file.peek(5)[:5]
    if start.startswith(PARQUET):
      raise UserError(f"{path} is a parquet file; write parquet:{path}")
    for magic, what in UNREADABLE.items():
      if start.startswith(magic):
        raise UserError(f"{path} is {what}")
    if start.startswith(GZIP):
      return io.BufferedReader(_Unpacked(path, file, _gzip_frame))
    if ZSTD.match(start):
      return io.BufferedReader(_Unpacked(path, file, _zstd_frame(path)))
  except BaseException:
    file.close()
    raise
  return file


def _binary(path: str | Path) -> Any:
  """A file of bytes, open for reading: of a bucket, piece after piece."""
  if not in_bucket(path):
    return open(Path(os.path.expanduser(path)), "rb")
  return io.BufferedReader(_InBucket(to_path(path)), READ)


class _InBucket(io.RawIOBase):
  """An object in a bucket, as a file; waits while the bucket is away."""

  def __init__(self, place: Any):
    from adapt_pruner_jax.storage.bucket_path import call

    self._call = functools.partial(call, place)
    self._file = self._call(lambda: place.fs.open(str(place)))

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, into: Any) -> int:
    return self._call(lambda: self._file.readinto(into))

  def seek(self, offset: int, whence: int = 0) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _gzip_frame() -> Any:
  return zlib.decompressobj(31)  # with gzip's header and checksum


def _zstd_frame(path: str | Path) -> Callable[[], Any]:
  try:
    import zstandard
  except ImportError as error:
    raise UserError(
      f"{path} needs the package zstandard: pip install "
      "'adapt_pruner_jax[data]'"
    ) from error
  # Dumps of Reddit, packed with --long, ask for more than 128 MB.
  most = {"max_window_size": 2**31}
  return lambda: zstandard.ZstdDecompressor(**most).decompressobj()


def _parsed(where: str, text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not valid JSON: {error}") from error


def _instances(where: str, row: Any) -> Iterator[tuple[str, Any]]:
  """The row, or those in it if it is a file of LMFlow, the authors' trainer."""
  rows = row.get("instances") if isinstance(row, dict) else None
  if not isinstance(rows, list):
    yield where, row
    return
  for number, inner in enumerate(rows):
    yield f"{where} instance {number}", inner


def _array(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
  """The rows of a JSON array, with the line at which each one starts."""
  decode = json.JSONDecoder().raw_decode
  at = SPACE.match(text, text.index("[") + 1).end()
  number = 1 + text.count("\n", 0, at)
  while text[at : at + 1] != "]":
    where = f"{path} line {number}"
    try:
      row, end = decode(text, at)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{where} is not valid JSON: {error}") from error
    yield where, row
    end = SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
      raise UserError(f"{where}: no comma or ] comes after the row")
    after = end + (text[end] == ",")
    after = SPACE.match(text, after).end()
    number += text.count("\n", at, after)
    at = after
  if text[at + 1 :].strip():
    raise UserError(
      f"{path} line {number}: something comes after the array's ]; give one "
      "array, or one object a line"
    )
