"""Files as people have them: packed, in directories, in tables."""

import gzip
import io
import json
import os
import types

import pytest

from adapt_pruner_jax.data import files, sources
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import bucket_path
from tests.data.words import CHAT, contents, error, write

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data):
  return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def long_zstd(data):
  """As of zstd --long=31, piece after piece."""
  zstandard = pytest.importorskip("zstandard")
  most = zstandard.ZstdCompressionParameters(window_log=30)
  packer = zstandard.ZstdCompressor(compression_params=most).compressobj()
  return packer.compress(data) + packer.flush()


def pzstd(data):
  """As zstd's parallel program does: a frame to be skipped comes first."""
  packed = zstd(data)
  sizes = (n.to_bytes(4, "little") for n in (4, len(packed)))
  return b"\x50\x2a\x4d\x18" + b"".join(sizes) + packed


@pytest.mark.parametrize("pack", [gzip.compress, zstd, pzstd, long_zstd])
def test_packed(tmp_path, pack):
  write(tmp_path / "a.jsonl.packed", pack(LINES))
  assert contents(f"jsonl:{tmp_path}/a.jsonl.packed") == ["one", "two"]
  # Several frames in a file, and many reads for one.
  text = "é\r\n" * 200_000
  write(tmp_path / "a.txt", pack(b"\xef\xbb\xbf" + text.encode()) + pack(b"z"))
  got = sources.read_text(tmp_path / "a.txt")
  assert got == "é\n" * 200_000 + "z"


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_packed_errors(tmp_path, pack):
  path = tmp_path / "a.jsonl"
  packed = pack(b"".join(b'{"text": "%d"}\n' % i for i in range(10_000)))
  write(path, packed[:-5])
  with error("a.jsonl: the file is cut off"):
    contents(f"jsonl:{path}")
  write(path, packed[:20] + b"\xff" * 30 + packed[50:])
  with error("a.jsonl: cannot be unpacked"):
    contents(f"jsonl:{path}")
  write(path, pack(LINES) + b"rest")
  with error("a.jsonl: cannot be unpacked|is not valid JSON"):
    contents(f"jsonl:{path}")
  write(path, pack(b'{"text": "one"}\n{"text"}\n'))
  with error("a.jsonl line 2 is not valid JSON"):
    contents(f"jsonl:{path}")


def test_a_directory_is_one_source(tmp_path):
  """With all below it, in the order of names, packed or not."""
  (tmp_path / "b").mkdir()
  (tmp_path / ".cache").mkdir()
  write(tmp_path / "b" / "0.json", [{"text": "three"}])
  write(tmp_path / "a.jsonl", ROWS)
  write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "four"}\n'))
  write(tmp_path / "README.md", "about")
  write(tmp_path / ".cache" / "d.jsonl", [{"text": "hidden"}])
  every = ["one", "two", "three", "four"]
  assert contents(f"jsonl:{tmp_path}") == every
  assert contents(f"jsonl:{tmp_path},limit=3") == every[:3]
  assert contents(f"text:{tmp_path}") == ["about"]
  with error(r"without a file that ends in .parquet .* it has README.md, a.js"):
    contents(f"parquet:{tmp_path}")


def test_a_pattern_is_one_source(tmp_path):
  for name in ("2", "1", "10"):
    write(tmp_path / f"part-{name}.txt", f"text {name}")
  assert contents(f"text:{tmp_path}/part-*.txt") == [
    "text 1",
    "text 10",
    "text 2",
  ]
  assert contents(f"text:{tmp_path}/**/part-[12].txt") == ["text 1", "text 2"]
  write(tmp_path / "a[1].txt", "a name that looks like a pattern")
  assert len(contents(f"text:{tmp_path}/a[1].txt")) == 1
  with error(r"text:.*/x\*.txt: no file has a name like that"):
    contents(f"text:{tmp_path}/x*.txt")


def test_a_pipe_is_refused(tmp_path):
  """It can be read once, and its tokens would be taken for another's."""
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="is no file"):
    files.files_of("text", str(tmp_path / "pipe"))


def test_a_bucket_that_is_away_while_it_is_read(monkeypatch):
  class Away(io.BytesIO):
    failed = False

    def readinto(self, into):
      if self.tell() and not self.failed:
        self.failed = True
        raise RuntimeError("503")
      return super().readinto(memoryview(into)[:6])

  waited = []
  fs = types.SimpleNamespace(open=lambda path: Away(b"hello\nworld\n"))
  monkeypatch.setattr(bucket_path, "file_system", lambda url: fs)
  monkeypatch.setattr(bucket_path, "_is_passing", lambda error: True)
  monkeypatch.setattr(bucket_path.time, "sleep", waited.append)
  assert [*files.lines("gs://b/x.txt")] == ["hello\n", "world\n"]
  assert waited == [1.0]


