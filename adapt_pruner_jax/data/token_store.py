"""A source as one stream of tokens, in memory or kept on disk."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from adapt_pruner_jax.data.sources import Document, Source, read_documents
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest, json_files, publish

# Characters that are tokenised at a time: enough for all cores, little memory.
GROUP_CHARS = 1 << 20
CACHE_VERSION = 1
# The arrays of a stream on disk, and in the chunks that it is made from.
FILES = (("tokens", "<i4"), ("lengths", "<i8"), ("trained", "?"))
Chunk = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """The documents of a source, tokenised, one after the other."""

  tokens: np.ndarray  # int32 [N]
  starts: np.ndarray  # int64 [documents]: where each one starts
  trained: np.ndarray | None  # bool [N]: tokens to learn to say; None = all
  fingerprint: str  # of the three


def tokenise(
  source: Source,
  tokenizer: Tokenizer,
  vocab_size: int,
  cache_dir: str | os.PathLike | None = None,
) -> Stream:
  """All documents of a source as one stream.

  Each text is encoded with the special tokens that its tokenizer adds, then
  closed with the end token. A chat is what its template makes of it.

  Args:
    source: where to read.
    tokenizer: the model's.
    vocab_size: of the model; larger ids are an error.
    cache_dir: keep the result there, and take it from there the next time.

  Raises:
    UserError: the source cannot be read, or has ids outside the vocabulary.
  """
  if cache_dir is None:
    chunks = _chunks(source, tokenizer, vocab_size)
    arrays = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    return _stream(source, arrays, [digest.of_bytes(a) for a in arrays])
  key = _cache_key(source, tokenizer)
  name = f"{source.kind}-{digest.of_bytes(json.dumps(key).encode())[:16]}"
  folder = Path(cache_dir) / name

  def kept() -> tuple[list[np.ndarray], list[str]] | None:
    found = _read_cache(folder) if folder.is_dir() else None
    if found is not None:
      return found
    if folder.is_dir():
      logging.warning("%s is damaged; %s is tokenised again", folder, source)
      shutil.rmtree(folder)
    _write_cache(folder, key, _chunks(source, tokenizer, vocab_size))
    return _read_cache(folder)

  # One process tokenises for all; a copy of its own of the source has another
  # date, and so another folder.
  cached = agreement.on_writer(kept) or kept()
  if cached is None:
    raise UserError(f"{folder} is damaged right after it was written")
  arrays, sums = cached
  check_ids(arrays[0], vocab_size, str(folder), tokenizer)
  return _stream(source, arrays, sums)


def _stream(
  source: Source, arrays: Sequence[np.ndarray], sums: Sequence[str]
) -> Stream:
  tokens, lengths, trained = arrays
  return Stream(
    tokens=tokens,
    starts=np.cumsum(lengths) - lengths,
    trained=trained if source.loss == "assistant" else None,
    fingerprint=digest.of_bytes("".join(sums).encode()),
  )


# ---- Tokenising --------------------------------------------------------------


def _chunks(
  source: Source, tokenizer: Tokenizer, vocab_size: int
) -> Iterator[Chunk]:
  """The stream in pieces of whole documents: tokens, lengths, trained."""
  total = 0
  for group in _groups(read_documents(source)):
    texts = [d.content for d in group if isinstance(d.content, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    tokens, trained = [], []
    for document in group:
      if isinstance(document.content, str):
        ids, said = _closed(next(encoded), tokenizer.eos_id), None
      else:
        ids, said = _encode_chat(document, tokenizer, source.loss)
      ids = np.array(ids, np.int64)
      check_ids(ids, vocab_size, document.where, tokenizer)
      tokens.append(ids.astype("<i4"))
      trained.append(np.ones(len(ids), bool) if said is None else said)
    lengths = np.array([len(ids) for ids in tokens if len(ids)], "<i8")
    total += lengths.sum()
    logging.log_every_n_seconds(
      logging.INFO, "%s: %d tokens so far", 10, source, total
    )
    yield np.concatenate(tokens), lengths, np.concatenate(trained)
  if total < 2:
    raise UserError(f"{source} is too short: it has {total} tokens")


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Documents of about GROUP_CHARS characters together."""
  group, size = [], 0
  for document in documents:
    content = document.content
    group.append(document)
    size += len(content if isinstance(content, str) else str(content))
    if size >= GROUP_CHARS:
      yield group
      group, size = [], 0
  if group:
    yield group


def _closed(ids: list[int], eos_id: int | None) -> list[int]:
  """`ids` with the end token, once."""
  if eos_id is None or not ids or ids[-1] == eos_id:
    return ids
  return [*ids, eos_id]


def _encode_chat(
  document: Document, tokenizer: Tokenizer, loss: str
) -> tuple[list[int], np.ndarray | None]:
  try:
    if loss == "assistant":
      return tokenizer.encode_chat_said(document.content)
    return tokenizer.encode_chat(document.content), None
  except UserError as error:
    raise UserError(f"{document.where}: {error}") from error


# ---- Cache -------------------------------------------------------------------


def _cache_key(source: Source, tokenizer: Tokenizer) -> dict:
  """What the tokens depend on. A hub dataset is taken to stay as it was when
  it was first read, which is what continuing a run needs."""
  paths = []
  if source.kind != "embedded" and Path(source.name).exists():
    root = Path(source.name)
    paths = sorted(root.rglob("*")) if root.is_dir() else [root]
  stats = [(str(p), p.stat()) for p in paths if p.is_file()]
  key = dataclasses.asdict(dataclasses.replace(source, weight=1.0))
  if source.kind == "embedded":
    key["python"] = sys.version_info[:2]  # each has its own manual
  return key | {
    "version": CACHE_VERSION,
    "files": [[path, s.st_size, s.st_mtime_ns] for path, s in stats],
    "tokenizer": tokenizer.fingerprint,
  }


def _write_cache(folder: Path, key: dict, chunks: Iterator[Chunk]) -> None:
  """Publishes `folder`, unless another process does so first."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with publish.directory(folder) as temporary:
      sums = _write_arrays(temporary, chunks)
      manifest = {"key": key, "sha256": sums}
      json_files.write_json(temporary / "manifest.json", manifest)
  except OSError as error:
    raise publish.unwritable(folder, error) from error
  except UserError:
    if not folder.is_dir():
      raise


def _write_arrays(folder: Path, chunks: Iterator[Chunk]) -> list[str]:
  """Appends chunk after chunk to the FILES; returns the SHA-256 of each."""
  sums = [hashlib.sha256() for _ in FILES]
  with contextlib.ExitStack() as stack:
    files = [
      stack.enter_context(open(folder / f"{name}.bin", "wb"))
      for name, _ in FILES
    ]
    for chunk in chunks:
      for array, file, total in zip(chunk, files, sums, strict=True):
        data = array.tobytes()
        file.write(data)
        total.update(data)
  return [total.hexdigest() for total in sums]


def _read_cache(folder: Path) -> tuple[list[np.ndarray], list[str]] | None:
  """The arrays, and the SHA-256 of each; None if they are not as written."""
  try:
    sums = json_files.read_json(folder / "manifest.json")["sha256"]
    arrays = [
      np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in FILES
    ]
  except (UserError, OSError, ValueError, KeyError):
    return None
  return (
    (arrays, sums) if [digest.of_bytes(a) for a in arrays] == sums else None
  )
