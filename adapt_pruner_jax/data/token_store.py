"""A source as one stream of tokens, in memory or kept on disk."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from adapt_pruner_jax.data.files import files_of
from adapt_pruner_jax.data.rows import Document
from adapt_pruner_jax.data.sources import FILE_KINDS, Source, read_documents
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest, json_files, publish

# Characters that are tokenised at a time: enough for all cores, little memory.
GROUP_CHARS = 1 << 20
CACHE_VERSION = 2
SAY_EVERY = 5.0  # seconds between lines of progress
# The arrays of a stream on disk, and in the chunks that it is made from.
FILES = (("tokens", "<i4"), ("lengths", "<i8"), ("trained", "?"))
Chunk = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Holds the documents of a source, tokenised, one after the other."""

  tokens: np.ndarray  # int32 [N]
  starts: np.ndarray  # int64 [documents]: where each one starts
  trained: np.ndarray | None  # bool [N]: tokens to learn to say; None = all
  fingerprint: str  # of the three


def tokenise(
  source: Source,
  tokenizer: Tokenizer,
  vocab_size: int,
  cache_dir: str | os.PathLike | None = None,
  say: Callable[[str], None] | None = None,
) -> Stream:
  """Encodes all documents of a source as one stream.

  Each text is encoded with the special tokens that its tokenizer adds, then
  closed with the end token. A chat is what its template makes of it. Where the
  tokenizer has a `begin_id`, every document starts with it, once.

  Args:
    source: where to read.
    tokenizer: the model's.
    vocab_size: of the model; larger ids are an error.
    cache_dir: keep the result there, and take it from there the next time.
    say: is told in a line how far it is, every few seconds and at the end.

  Raises:
    UserError: the source cannot be read, or has ids outside the vocabulary.
  """

  def chunks() -> Iterator[Chunk]:
    made = _chunks(source, tokenizer, vocab_size)
    return made if say is None else _told(made, source, say)

  if cache_dir is None:
    arrays = [np.concatenate(parts) for parts in zip(*chunks(), strict=True)]
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
    _write_cache(folder, key, chunks())
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
    tokens, trained = [], []
    encoded = _encoded(group, tokenizer, source.loss)
    for document, (ids, said) in zip(group, encoded, strict=True):
      ids = np.array(ids, np.int64)
      check_ids(ids, vocab_size, document.where, tokenizer)
      tokens.append(ids.astype("<i4"))
      trained.append(np.ones(len(ids), bool) if said is None else said)
    lengths = np.array([len(ids) for ids in tokens if len(ids)], "<i8")
    total += lengths.sum()
    yield np.concatenate(tokens), lengths, np.concatenate(trained)
  if total < 2:
    raise UserError(f"{source} is too short: it has {total} tokens")


def _told(
  chunks: Iterable[Chunk], source: Source, say: Callable[[str], None]
) -> Iterator[Chunk]:
  """The same chunks; says on the way how many there were."""
  documents = tokens = 0
  begun = last = time.monotonic()

  def line() -> str:
    rate = tokens / max(time.monotonic() - begun, 1e-9)
    return f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"

  for chunk in chunks:
    yield chunk
    documents, tokens = documents + len(chunk[1]), tokens + len(chunk[0])
    if time.monotonic() - last >= SAY_EVERY:
      last = time.monotonic()
      say(f"tokenising {source}: {line()} so far")
  say(f"tokenised {source}: {line()}")


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


Encoded = tuple[list[int], np.ndarray | None]  # ids, and which are trained


def _encoded(
  group: Sequence[Document], tokenizer: Tokenizer, loss: str
) -> list[Encoded]:
  """Token ids of documents; with loss=assistant also which are to be learnt."""
  found: list[Encoded | None] = [_given(document, loss) for document in group]
  laid_out = {
    i: _laid_out(document, tokenizer, loss)
    for i, document in enumerate(group)
    if document.tokens is None
  }
  for chat in (False, True):
    mine = [i for i, text in laid_out.items() if text[2] == chat]
    texts = [laid_out[i][0] for i in mine]
    if loss == "assistant":
      spans = [laid_out[i][1] for i in mine]
      encoded = tokenizer.encode_batch_said(texts, spans, special=not chat)
    else:
      encoded = [
        (ids, None) for ids in tokenizer.encode_batch(texts, special=not chat)
      ]
    for i, (ids, said) in zip(mine, encoded, strict=True):
      found[i] = _framed(ids, said, tokenizer, closed=not chat)
  return found


def _given(document: Document, loss: str) -> Encoded | None:
  """The tokens of a document that brings its own."""
  if document.tokens is None:
    return None
  said = np.arange(len(document.tokens)) >= document.prompt
  return document.tokens, said if loss == "assistant" else None


def _laid_out(
  document: Document, tokenizer: Tokenizer, loss: str
) -> tuple[str, list[tuple[int, int]], bool]:
  """A document's text, where in it what is learnt is, and whether a chat
  template made it."""
  content, prompt = document.content, document.prompt
  if document.plain is not None and tokenizer.chat_template is None:
    content, prompt = "".join(document.plain), len(document.plain[0])
  if isinstance(content, str):
    return content, [(prompt, len(content))], False
  try:
    if loss == "assistant":
      return *tokenizer.chat_spans(content, document.tools, prompt), True
    return tokenizer.render_chat(content, document.tools), [], True
  except UserError as error:
    raise UserError(f"{document.where}: {error}") from error


def _framed(
  ids: list[int], said: np.ndarray | None, tokenizer: Tokenizer, closed: bool
) -> Encoded:
  """`ids` with the begin token and, if `closed`, the end token, each once."""
  begin, end = tokenizer.begin_id, tokenizer.eos_id
  if begin is not None and ids and ids[0] != begin:
    ids = [begin, *ids]
    said = None if said is None else np.append(False, said)
  if closed and end is not None and ids:
    if ids[-1] != end:
      ids = [*ids, end]
      said = None if said is None else np.append(said, True)
    elif said is not None:
      said[-1] = True  # the tokenizer's own end token
  return ids, said


# ---- Cache -------------------------------------------------------------------


def _cache_key(source: Source, tokenizer: Tokenizer) -> dict:
  """What the tokens depend on. A hub dataset is taken to stay as it was when
  it was first read, which is what continuing a run needs."""
  paths = []
  if source.kind in FILE_KINDS:
    paths = files_of(source.kind, source.name)
  elif source.kind != "embedded" and Path(source.name).is_dir():
    paths = sorted(Path(source.name).rglob("*"))
  stats = [(str(p), p.stat()) for p in paths if p.is_file()]
  key = dataclasses.asdict(dataclasses.replace(source, weight=1.0))
  del key["answering"]  # what it led to is in the file
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
