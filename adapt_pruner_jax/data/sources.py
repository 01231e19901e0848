"""Where text comes from: `embedded`, files, HuggingFace datasets, TFDS.

A source is written KIND:NAME, with options after it and more sources after
those, all separated by commas; no character needs quotes in a shell:

  text:book.txt
  jsonl:chat.jsonl,loss=assistant
  hf:Salesforce/wikitext,subset=wikitext-2-raw-v1,weight=0.7,text:a.txt,weight=0.3

Options (which kind has which: `OPTIONS`):
  weight  share of this source among several, in tokens; default 1
  limit   read no more than so many documents
  split   of `embedded` train (default) or heldout; of datasets their own names
  subset  the dataset's configuration name
  column  the field with the text or the chat; default `text` or `messages`
  loss    all (default) or assistant: train on what the assistant says only
"""

import dataclasses
import importlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adapt_pruner_jax.errors import UserError, first_line, nearest

OPTIONS = {
  "embedded": ("split", "limit", "weight"),
  "text": ("limit", "weight"),
  "jsonl": ("column", "loss", "limit", "weight"),
  "hf": ("subset", "split", "column", "loss", "limit", "weight"),
  "tfds": ("split", "column", "limit", "weight"),
  "npy": (),
}
SEPARATOR = "<|endoftext|>"  # a line of its own between documents of a text
# A longer document is cut at the end of a line, so that memory stays bounded.
LONGEST_DOCUMENT = 1 << 22  # bytes


@dataclasses.dataclass(frozen=True)
class Source:
  kind: str
  name: str = ""
  weight: float = 1.0
  limit: int = 0  # 0 = all
  split: str = "train"
  subset: str = ""
  column: str = ""
  loss: str = "all"

  def __str__(self) -> str:
    return f"{self.kind}:{self.name}" if self.name else self.kind


class Document(NamedTuple):
  where: str  # for messages, e.g. "jsonl:a.jsonl row 12"
  content: str | list[dict]  # text, or the messages of a chat


def parse_sources(spec: str, option: str) -> list[Source]:
  """Reads a `data.source` or `calibration.source`.

  Args:
    spec: one or more sources, see the top of this file.
    option: name of the configuration field, for messages.
  """
  sources = []
  for part in spec.split(","):
    key, found, value = part.partition("=")
    kind, _, name = part.partition(":")
    if kind in OPTIONS:
      sources.append(Source(kind, name))
    elif not sources:
      raise UserError(
        f"--config.{option}={spec}: {kind!r} is not a kind of source"
        f"{nearest(kind, OPTIONS)}; write embedded, text:FILE, jsonl:FILE, "
        "hf:NAME, tfds:NAME or, for calibration, npy:FILE"
      )
    elif found and re.fullmatch(r"\w+", key):
      sources[-1] = _with_option(sources[-1], key, value, option)
    else:  # a comma inside a name
      sources[-1] = dataclasses.replace(
        sources[-1], name=f"{sources[-1].name},{part}"
      )
  for source in sources:
    if bool(source.name) == (source.kind == "embedded"):
      want = "embedded" if source.name else f"{source.kind}:NAME"
      raise UserError(f"--config.{option}={spec}: {source} should be {want}")
  if len(sources) > 1 and any(s.kind == "npy" for s in sources):
    raise UserError(f"--config.{option}={spec}: npy:FILE cannot be mixed")
  return sources


def _with_option(source: Source, key: str, text: str, option: str) -> Source:
  """`source` with one option set."""
  where, allowed = f"--config.{option}: {source}", OPTIONS[source.kind]
  if key not in allowed:
    raise UserError(
      f"{where} has no option {key!r}{nearest(key, allowed)}; allowed: "
      f"{', '.join(allowed) or 'none'}"
    )
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
  if text not in choices.get(key, (text,)):
    raise UserError(
      f"{where}: {key}={text} is not one of {', '.join(choices[key])}"
    )
  return dataclasses.replace(source, **{key: value})


def read_documents(source: Source) -> Iterator[Document]:
  """The documents of a source, in order, without empty ones.

  Raises:
    UserError: the source is missing, unreadable, broken or has no text.
  """
  reader = {
    "embedded": _embedded,
    "text": _text,
    "jsonl": _jsonl,
    "hf": _hf,
    "tfds": _tfds,
  }[source.kind]
  documents = (d for d in reader(source) if not _is_blank(d))
  empty = True
  for document in itertools.islice(documents, source.limit or None):
    empty = False
    yield document
  if empty:
    raise UserError(f"{source} is empty: it has no text")


def embedded_text(split: str) -> str:
  """The embedded documents of `train` or `heldout` as one text."""
  documents = read_documents(Source("embedded", split=split))
  return "\n\n".join(d.content for d in documents)


def read_text(path: str | Path) -> str:
  """A whole UTF-8 file, line ends made \\n.

  Raises:
    UserError: missing, unreadable, not UTF-8 (says which byte), or empty.
  """
  text = "".join(_lines(path))
  if not text.strip():
    raise UserError(f"{path} is empty: it has no text")
  return text


def _embedded(source: Source) -> Iterator[Document]:
  """The reference manual that ships with Python, a document a topic."""
  from pydoc_data.topics import topics

  seen = set()
  for name, text in sorted(topics.items()):
    if text in seen:  # a few topics have two names
      continue
    seen.add(text)
    # By name, so that another Python has the same topics held out.
    heldout = zlib.crc32(name.encode()) % 10 == 0
    if heldout == (source.split == "heldout"):
      yield Document(f"topic {name}", text)