def test_errors_of_a_directory_name_the_file(tmp_path):
  write(tmp_path / "a.jsonl", ROWS)
  write(tmp_path / "b.jsonl", [{"text": "x"}, {"text": 1}])
  with error(r"/b.jsonl line 2: text is int"):
    contents(f"jsonl:{tmp_path}")


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path / "a.txt", "one")
  assert contents("text:~/a.txt") == ["one"]
  assert contents("text:~/*.txt") == ["one"]
  assert sources.read_text("~/a.txt") == "one"
  parsed = sources.parse_sources("npy:~/a.npy", "calibration.source")
  assert parsed[0].name == f"{tmp_path}/a.npy"


def test_json_array(tmp_path):
  path = tmp_path / "a.json"
  rows = [*ROWS, {"messages": CHAT}]
  for indent in (None, 2):
    write(path, json.dumps(rows, indent=indent))
    assert contents(f"jsonl:{path}") == ["one", "two", CHAT]
  write(path, "\n\n" + json.dumps([*ROWS, {"text": 3}], indent=0))
  with error("a.json line 10: text is int"):
    contents(f"jsonl:{path}")
  write(path, "[]")
  with error("is empty: it has no text"):
    contents(f"jsonl:{path}")


@pytest.mark.parametrize("indent", [None, 4])
def test_lmflow(tmp_path, indent):
  """The files of the authors' trainer: one object with all rows."""
  rows = {"type": "text_only", "instances": [*ROWS, {"text": 3}]}
  write(tmp_path / "a.json", json.dumps(rows, indent=indent))
  source = sources.Source("jsonl", f"{tmp_path}/a.json", limit=2)
  found = [document.content for document in sources.read_documents(source)]
  assert found == ["one", "two"]
  with error("a.json.* instance 2: text is int"):
    contents(f"jsonl:{tmp_path}/a.json")


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ('[\n{"text": "a"},\n\n{"text": 3}\n]', "a.json line 4: text is int"),
    ('[\n{"text": "a"},\n3]', "a.json line 3 is not an object"),
    ('[{"text": "a"},\n{"text"}]', "a.json line 2 is not valid JSON"),
    ('[{"text": "a"}\n{"text": "b"}]', "line 1: no comma or ] comes after"),
    ('[{"text": "a"},\n', "a.json line 2 is not valid JSON"),
    ('[{"text": "a"}', "line 1: no comma or ]"),
    ('[{"text": "a"}]\n[1]', "line 1: something comes after the array"),
  ],
)
def test_json_array_errors(tmp_path, text, match):
  write(tmp_path / "a.json", text)
  with error(match):
    contents(f"jsonl:{tmp_path}/a.json")


def test_parquet(tmp_path):
  """Rows have all fields that any row has; those of others are null."""
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  calls = [{"type": "function", "function": {"name": "f"}}]
  rows = [
    {"text": "one"},
    {"messages": [CHAT[0], {"role": "assistant", "tool_calls": calls}]},
    {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
    {"text": "two"},
  ]
  for i, part in enumerate((rows, [{"text": "three"}])):
    table = pyarrow.Table.from_pylist(
      [{"text": None, "messages": None} | row for row in part]
    )
    parquet.write_table(table, tmp_path / f"{i}.parquet")
  got = contents(f"parquet:{tmp_path}")
  silent = [CHAT[0], {"role": "assistant", "content": ""}]  # as in JSON
  assert got == ["one", rows[1]["messages"], silent, "two", "three"]
  with error(r"0.parquet row 1 has no text; it has messages"):
    contents(f"parquet:{tmp_path}/0.parquet,column=text")
  with error(r"is a parquet file; write parquet:"):
    contents(f"jsonl:{tmp_path}/0.parquet")
  write(tmp_path / "bad.parquet", "PAR1 and nothing else")
  with error("bad.parquet cannot be read as parquet|bad.parquet: "):
    contents(f"parquet:{tmp_path}/bad.parquet")
  with error("none.parquet: No such file|none.parquet: Failed to open"):
    contents(f"parquet:{tmp_path}/none.parquet")


def test_files_of_a_missing_file(tmp_path):
  assert files.files_of("text", "none.txt")[0].name == "none.txt"
