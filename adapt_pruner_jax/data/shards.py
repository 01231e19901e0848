"""A shard: whole documents of a stream in one file, complete or absent.

It is a safetensors file with `tokens`, `lengths` (of the documents) and, where
not all is learnt, `trained`. Its metadata says where in the source it ends, so
that the next one can be made without it, and has the SHA-256 of each array.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapt_pruner_jax.data.encoding import Chunk
from adapt_pruner_jax.data.sources import Place
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import cache, digest, publish
from adapt_pruner_jax.storage.places import bucket, in_bucket, to_path

DTYPES = {"I32": "<i4", "I64": "<i8", "BOOL": "?"}
FACTS = ("sums", "place", "last", "largest")  # of `Shard`, in the metadata


class Shard(NamedTuple):
  """Holds a shard; of one on disk the arrays are read when they are used."""

  tokens: np.ndarray  # int32 [N]
  lengths: np.ndarray  # int64 [documents]
  trained: np.ndarray | None  # bool [N]; None = all
  sums: list[str]  # SHA-256 of the three, None as all True
  place: Place  # in the source, behind it
  last: bool  # the source ends there
  largest: int  # token id


class Folder(NamedTuple):
  """Says where a stream's shards are: `local`, on this machine, and `shared`,
  in a bucket, if the cache is there.

  Of a long stream each host reads its part in the bucket, see `InBucket`; of
  others it takes a copy.
  """

  local: Path
  shared: Path | None

  def path(self, number: int) -> Path:
    """Where the shard of this number is; a copy if only the bucket has it."""
    path = self.local / _name(number)
    if self.shared and not path.exists():
      shared = self.shared / _name(number)
      if shared.is_file():
        cache.make(self.local)
        with publish.file(path, cache.ADVICE) as temporary:
          bucket().get(shared, temporary)
    return path

  def shared_shard(self, number: int) -> Shard:
    """The shard in the bucket, of which a part is read when it is used.

    Raises:
      UserError: it is damaged, or does not show.
    """
    path = self.shared / _name(number)
    publish.require_shared(path)
    array = functools.partial(InBucket, version=path.version())
    shard = _opened(path, path.size(), path.read_range, array)
    if shard is None:
      raise UserError(f"{path} is damaged: delete it and run this again")
    return shard

  def put(self, number: int) -> None:
    """Copies a shard into the bucket, if there is one."""
    if self.shared:
      bucket().put(self.local / _name(number), self.shared / _name(number))


def folder_of(cache_dir: str | os.PathLike, name: str) -> Folder:
  """Where a cache has the shards of this stream."""
  if not in_bucket(cache_dir):
    return Folder(Path(cache_dir) / name, None)
  key = digest.of_bytes(str(cache_dir).encode())[:16]
  return Folder(cache.home() / "tokens" / key / name, to_path(cache_dir) / name)


def _name(number: int) -> str:
  return f"{number:05d}.safetensors"


def of_chunks(chunks: Sequence[Chunk], place: Place, last: bool) -> Shard:
  """A shard in memory.

  Args:
    chunks: what is in it, at least one.
    place: in the source, behind it.
    last: the source ends there.
  """
  tokens, lengths, trained = map(np.concatenate, zip(*chunks, strict=True))
  return Shard(
    tokens,
    lengths,
    None if trained.all() else trained,
    sums=[digest.of_bytes(array) for array in (tokens, lengths, trained)],
    place=place,
    last=last,
    largest=int(tokens.max(initial=-1)),
  )


def write(path: Path, shard: Shard, key: dict) -> None:
  """Publishes a shard.

  Args:
    key: what the tokens depend on, for people who look.

  Raises:
    UserError: it cannot be written.
  """
  from safetensors.numpy import save_file

  arrays = {"tokens": shard.tokens, "lengths": shard.lengths}
  if shard.trained is not None:
    arrays["trained"] = shard.trained
  facts = {name: getattr(shard, name) for name in FACTS}
  # One entry: of several the order, and so the file, would not be the same.
  metadata = {"shard": json.dumps({"facts": facts, "key": key})}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise publish.unwritable(path, error, cache.ADVICE) from error
  with publish.file(path, cache.ADVICE) as temporary:
    save_file(arrays, temporary, metadata)


def read(path: Path) -> Shard | None:
  """Opens a shard by its header; None if that or the file's size is wrong.

  The arrays are not looked at, see `is_intact`.
  """
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size

      def part(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

      return _opened(path, size, part, _on_disk)
  except OSError:
    return None


def _opened(
  path: Path,
  size: int,
  part: Callable[[int, int], bytes],
  array_of: Callable[..., Any],
) -> Shard | None:
  """`read`, of a file of `size` bytes whose parts are read by `part`."""
  try:
    length = int.from_bytes(part(0, 8), "little")
    if length > size:
      return None
    header = json.loads(part(8, 8 + length))
    facts = json.loads(header.pop("__metadata__")["shard"])["facts"]
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if size != 8 + length + max(ends):
      return None
    array = functools.partial(_array, array_of, path, 8 + length)
    found = {name: array(**entry) for name, entry in header.items()}
    facts["place"] = Place(*facts["place"])
    tokens, lengths = found["tokens"], found["lengths"][:]
    return Shard(tokens, lengths, found.get("trained"), **facts)
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _array(
  array_of: Callable[..., Any],
  path: Path,
  start: int,
  dtype: str,
  shape: list[int],
  data_offsets: list[int],
) -> Any:
  """What an entry of the header describes."""
  kind = np.dtype(DTYPES[dtype])
  first, end = data_offsets
  if end - first != math.prod(shape) * kind.itemsize:
    raise ValueError(f"{path}: {shape} is not {end - first} bytes")
  if first == end:
    return np.zeros(shape, kind)  # nothing cannot be mapped
  return array_of(path, kind, start + first, math.prod(shape))


def _on_disk(path: Path, dtype: np.dtype, start: int, size: int) -> np.ndarray:
  return np.memmap(path, dtype, "r", start, (size,))


class InBucket:
  """An array in an object, [size], of which pieces are read when they are used,
  and kept for a while."""

  PIECE = 1 << 19  # bytes
  KEPT = 1024  # pieces

  def __init__(
    self, path: Path, dtype: np.dtype, start: int, size: int, version: str
  ):
    """Reads nothing yet; `start` is in bytes."""
    self.dtype, self._size = dtype, size
    self.nbytes = size * dtype.itemsize
    self._path, self._start, self._version = path, start, version

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: Any) -> np.ndarray:
    """A slice without steps, or elements by an array of indices >= 0."""
    if isinstance(index, slice):
      return self._between(*index.indices(self._size)[:2])
    index = np.asarray(index)
    if not index.size:
      return np.zeros(index.shape, self.dtype)
    first = int(index.min())
    return self._between(first, int(index.max()) + 1)[index - first]

  def _between(self, start: int, stop: int) -> np.ndarray:
    if stop <= start:
      return np.zeros(0, self.dtype)
    step = self.PIECE // self.dtype.itemsize
    first = start // step
    pieces = [self._piece(n) for n in range(first, -(-stop // step))]
    found = np.concatenate(pieces)
    return found[start - first * step : stop - first * step]

  def _piece(self, number: int) -> np.ndarray:
    first = number * self.PIECE
    stop = min(first + self.PIECE, self.nbytes)
    where = self._start + first, self._start + stop
    found = _range(self._path, self._version, *where)
    return np.frombuffer(found, self.dtype)


@functools.lru_cache(InBucket.KEPT)
def _range(path: Path, version: str, start: int, stop: int) -> bytes:
  found = path.read_range(start, stop)
  if len(found) != stop - start or path.version() != version:
    raise UserError(
      f"{path} was changed while it was read: what is saved stays; run the "
      "same command again, which looks at it anew"
    )
  return found


def is_intact(shard: Shard) -> bool:
  """Whether every byte is as it was written: reads all of it."""
  trained = shard.trained
  if trained is None:
    trained = np.ones(len(shard.tokens), bool)
  arrays = shard.tokens, shard.lengths, trained
  return [digest.of_bytes(array) for array in arrays] == shard.sums


class Joined:
  """One array out of several, of which a part is read when it is used."""

  def __init__(self, parts: Sequence[np.ndarray]):
    """Joins arrays [N of each, ...] of one dtype; at least one."""
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in parts])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: Any) -> np.ndarray:
    """A slice without steps, or elements by an array of indices >= 0."""
    if isinstance(index, slice):
      start, stop, _ = index.indices(len(self))
      return self._between(start, max(start, stop))
    index = np.asarray(index)
    found = np.empty(index.shape, self._parts[0].dtype)
    which = np.searchsorted(self._ends, index, side="right")
    for number in np.unique(which):
      part = self._parts[number]
      mine = which == number
      first = self._ends[number] - len(part)
      found[mine] = part[index[mine] - first]
    return found

  def _between(self, start: int, stop: int) -> np.ndarray:
    first = int(np.searchsorted(self._ends, start, side="right"))
    last = int(np.searchsorted(self._ends, stop, side="left"))
    pieces = [self._parts[0][:0]]
    for number in range(first, min(last + 1, len(self._parts))):
      part = self._parts[number]
      before = int(self._ends[number]) - len(part)
      pieces.append(part[max(start - before, 0) : stop - before])
    return np.concatenate(pieces)
