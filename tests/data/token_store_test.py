"""Sources as streams of tokens, and the copies on disk."""

import dataclasses
import multiprocessing
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner_jax.data import encoding, shards, sources, token_store
from adapt_pruner_jax.distributed import virtual_devices
from adapt_pruner_jax.errors import StoppedError
from tests.data.words import (
  BOS,
  CHAT,
  EOS,
  TEMPLATE,
  WORDS,
  V,
  error,
  ids_of,
  write,
)


def test_broken_chat_names_its_row(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)
  raiser = "{{ raise_exception('no system') }}"
  tokenizer = dataclasses.replace(words, chat_template=raiser)
  source = sources.Source("jsonl", str(path))
  with error("a.jsonl line 1: .*no system"):
    token_store.tokenise(source, tokenizer, V + 2)


@pytest.mark.parametrize("bos", ["auto", "none"])
def test_stream(tmp_path, words, unbegun, bos):
  """A chat's template lacks the begin token; every document has one."""
  words = words if bos == "auto" else unbegun
  rows = [{"text": "w1 w2"}, {"messages": CHAT[:2]}, {"text": "w3 </s>"}]
  path = write(tmp_path / "a.jsonl", rows)
  source = sources.Source("jsonl", str(path))
  stream = token_store.tokenise(source, words, V + 2)
  chat = words.encode_chat(CHAT[:2])  # closed by its own template
  parts = [
    [BOS, *ids_of("w1", "w2"), EOS],
    [BOS] * (bos == "auto") + chat,
    [BOS, *ids_of("w3"), EOS],  # closed once
  ]
  assert stream.tokens.tolist() == [i for part in parts for i in part]
  assert stream.tokens.dtype == np.int32
  assert stream.starts.tolist() == [0, 4, 4 + len(parts[1])]
  assert stream.trained is None