def _text(source: Source) -> Iterator[Document]:
  """Documents between separator lines."""
  lines, size = [], 0
  for line in _lines(source.name):
    separates = line.strip() == SEPARATOR
    if not separates:
      lines.append(line)
      size += len(line)
    if separates or size >= LONGEST_DOCUMENT:
      yield Document(str(source), "".join(lines).strip("\n"))
      lines, size = [], 0
  yield Document(str(source), "".join(lines).strip("\n"))


def _jsonl(source: Source) -> Iterator[Document]:
  for number, line in enumerate(_lines(source.name), 1):
    if not line.strip():
      continue
    where = f"{source.name} line {number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
      raise UserError(
        f'{where} is not an object; write {{"text": ...}} or '
        '{"messages": [{"role": ..., "content": ...}]}'
      )
    yield _document(where, row, source)


def _hf(source: Source) -> Iterator[Document]:
  datasets = _package("datasets", source)
  _check_folder(source)
  folder = Path(source.name)
  saved = [folder / n for n in ("state.json", "dataset_dict.json")]
  try:
    if any(file.is_file() for file in saved):
      rows = datasets.load_from_disk(str(folder))
      rows = rows[source.split] if isinstance(rows, dict) else rows
    else:
      rows = datasets.load_dataset(
        source.name,
        source.subset or None,
        split=source.split,
        # A few documents of a huge dataset: without downloading all of it.
        streaming=bool(source.limit),
      )
    for number, row in enumerate(rows):  # may download as it goes
      yield _document(f"{source} row {number}", row, source)
  except UserError:
    raise
  except Exception as error:  # network, cache and parser each raise their own
    raise UserError(
      f"{source} (split={source.split}) cannot be loaded: {first_line(error)}; "
      "without network, give a directory written by Dataset.save_to_disk"
    ) from error


def _tfds(source: Source) -> Iterator[Document]:
  tfds = _package("tensorflow_datasets", source)
  _check_folder(source)
  try:
    if Path(source.name).is_dir():
      builder = tfds.builder_from_directory(source.name)
      rows = builder.as_data_source(split=source.split)
    else:
      rows = tfds.data_source(source.name, split=source.split)
  except Exception as error:  # network, registry and reader raise their own
    raise UserError(
      f"{source} (split={source.split}) cannot be loaded: {first_line(error)}; "
      "prepare it once with file_format=array_record, for which no TensorFlow "
      "is needed"
    ) from error
  for number in range(len(rows)):
    where = f"{source} row {number}"
    row = {k: _decoded(v, where) for k, v in rows[number].items()}
    yield _document(where, row, source)


def _document(where: str, row: Mapping, source: Source) -> Document:
  """The text or the chat of a row, checked."""
  wanted = (source.column,) if source.column else ("text", "messages")
  column = next((c for c in wanted if row.get(c) is not None), None)
  if column is None:
    raise UserError(
      f"{where} has no {' or '.join(wanted)}; it has "
      f"{', '.join(map(str, row)) or 'nothing'}; name the field that has the "
      "text or the chat with column=NAME"
    )
  content = row[column]
  if isinstance(content, list):
    for i, message in enumerate(content):
      _check_message(f"{where}: {column}[{i}]", message)
  elif not isinstance(content, str):
    raise UserError(
      f"{where}: {column} is {type(content).__name__}, not a string or a list "
      "of messages"
    )
  elif source.loss == "assistant":
    raise UserError(
      f"{where} is plain text, and loss=assistant needs chats "
      '{"messages": [{"role": ..., "content": ...}]}'
    )
  return Document(where, content)


def _check_message(where: str, message: Any) -> None:
  if not isinstance(message, dict):
    raise UserError(f"{where} is not an object with role and content")
  for key in ("role", "content"):
    if not isinstance(message.get(key), str):
      raise UserError(f"{where} has no string {key!r}")


def _lines(path: str | Path) -> Iterator[str]:
  """Lines of a UTF-8 file, with \\n as in Python's text mode."""
  offset = 0
  try:
    with open(path, "rb") as file:
      for line in file:
        text = line.decode()
        if not offset:
          text = text.removeprefix("\ufeff")  # the byte order mark
        yield text.replace("\r\n", "\n").replace("\r", "\n")
        offset += len(line)
  except UnicodeDecodeError as error:
    at = offset + error.start
    raise UserError(
      f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
      f"{at}; convert it, e.g. iconv -f latin1 -t utf-8"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error


def _decoded(value: Any, where: str) -> Any:
  """TFDS has strings as bytes."""
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{where} is not UTF-8: {error}") from error


def _check_folder(source: Source) -> None:
  """A path that is not there is not a dataset to look for on the network."""
  if source.name[0] in "./~" and not Path(source.name).is_dir():
    raise UserError(f"{source}: no such directory")


def _package(name: str, source: Source) -> Any:
  extra = {"datasets": "data", "tensorflow_datasets": "tfds"}[name]
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"{source} needs the package {name.replace('_', '-')}: "
      f"pip install 'adapt_pruner_jax[{extra}]'"
    ) from error


def _is_blank(document: Document) -> bool:
  content = document.content
  return not (content.strip() if isinstance(content, str) else content)
