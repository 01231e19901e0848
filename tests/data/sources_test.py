"""Sources: how they are written, and what is read of files and data sets."""

import bz2
import lzma
import sys
import types

import pytest

from adapt_pruner_jax.data import sources
from tests.data.words import CHAT, WORDS, contents, error, write


def test_parse_sources():
  parse = lambda spec: sources.parse_sources(spec, "data.source")
  assert parse("embedded") == [sources.Source("embedded")]
  assert parse("text:a, b.txt") == [sources.Source("text", "a, b.txt")]
  assert parse("text:a.txt,weight=0.7,jsonl:b=1.jsonl,loss=assistant") == [
    sources.Source("text", "a.txt", weight=0.7),
    sources.Source("jsonl", "b=1.jsonl", loss="assistant"),
  ]
  assert parse("hf:org/name,subset=en,split=train[:5%],limit=7") == [
    sources.Source("hf", "org/name", subset="en", split="train[:5%]", limit=7)
  ]


@pytest.mark.parametrize(
  ("spec", "match"),
  [
    ("", "'' is not a kind of source"),
    ("txt:a", r"'txt' is not a kind of source \(did you mean text\?\)"),
    ("text", "text should be text:NAME"),
    ("embedded:x", "should be embedded"),
    ("text:a,wieght=1", r"no option 'wieght' \(did you mean weight\?\)"),
    ("text:a,loss=all", "no option 'loss'"),
    ("text:a,weight=x", "weight=x is not a number > 0"),
    ("text:a,weight=0", "weight=0 is not a number > 0"),
    ("text:a,weight=nan", "not a number > 0"),
    ("text:a,limit=-1", "limit=-1 is not a number > 0"),
    ("jsonl:a,loss=user", "loss=user is not one of all, assistant"),
    ("embedded,split=test", "split=test is not one of train, heldout"),
    ("npy:a,text:b", "npy:FILE cannot be mixed"),
    ("text:ftp://b/a.txt,limit=1", "ftp://b/a.txt is not a path; in a bu"),
  ],
)
def test_parse_sources_errors(spec, match):
  with error(match):
    sources.parse_sources(spec, "data.source")


def test_embedded():
  train, heldout = contents("embedded"), contents("embedded,split=heldout")
  assert not set(train) & set(heldout)
  size = sum(map(len, train))
  assert size > 300_000
  assert 0.03 < sum(map(len, heldout)) / size < 0.25
  assert sources.embedded_text("heldout") == "\n\n".join(heldout)
  assert len(contents("embedded,limit=3")) == 3


def test_text(tmp_path):
  path = write(tmp_path / "a.txt", "one\ntwo\n\n<|endoftext|>\nthree\n")
  assert contents(f"text:{path}") == ["one\ntwo", "three"]
  write(path, b"\xef\xbb\xbfone\r\ntwo\r\n")
  assert contents(f"text:{path}") == ["one\ntwo"]
  assert sources.read_text(path) == "one\ntwo\n"


def test_long_text_is_cut_at_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 6)
  path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
  assert contents(f"text:{path}") == ["one\ntwo", "three"]


def test_a_long_line_is_cut_at_a_space_or_a_character(tmp_path, monkeypatch):
  """Some corpora are one line."""
  monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 8)
  text = "one two three\r\nüüüüüüü\n123456789"
  path = write(tmp_path / "a.txt", text)
  found = contents(f"text:{path}")
  assert found == ["one two ", "three\nüüü", "üüüü\n1234567", "89"]
  assert "".join(found) == text.replace("\r", "")
  assert sources.read_text(path) == text.replace("\r", "")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("hé".encode("utf-16"), "is UTF-16: convert it, e.g. iconv -f utf-16"),
    (bz2.compress(b"text"), "packed with bzip2: unpack it"),
    (lzma.compress(b"text"), "packed with xz: unpack it"),
  ],
)
def test_other_files(tmp_path, content, words):
  path = write(tmp_path / "a.txt", content)
  with error(words):
    contents(f"text:{path}")


def test_text_errors(tmp_path):
  path = tmp_path / "a.txt"
  for read in (sources.read_text, lambda p: contents(f"text:{p}")):
    with error("a.txt: No such file"):
      read(path)
    with error("Is a directory|is a directory without a file"):
      read(tmp_path)
    write(path, "")
    with error("a.txt is empty"):
      read(path)
    write(path, " \n\n")
    with error("a.txt is empty"):
      read(path)
    write(path, "né\n".encode() + b"ab\xe9\n")
    with error("not UTF-8: byte 0xe9 at offset 6"):
      read(path)
    path.unlink()