def test_stream_does_not_depend_on_groups(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
  source = sources.Source("jsonl", str(path))
  whole = token_store.tokenise(source, words, V)
  monkeypatch.setattr(encoding, "GROUP_CHARS", 7)
  grouped = token_store.tokenise(source, words, V)
  np.testing.assert_array_equal(whole.tokens, grouped.tokens)
  np.testing.assert_array_equal(whole.starts, grouped.starts)
  assert whole.fingerprint == grouped.fingerprint


def test_stream_error_names_row_and_id(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": "w1 w39"}])
  with error(r"a.jsonl line 2: token id 44 \('w39'\) is outside"):
    token_store.tokenise(sources.Source("jsonl", str(path)), words, V - 1)


def test_cache(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
  source = sources.Source("jsonl", str(path), loss="assistant")
  cache = tmp_path / "cache"
  plain = token_store.tokenise(source, words, V + 2)
  written = token_store.tokenise(source, words, V + 2, cache)

  def unread(*_):
    raise AssertionError("was tokenised again")

  with monkeypatch.context() as patch:
    patch.setattr(token_store, "read_from", unread)
    again = token_store.tokenise(source, words, V + 2, cache)
    with error("token id 46 .*is outside"):  # still checked
      token_store.tokenise(source, words, V + 1, cache)
  for stream in (written, again):
    for field in ("tokens", "starts", "trained"):
      np.testing.assert_array_equal(
        getattr(plain, field), getattr(stream, field)
      )
    assert stream.fingerprint == plain.fingerprint

  # A changed file, another tokenizer and another loss are other streams.
  other = dataclasses.replace(words, chat_template="w1 " + TEMPLATE)
  assert len(token_store.tokenise(source, other, V + 2, cache).tokens) > len(
    plain.tokens
  )
  write(path, [{"messages": CHAT}] * 4)
  assert len(token_store.tokenise(source, words, V + 2, cache).starts) == 4
  everything = dataclasses.replace(source, loss="all")
  assert token_store.tokenise(everything, words, V + 2, cache).trained is None
  assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "header"])
def test_damaged_shard_is_made_again(tmp_path, words, damage, monkeypatch):
  """It alone: those behind it begin where they did."""
  path = write(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
  source, folder = in_shards(path, monkeypatch, limit=32)
  whole = token_store.tokenise(source, words, V, folder)
  tokens = whole.tokens[:]
  files = sorted(folder.rglob("*.safetensors"))
  assert len(files) == 4  # the last is empty
  raw = files[1].read_bytes()
  if damage == "flip":
    files[1].write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
  elif damage == "truncate":
    files[1].write_bytes(raw[:-4])
  elif damage == "delete":
    files[1].unlink()
  else:
    files[1].write_bytes(raw[:9] + b"x" + raw[10:])
  kept = [files[i].stat().st_ino for i in (0, 2, 3)]
  again = token_store.tokenise(source, words, V, folder)
  np.testing.assert_array_equal(tokens, again.tokens[:])
  assert again.fingerprint == whole.fingerprint
  assert [files[i].stat().st_ino for i in (0, 2, 3)] == kept
  assert files[1].read_bytes() == raw
  assert sorted(folder.rglob("*.*")) == files


def in_shards(path, monkeypatch, limit=0):
  """A source whose shards are ten documents or more, and a folder for them."""
  monkeypatch.setattr(encoding, "GROUP_CHARS", 6)  # two or three
  monkeypatch.setattr(encoding, "AT_HOME", 9)  # groups, none read ahead
  monkeypatch.setattr(token_store, "SHARD_TOKENS", 30)
  source = sources.Source("jsonl", str(path), limit=limit)
  return source, path.parent / "cache"


def test_larger_need_extends_the_cache(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
  source, folder = in_shards(path, monkeypatch)
  read = []
  original = token_store.read_from

  def reads(*arguments):
    for document, place in original(*arguments):
      read.append(document.content)
      yield document, place

  monkeypatch.setattr(token_store, "read_from", reads)
  little = token_store.tokenise(source, words, V, folder, need=31)
  assert not little.whole
  # Nothing of the third shard.
  first = len(read)
  assert len(little.starts) == first < len(WORDS)
  more = token_store.tokenise(source, words, V, folder)
  assert more.whole
  assert read == WORDS  # each once
  assert more.tokens[: len(little.tokens)].tolist() == little.tokens[:].tolist()
  plain = token_store.tokenise(source, words, V)
  assert more.fingerprint == plain.fingerprint != little.fingerprint
  assert more.tokens[:].tolist() == plain.tokens[:].tolist()
  # Whoever needs little sees what it saw, however much there is now.
  again = token_store.tokenise(source, words, V, folder, need=31)
  assert again.fingerprint == little.fingerprint
  assert len(read) == 2 * len(WORDS)  # by `plain`


@pytest.mark.parametrize("kind", ["jsonl", "text", "hf", "embedded"])
def test_stopped_and_continued(tmp_path, words, monkeypatch, kind):
  """Shard by shard, in the middle of a file and of several."""
  path = tmp_path / "texts"
  path.mkdir()
  monkeypatch.setattr(encoding, "GROUP_CHARS", 6)
  monkeypatch.setattr(token_store, "SHARD_TOKENS", 30)
  rows = [{"text": w if i % 7 else " "} for i, w in enumerate(WORDS)]
  if kind == "jsonl":
    write(path / "a.jsonl", rows[:25])
    write(path / "b.jsonl", rows[25:])
  elif kind == "text":
    write(path / "a.txt", "\n<|endoftext|>\n".join(WORDS[:25]))
    write(path / "b.txt", "\n<|endoftext|>\n".join(WORDS[25:]))
  elif kind == "hf":
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
  name = "" if kind == "embedded" else str(path)
  source = sources.Source(kind, name, limit=33)
  calls = 0

  def stop():
    nonlocal calls
    calls += 1
    if calls % 9 == 0:
      raise StoppedError("asked")

  for _ in range(100):
    try:
      found = token_store.tokenise(
        source, words, V + 2, tmp_path / "c", stop=stop
      )
      break
    except StoppedError:
      assert not [p for p in tmp_path.rglob(".*") if "tmp" in p.name]
  assert calls > 9
  plain = token_store.tokenise(source, words, V + 2)
  assert len(plain.starts) == 33 if kind != "hf" else len(plain.starts) <= 33
  assert found.fingerprint == plain.fingerprint
  assert found.tokens[:].tolist() == plain.tokens[:].tolist()


def test_headers_alone_are_read_of_much(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
  source, folder = in_shards(path, monkeypatch)
  token_store.tokenise(source, words, V, folder)
  monkeypatch.setattr(token_store, "CHECK_BYTES", 200)
  looked = []
  monkeypatch.setattr(
    token_store.shards, "is_intact", lambda s: looked.append(s) or True
  )
  token_store.tokenise(source, words, V, folder)
  assert len(looked) == 1
  file = sorted(folder.rglob("*.safetensors"))[2]
  file.write_bytes(file.read_bytes()[:-1])  # still seen, by its size
  read = shards.read(file)
  assert read is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_joined_is_one_array(lengths, data):
  ends = np.cumsum(lengths)
  whole = np.arange(ends[-1])
  joined = shards.Joined(np.split(whole, ends[:-1]))
  assert len(joined) == len(whole)
  a, b = (data.draw(st.integers(0, len(whole) + 2)) for _ in "ab")
  assert joined[a:b].tolist() == whole[a:b].tolist()
  assert joined[:].tolist() == whole.tolist()
  if len(whole):
    index = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=2))
    index = np.array(index, int).reshape(-1, 1) * np.ones((1, 3), int)
    assert joined[index].tolist() == whole[index].tolist()


@pytest.mark.slow
def test_by_processes(tmp_path, words, monkeypatch):
  """The same tokens; an error names its row; they end with their parent."""
  rows = [{"text": w} for w in WORDS * 40]
  path = write(tmp_path / "a.jsonl", rows)
  source = sources.Source("jsonl", str(path))
  monkeypatch.setattr(encoding, "GROUP_CHARS", 90)
  plain = token_store.tokenise(source, words, V)
  monkeypatch.setattr(virtual_devices, "cores", lambda: 2)
  found = token_store.tokenise(source, words, V, tmp_path / "cache")
  assert found.fingerprint == plain.fingerprint
  with error(r"a.jsonl line 40: token id 44 \('w39'\) is outside"):
    token_store.tokenise(source, words, V - 1, tmp_path / "other")
  rows = [{"text": "w1"}] * 1000 + [{"text": "w39"}] + [{"text": "w1"}] * 500
  write(path, rows)
  with error(r"a.jsonl line 1001: token id 44"):
    token_store.tokenise(source, words, V - 1, tmp_path / "other")
  assert not multiprocessing.active_children()

  def killed(*_):
    (child, *_) = multiprocessing.active_children()
    child.kill()

  # Each is a group; more than fit into a pipe wait.
  write(path, [{"text": "w1 " * 5000}] * 60)
  monkeypatch.setattr(encoding, "AHEAD", 60)
  with error("a process that tokenises has ended"):
    after = iter(range(10**9))
    token_store.tokenise(
      *(source, words, V, tmp_path / "third"),
      stop=lambda: next(after) == 5 and killed(),
    )


def test_interrupted_cache_leaves_nothing(tmp_path, words):
  path = write(tmp_path / "a.jsonl", '{"text": "w1"}\n{')
  with error("not valid JSON"):
    token_store.tokenise(
      sources.Source("jsonl", str(path)), words, V, tmp_path / "cache"
    )
  assert [p.name for p in tmp_path.rglob("*")] == ["a.jsonl"]


def test_cache_that_cannot_be_written(tmp_path, words):
  path = write(tmp_path / "a.txt", "w1 w2")
  with error("cannot write"):
    token_store.tokenise(sources.Source("text", str(path)), words, V, path)


def test_progress(tmp_path, words, monkeypatch):
  """A line at times and one at the end, with what was read and how fast."""
  rows = [{"text": f"w{i}"} for i in range(9)]
  source = sources.Source("jsonl", str(write(tmp_path / "a.jsonl", rows)))
  said = []
  monkeypatch.setattr(encoding, "GROUP_CHARS", 6)  # three rows
  monkeypatch.setattr(token_store, "SAY_EVERY", 0.0)
  token_store.tokenise(source, words, V, tmp_path / "cache", said.append)
  number = r"[\d,]+ tokens/s"
  assert len(said) == 4
  for line, count in zip(said, (3, 6, 9), strict=False):
    start = f"tokenising {source}: {count} documents, {3 * count} tokens, "
    left = rf"{number}, \d+%, about \d+ s left"
    assert re.fullmatch(f"{re.escape(start)}{left}", line)
  start = f"tokenised {source}: 9 documents, 27 tokens, "
  assert re.fullmatch(f"{re.escape(start)}{number}", said[3])
  said.clear()
  token_store.tokenise(source, words, V, tmp_path / "cache", said.append)
  assert not said  # it was kept
  monkeypatch.setattr(token_store, "SAY_EVERY", 60.0)
  token_store.tokenise(source, words, V, None, said.append)
  assert len(said) == 1
