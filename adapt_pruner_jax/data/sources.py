"""Where text comes from: `embedded`, files, HuggingFace datasets, TFDS.

A source is written KIND:NAME, with options after it and more sources after
those, all separated by commas; no character needs quotes in a shell:

  text:book.txt
  jsonl:chat.jsonl,loss=assistant
  hf:Salesforce/wikitext,subset=wikitext-2-raw-v1,weight=0.7,text:a.txt,weight=0.3

The name after `text`, `jsonl` and `parquet` may be a file, a directory or a
pattern such as shards/*.jsonl.zst, see `files.py`. What a row of the latter two
may look like, and of hf and tfds, is in `rows.py`.

Options (which kind has which: `OPTIONS`):
  weight  share of this source among several, in tokens; default 1
  limit   read no more than so many documents
  split   of `embedded` train (default) or heldout; of datasets their own names
  subset  the dataset's configuration name
  column  the field with the text or the turns; default: by the row's fields
  loss    all (default) or assistant: train on what the assistant says, or on
          the completion of a prompt, only

`self:PROMPTS.jsonl` is prompts that the dense model answers itself, and `self`
those that ship with this package (`prompts.py`). Its options are of how it
answers (`Answering`), and split: train (default) leaves one prompt of five to
heldout. A run has the answers written first, and then reads `answers:FILE`.
"""

import dataclasses
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from adapt_pruner_jax.data import files, hub
from adapt_pruner_jax.data.rows import (
  Document,
  to_answer,
  to_document,
  without_null,
)
from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.storage.places import in_bucket

OPTIONS = {
  "embedded": ("split", "limit", "weight"),
  "text": ("limit", "weight"),
  "jsonl": ("column", "loss", "limit", "weight"),
  "parquet": ("column", "loss", "limit", "weight"),
  "hf": ("subset", "split", "column", "loss", "limit", "weight"),
  "tfds": ("split", "column", "limit", "weight"),
  "self": (
    *("max_new_tokens", "temperature", "top_p", "seed", "batch"),
    *("split", "loss", "limit", "weight"),
  ),
  "answers": ("loss", "limit", "weight"),
  "npy": (),
}
FILE_KINDS = ("text", "jsonl", "parquet", "answers")  # in buckets, too
WRITTEN = ("self", "answers")  # by the dense model
SEPARATOR = "<|endoftext|>"  # a line of its own between documents of a text
# A longer document is cut at the end of a line, so that memory stays bounded.
LONGEST_DOCUMENT = 1 << 22  # bytes


@dataclasses.dataclass(frozen=True)
class Answering:
  """Says how the dense model answers prompts."""

  max_new_tokens: int = 512  # an answer is cut there
  temperature: float = 0.0  # 0 = the likeliest token
  top_p: float = 1.0  # only among the likeliest that hold this probability
  seed: int = 0
  batch: int = 32  # prompts at a time


@dataclasses.dataclass(frozen=True)
class Source:
  """Says what to read, and how; the options are at the top of this file."""

  kind: str
  name: str = ""
  weight: float = 1.0
  limit: int = 0  # 0 = all
  split: str = "train"
  subset: str = ""
  column: str = ""
  loss: str = "all"
  answering: Answering | None = None  # of `self`

  def __str__(self) -> str:
    return f"{self.kind}:{self.name}" if self.name else self.kind


