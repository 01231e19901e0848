"""A source as one stream of tokens, in memory or kept on disk.

On disk a stream is shards (`shards.py`) in a folder whose name says what they
depend on. Where one shard ends depends on the source alone, so whoever needs
more adds to them, and what was killed goes on behind the last.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from adapt_pruner_jax.data import encoding, order, shards
from adapt_pruner_jax.data.files import files_of
from adapt_pruner_jax.data.shards import Joined, Shard
from adapt_pruner_jax.data.sources import FILE_KINDS, Place, Source, read_from
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.distributed import agreement, virtual_devices
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest, publish
from adapt_pruner_jax.storage.places import in_bucket

CACHE_VERSION = 3
SHARD_TOKENS = 1 << 22  # a shard ends behind the group that reaches these
# Process 0 reads shards through when it opens them, up to so many bytes of a
# stream; of a larger one, headers and sizes are looked at.
CHECK_BYTES = 1 << 30
SAY_EVERY = 5.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Holds the documents of a source, tokenised, one after the other."""

  tokens: np.ndarray | Joined  # int32 [N]
  starts: np.ndarray  # int64 [documents]: where each one starts
  # bool [N]: tokens to learn to say; None = all
  trained: np.ndarray | Joined | None
  fingerprint: str  # of the three
  whole: bool = True  # all of the source; else as much as was needed


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """Says what is tokenised, how much of it, and who is told."""

  source: Source
  tokenizer: Tokenizer
  vocab_size: int
  need: int  # tokens; 0 = all
  say: Callable[[str], None] | None
  stop: Callable[[], None] | None
  processes: int

  def enough(self, found: Sequence[Shard]) -> bool:
    """Whether there is no need for a shard behind those."""
    tokens = sum(len(shard.tokens) for shard in found)
    return bool(found) and (found[-1].last or 0 < self.need <= tokens)


def tokenise(
  source: Source,
  tokenizer: Tokenizer,
  vocab_size: int,
  cache_dir: str | os.PathLike | None = None,
  say: Callable[[str], None] | None = None,
  need: int = 0,
  stop: Callable[[], None] | None = None,
) -> Stream:
  """Encodes the documents of a source as one stream.

  Each text is encoded with the special tokens that its tokenizer adds, then
  closed with the end token. A chat is what its template makes of it. Where the
  tokenizer has a `begin_id`, every document starts with it, once.

  Args:
    source: where to read.
    tokenizer: the model's.
    vocab_size: of the model; larger ids are an error.
    cache_dir: keep the result there, and take it from there the next time. Much
      is then encoded by all cores, in processes of their own.
    say: is told in a line how far it is, every few seconds and at the end.
    need: tokens; stop at the end of the shard that reaches them. 0 = all.
    stop: called every second or so; what it raises ends this, and what was
      tokenised is kept.

  Raises:
    UserError: the source cannot be read, or has ids outside the vocabulary.
  """
  many = 1 if cache_dir is None else virtual_devices.cores()
  job = Job(source, tokenizer, vocab_size, need, say, stop, many)
  if cache_dir is None:
    return _stream(source, _of_memory(job))
  key = _cache_key(source, tokenizer)
  name = f"{source.kind}-{digest.of_bytes(json.dumps(key).encode())[:16]}"
  # One process tokenises for all; the others look where it did, and only if
  # that is a disk of its own they tokenise as well.
  folder = shards.folder_of(cache_dir, name)
  found = agreement.on_writer(lambda: _kept(folder, key, job))
  size = sum(len(shard.tokens) for shard in found or [])
  name, count, size = agreement.same([name, len(found or []), size])
  folder = shards.folder_of(cache_dir, name)
  if found is None and folder.shared and size >= order.LONG:
    found = [folder.shared_shard(number) for number in range(count)]
  elif found is None:
    publish.wait_for(folder.path(count - 1))
    found = _kept(folder, key, job)
  for number, shard in enumerate(found):
    if shard.largest >= vocab_size:
      where = str(folder.path(number))
      check_ids(shard.tokens, vocab_size, where, tokenizer)
  return _stream(source, found)


def _stream(source: Source, found: Sequence[Shard]) -> Stream:
  lengths = np.concatenate([shard.lengths for shard in found])
  trained = [
    np.broadcast_to(True, len(s.tokens)) if s.trained is None else s.trained
    for s in found
  ]
  sums = itertools.chain.from_iterable(shard.sums for shard in found)
  return Stream(
    tokens=_joined([shard.tokens for shard in found]),
    starts=np.cumsum(lengths) - lengths,
    trained=_joined(trained) if source.loss == "assistant" else None,
    fingerprint=digest.of_bytes("".join(sums).encode()),
    whole=found[-1].last,
  )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray | Joined:
  alone = len(arrays) == 1 and isinstance(arrays[0], np.ndarray)
  return arrays[0] if alone else Joined(arrays)


# ---- Tokenising --------------------------------------------------------------


def _of_memory(job: Job) -> list[Shard]:
  progress, found = Progress(job, []), []
  with contextlib.closing(_made(job, [], progress)) as made:
    while not job.enough(found):
      found.append(next(made))
  progress.end()
  return found


def _made(
  job: Job, before: Sequence[Shard], progress: "Progress"
) -> Iterator[Shard]:
  """Encodes shard after shard, from the end of those `before` on."""
  place = before[-1].place if before else Place()
  total = sum(len(shard.tokens) for shard in before)
  found = encoding.encode_all(
    encoding.groups(read_from(job.source, place)),
    (job.tokenizer, job.source.loss, job.vocab_size),
    job.processes,
  )
  chunks, size = [], 0
  with contextlib.closing(found), _unless_stopped(job):
    for group, chunk in found:
      progress.add(group, chunk)
      chunks.append(chunk)
      size, place = size + len(chunk.tokens), group.place
      if size >= SHARD_TOKENS:
        yield shards.of_chunks(chunks, place, last=False)
        chunks, size, total = [], 0, total + size
      if job.stop is not None:
        job.stop()
  if total + size < 2:
    raise UserError(f"{job.source} is too short: it has {total + size} tokens")
  yield shards.of_chunks(chunks or [encoding.NOTHING], place, last=True)