def test_jsonl(tmp_path):
  rows = [{"text": "one"}, {"messages": CHAT}, {"text": ""}, {"text": "two"}]
  path = write(tmp_path / "a.jsonl", rows)
  assert contents(f"jsonl:{path}") == ["one", CHAT, "two"]
  write(path, [{"body": "one"}])
  assert contents(f"jsonl:{path},column=body") == ["one"]


@pytest.mark.parametrize(
  ("row", "match"),
  [
    ("{", "a.jsonl line 2 is not valid JSON"),
    ("[]", "line 2 is not an object"),
    ('{"body": "x"}', "line 2 has no text or messages; it has body; .*column"),
    ('{"text": 3}', "line 2: text is int, not a string or a list"),
    ('{"messages": ["x"]}', r"line 2: messages\[0\] is not an object"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no string 'con"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at offset 26"),
  ],
)
def test_jsonl_errors(tmp_path, row, match):
  row = row if isinstance(row, bytes) else row.encode()
  path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + row + b"\n")
  with error(match):
    contents(f"jsonl:{path}")


def test_jsonl_assistant_needs_chats(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "one"}])
  with error("line 2 is plain text, and loss=assistant needs chats"):
    contents(f"jsonl:{path},loss=assistant")


def test_hf(tmp_path):
  datasets = pytest.importorskip("datasets")
  rows = datasets.Dataset.from_dict({"text": ["one", "", "two"]})
  rows.save_to_disk(tmp_path / "one")
  assert contents(f"hf:{tmp_path}/one") == ["one", "two"]
  chats = datasets.Dataset.from_dict({"messages": [CHAT[:2]]})
  both = datasets.DatasetDict({"train": rows, "chat": chats})
  both.save_to_disk(tmp_path / "both")
  assert contents(f"hf:{tmp_path}/both") == ["one", "two"]
  assert contents(f"hf:{tmp_path}/both,split=chat") == [CHAT[:2]]
  with error("split=test.* cannot be loaded"):
    contents(f"hf:{tmp_path}/both,split=test")
  with error("row 0 has no body; it has text; .*column=NAME"):
    contents(f"hf:{tmp_path}/one,column=body")
  with error("no such directory"):
    contents(f"hf:{tmp_path}/missing")
  (tmp_path / "empty").mkdir()
  with error("cannot be loaded"):
    contents(f"hf:{tmp_path}/empty")


def test_hf_limit_streams(tmp_path):
  """A directory of data files, as on the hub, read no further than asked."""
  pytest.importorskip("datasets")
  write(tmp_path / "train.jsonl", [{"text": w} for w in WORDS])
  assert contents(f"hf:{tmp_path},limit=3") == WORDS[:3]


def test_hf_without_network(monkeypatch):
  datasets = pytest.importorskip("datasets")

  def offline(*args, **kwargs):
    raise ConnectionError("Couldn't reach the hub\nfor many reasons")

  monkeypatch.setattr(datasets, "load_dataset", offline)
  with error("Couldn't reach the hub; without network, give a directory"):
    contents("hf:org/name")


def test_tfds(monkeypatch):
  """A stand-in of tfds.data_source, which hands strings out as bytes."""

  def data_source(name, split):
    if split != "train":
      raise ValueError(f"Unknown split {split!r}")
    return [{"text": t, "label": 1} for t in ("oné".encode(), b"", b"\xff")]

  package = types.SimpleNamespace(data_source=data_source)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", package)
  assert contents("tfds:lm1b,limit=1") == ["oné"]
  with error("tfds:lm1b row 2 is not UTF-8"):
    contents("tfds:lm1b")
  with error("split=test.* cannot be loaded: Unknown split 'test'"):
    contents("tfds:lm1b,split=test")
  with error("no such directory"):
    contents("tfds:./missing")


@pytest.mark.parametrize(
  ("spec", "package", "extra"),
  [
    ("hf:org/name", "datasets", "data"),
    ("tfds:lm1b", "tensorflow_datasets", "tfds"),
  ],
)
def test_missing_package_names_its_extra(monkeypatch, spec, package, extra):
  monkeypatch.setitem(sys.modules, package, None)
  with error(rf"pip install 'adapt_pruner_jax\[{extra}\]'"):
    contents(spec)