def parse_sources(spec: str, option: str) -> list[Source]:
  """Reads a `data.source` or `calibration.source`.

  Args:
    spec: one or more sources, see the top of this file.
    option: name of the configuration field, for messages; in `eval.answers`
      prompts are the held-out ones if nothing else is said.

  Raises:
    UserError: an unknown kind or option, a value out of range, or npy mixed.
  """
  sources = []
  for part in spec.split(","):
    key, found, value = part.partition("=")
    kind, _, name = part.partition(":")
    if kind in OPTIONS:
      sources.append(_of_kind(kind, os.path.expanduser(name), option))
    elif not sources:
      raise UserError(
        f"--config.{option}={spec}: {kind!r} is not a kind of source"
        f"{nearest(kind, OPTIONS)}; write embedded, text:FILE, jsonl:FILE, "
        "parquet:FILE, hf:NAME, tfds:NAME, self:PROMPTS.jsonl or, for "
        "calibration, npy:FILE"
      )
    elif found and re.fullmatch(r"\w+", key):
      sources[-1] = _with_option(sources[-1], key, value, option)
    else:  # a comma inside a name
      sources[-1] = dataclasses.replace(
        sources[-1], name=f"{sources[-1].name},{part}"
      )
  for source in sources:
    read_there = in_bucket(source.name) and source.kind in FILE_KINDS
    if "://" in source.name and not read_there:
      raise UserError(
        f"--config.{option}={spec}: {source.name} is not a path; in a bucket, "
        f"gs://... or s3://..., {', '.join(FILE_KINDS)} are read"
      )
    if source.kind == "self":  # with a file or without
      continue
    if bool(source.name) == (source.kind == "embedded"):
      want = "embedded" if source.name else f"{source.kind}:NAME"
      raise UserError(f"--config.{option}={spec}: {source} should be {want}")
  if len(sources) > 1 and any(s.kind == "npy" for s in sources):
    raise UserError(f"--config.{option}={spec}: npy:FILE cannot be mixed")
  return sources


def to_spec(sources: Sequence[Source]) -> str:
  """Writes sources as `parse_sources` reads them; not those of `self`."""
  parts = []
  for source in sources:
    parts.append(str(source))
    default = _of_kind(source.kind, source.name, "")
    for key in OPTIONS[source.kind]:
      if getattr(source, key) != getattr(default, key):
        parts.append(f"{key}={getattr(source, key)}")
  return ",".join(parts)


def _of_kind(kind: str, name: str, option: str) -> Source:
  """A source before its options are read."""
  source = Source(kind, name)
  if kind in WRITTEN:
    source = dataclasses.replace(source, loss="assistant")
  if kind == "self":
    split = "heldout" if option == "eval.answers" else "train"
    source = dataclasses.replace(source, split=split, answering=Answering())
  return source


def _with_option(source: Source, key: str, text: str, option: str) -> Source:
  """`source` with one option set."""
  where, allowed = f"--config.{option}: {source}", OPTIONS[source.kind]
  if key not in allowed:
    raise UserError(
      f"{where} has no option {key!r}{nearest(key, allowed)}; allowed: "
      f"{', '.join(allowed) or 'none'}"
    )
  if key in Answering.__dataclass_fields__:
    answering = _answering(source.answering, key, text, where)
    return dataclasses.replace(source, answering=answering)
  value = text
  try:
    if key == "weight":
      value = float(text)
      if not 0 < value < float("inf"):
        raise ValueError
    elif key == "limit":
      value = int(text)
      if value < 1:
        raise ValueError
  except ValueError as error:
    raise UserError(f"{where}: {key}={text} is not a number > 0") from error
  choices = {"loss": ("all", "assistant")}
  if source.kind == "embedded":
    choices["split"] = ("train", "heldout")
  if source.kind == "self":
    choices["split"] = ("train", "heldout", "all")
  if text not in choices.get(key, (text,)):
    raise UserError(
      f"{where}: {key}={text} is not one of {', '.join(choices[key])}"
    )
  return dataclasses.replace(source, **{key: value})


def _answering(how: Answering, key: str, text: str, where: str) -> Answering:
  """`how` with one field set."""
  lowest = {"temperature": 0.0, "seed": 0, "max_new_tokens": 1, "batch": 1}
  kind = float if key in ("temperature", "top_p") else int
  try:
    value = kind(text)
    low = lowest.get(key, 0)
    fits = 0 < value <= 1 if key == "top_p" else low <= value < 2**31
    if not fits:  # also NaN
      raise ValueError
  except ValueError as error:
    allowed = "in (0, 1]" if key == "top_p" else f"of at least {lowest[key]}"
    whole = "whole " if kind is int else ""
    raise UserError(
      f"{where}: {key}={text} is not a {whole}number {allowed}"
    ) from error
  return dataclasses.replace(how, **{key: value})


class Place(NamedTuple):
  """Says how far into a source something is."""

  part: int = 0  # of its files
  row: int = 0  # within that, empty ones too
  documents: int = 0  # in all parts


START = Place()