@contextlib.contextmanager
def _unless_stopped(job: Job) -> Iterator[None]:
  """A signal to all processes of a group ends those that encode, too."""
  try:
    yield
  except UserError:
    if job.stop is not None:
      job.stop()
    raise


class Progress:
  """Tells how much was tokenised, how fast, and how long the rest takes."""

  def __init__(self, job: Job, before: Sequence[Shard]):
    """Starts the clock, behind the shards that were there before."""
    self._job = job
    self._place = before[-1].place if before else Place()
    self._sizes = []  # bytes of each file, where its documents are in order
    if job.source.kind in FILE_KINDS:
      self._sizes = [size for _, size, _ in _files(job.source)]
    self._documents = sum(len(shard.lengths) for shard in before)
    self._tokens = sum(len(shard.tokens) for shard in before)
    self._chars = 0  # of the file that is being read
    self._begun = self._last = time.monotonic()
    self._before = self._tokens, self._share()

  def add(self, group: encoding.Group, chunk: encoding.Chunk) -> None:
    """Counts a group that was encoded, and says so at times."""
    same = group.place.part == self._place.part
    self._chars = group.chars + (self._chars if same else 0)
    self._place = group.place
    self._documents += len(chunk.lengths)
    self._tokens += len(chunk.tokens)
    if time.monotonic() - self._last >= SAY_EVERY:
      self._last = time.monotonic()
      self._say(f"tokenising {self._job.source}: {self._line()}{self._left()}")

  def end(self) -> None:
    """Says how much it was."""
    self._say(f"tokenised {self._job.source}: {self._line()}")

  def _say(self, line: str) -> None:
    if self._job.say is not None:
      self._job.say(line)

  def _line(self) -> str:
    seconds = max(time.monotonic() - self._begun, 1e-9)
    rate = (self._tokens - self._before[0]) / seconds
    return (
      f"{self._documents:,} documents, {self._tokens:,} tokens, "
      f"{rate:,.0f} tokens/s"
    )

  def _share(self) -> float:
    """How much of the work is done, about: by tokens or by bytes of files."""
    share = self._tokens / self._job.need if self._job.need else 0.0
    if total := sum(self._sizes):
      part = self._place.part
      read = sum(self._sizes[:part]) + min(self._chars, self._sizes[part])
      share = max(share, read / total)
    return min(share, 1.0)

  def _left(self) -> str:
    share, before = self._share(), self._before[1]
    if share <= before:
      return " so far"
    passed = time.monotonic() - self._begun
    seconds = passed * (1 - share) / (share - before)
    return f", {share:.0%}, about {_of_time(seconds)} left"


def _of_time(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.0f} s"
  return (
    f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
  )


# ---- Cache -------------------------------------------------------------------


def _files(source: Source) -> list[list]:
  """Path, size and date of each file of a source on disk, in order."""
  paths = []
  if source.kind in FILE_KINDS:
    paths = files_of(source.kind, source.name)
  elif source.kind != "embedded" and Path(source.name).is_dir():
    paths = sorted(Path(source.name).rglob("*"))
  if in_bucket(source.name):
    return [[str(p), p.size(), p.version()] for p in paths if p.is_file()]
  stats = [(str(p), p.stat()) for p in paths if p.is_file()]
  return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]


def _cache_key(source: Source, tokenizer: Tokenizer) -> dict:
  """What the tokens depend on. A hub dataset is taken to stay as it was when
  it was first read, which is what continuing a run needs."""
  key = dataclasses.asdict(dataclasses.replace(source, weight=1.0))
  del key["answering"]  # what it led to is in the file
  if source.kind == "embedded":
    key["python"] = sys.version_info[:2]  # each has its own manual
  return key | {
    "version": CACHE_VERSION,
    "files": _files(source),
    "tokenizer": tokenizer.fingerprint,
  }


def _kept(folder: shards.Folder, key: dict, job: Job) -> list[Shard]:
  """The shards that are needed; makes those that are absent or damaged."""
  found: list[Shard] = []
  while not job.enough(found):
    shard = shards.read(folder.path(len(found)))
    if shard is not None and _is_sound(shard, found):
      found.append(shard)
    else:
      _make(folder, key, job, found)
  return found


def _is_sound(shard: Shard, before: Sequence[Shard]) -> bool:
  """Looks at all bytes, on one process and if they are not too many."""
  size = sum(s.tokens.nbytes for s in (*before, shard))
  too_many = not agreement.is_writer() or size > CHECK_BYTES
  return too_many or shards.is_intact(shard)


def _make(
  folder: shards.Folder, key: dict, job: Job, found: list[Shard]
) -> None:
  """Makes shards and adds them to those `found`: as many as are needed, or up
  to the next that is there."""
  progress, first = Progress(job, found), len(found)
  with contextlib.closing(_made(job, list(found), progress)) as made:
    while not job.enough(found):
      path = folder.path(len(found))
      if path.exists():
        if len(found) > first and shards.read(path) is not None:
          break
        logging.warning("%s is damaged and is tokenised again", path)
      shards.write(path, next(made), key)
      folder.put(len(found))
      shard = shards.read(path)
      if shard is None:
        raise UserError(f"{path} is damaged right after it was written")
      found.append(shard)
  progress.end()