def read_documents(source: Source) -> Iterator[Document]:
  """Reads the documents of a source, in order, without empty ones.

  Raises:
    UserError: the source is missing, unreadable, broken or has no text.
  """
  return (document for document, _ in read_from(source))


def read_from(
  source: Source, place: Place = START
) -> Iterator[tuple[Document, Place]]:
  """Reads documents from a place on, and with each the place behind it.

  Files before that place are not opened.

  Raises:
    UserError: as `read_documents`.
  """
  count = place.documents
  if source.limit and count >= source.limit:
    return
  for part, read in enumerate(_parts(source)):
    if part < place.part:
      continue
    skip = place.row if part == place.part else 0
    for row, document in enumerate(read(skip), skip + 1):
      if _is_blank(document):
        continue
      count += 1
      yield document, Place(part, row, count)
      if count == source.limit:
        return
  if not count:
    raise UserError(f"{source} is empty: it has no text")


def _parts(source: Source) -> Iterator[Callable[[int], Iterator[Document]]]:
  """What reads each part of a source, but for its first documents."""
  if source.kind in FILE_KINDS:
    reader = {
      "text": _text,
      "jsonl": _rows,
      "parquet": _rows,
      "answers": _answers,
    }[source.kind]
    for path in files.files_of(source.kind, source.name):
      yield lambda skip, path=path: itertools.islice(
        reader(source, path), skip, None
      )
    return
  reader = {
    "embedded": _embedded,
    "hf": hub.hf_documents,
    "tfds": hub.tfds_documents,
    "self": _unanswered,
  }[source.kind]
  yield lambda skip: reader(source, skip)


def embedded_text(split: str) -> str:
  """Joins the embedded documents of `train` or `heldout` to one text."""
  documents = read_documents(Source("embedded", split=split))
  return "\n\n".join(d.content for d in documents)


def read_text(path: str | Path) -> str:
  """Reads a whole UTF-8 file, unpacked if need be, line ends made \\n.

  Raises:
    UserError: missing, unreadable, not UTF-8 (says which byte), or empty.
  """
  text = "".join(files.lines(path))
  if not text.strip():
    raise UserError(f"{path} is empty: it has no text")
  return text


def _embedded(source: Source, skip: int) -> Iterator[Document]:
  """The reference manual that ships with Python, a document a topic."""
  return itertools.islice(_topics(source.split), skip, None)


def _topics(split: str) -> Iterator[Document]:
  from pydoc_data.topics import topics

  seen = set()
  for name, text in sorted(topics.items()):
    if text in seen:  # a few topics have two names
      continue
    seen.add(text)
    # By name, so that another Python has the same topics held out.
    heldout = zlib.crc32(name.encode()) % 10 == 0
    if heldout == (split == "heldout"):
      yield Document(f"topic {name}", text)


def _text(source: Source, path: Path) -> Iterator[Document]:
  """Documents between separator lines, and one at the end of the file."""
  lines, size = [], 0
  for line in files.lines(path, LONGEST_DOCUMENT):
    separates = line.strip() == SEPARATOR
    if not separates:
      lines.append(line)
      size += len(line)
    if separates or size >= LONGEST_DOCUMENT:
      yield Document(str(path), "".join(lines).strip("\n"))
      lines, size = [], 0
  yield Document(str(path), "".join(lines).strip("\n"))


def _rows(source: Source, path: Path) -> Iterator[Document]:
  """The rows of a jsonl or parquet file."""
  packed = source.kind == "parquet"
  for where, row in (files.parquet_rows if packed else files.json_rows)(path):
    row = without_null(row) if packed else row
    yield to_document(where, row, source.column, source.loss)


def _unanswered(source: Source, _: int) -> Iterator[Document]:
  raise UserError(
    f"{source} is prompts, which only `adapt-pruner run` has answered: give "
    "the file of answers that it keeps in its work directory, answers:FILE"
  )


def _answers(_: Source, path: Path) -> Iterator[Document]:
  """Prompts with the dense model's answers, token by token."""
  for where, row in files.json_rows(path):
    yield to_answer(where, row)


def _is_blank(document: Document) -> bool:
  content = document.content
  return not (content.strip() if isinstance(content, str) else content)
