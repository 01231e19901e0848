"""Sources as streams of tokens, and the copies on disk."""

import dataclasses
import re

import numpy as np
import pytest

from adapt_pruner_jax.data import sources, token_store
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
  monkeypatch.setattr(token_store, "GROUP_CHARS", 7)
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

  def unread(_):
    raise AssertionError("was tokenised again")

  with monkeypatch.context() as patch:
    patch.setattr(token_store, "read_documents", unread)
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


def test_cache_written_by_two_processes(tmp_path, words):
  """The second to finish uses what the first wrote."""
  source = sources.Source("text", str(write(tmp_path / "a.txt", "w1 w2")))
  folder = tmp_path / "cache" / "text-1"
  for _ in range(2):
    token_store._write_cache(folder, {}, token_store._chunks(source, words, V))
  assert token_store._read_cache(folder)[0][0].tolist() == [
    BOS,
    *ids_of("w1", "w2"),
    EOS,
  ]
  assert [p.name for p in folder.parent.iterdir()] == ["text-1"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damaged_cache_is_made_again(tmp_path, words, damage):
  path = write(tmp_path / "a.txt", "w1 w2 w3")
  source = sources.Source("text", str(path))
  whole = np.array(
    token_store.tokenise(source, words, V, tmp_path / "c").tokens
  )
  [folder] = (tmp_path / "c").iterdir()
  file = folder / "tokens.bin"
  raw = file.read_bytes()
  if damage == "flip":
    file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
  elif damage == "truncate":
    file.write_bytes(raw[:-4])
  elif damage == "delete":
    file.unlink()
  else:
    (folder / "manifest.json").write_text("{")
  again = token_store.tokenise(source, words, V, tmp_path / "c")
  np.testing.assert_array_equal(whole, again.tokens)
  assert [p.name for p in (tmp_path / "c").iterdir()] == [folder.name]


def test_interrupted_cache_leaves_nothing(tmp_path, words):
  path = write(tmp_path / "a.jsonl", '{"text": "w1"}\n{')
  with error("not valid JSON"):
    token_store.tokenise(
      sources.Source("jsonl", str(path)), words, V, tmp_path / "cache"
    )
  assert not list((tmp_path / "cache").iterdir())


def test_cache_that_cannot_be_written(tmp_path, words):
  path = write(tmp_path / "a.txt", "w1 w2")
  with error("cannot write"):
    token_store.tokenise(sources.Source("text", str(path)), words, V, path)


def test_progress(tmp_path, words, monkeypatch):
  """A line at times and one at the end, with what was read and how fast."""
  rows = [{"text": f"w{i}"} for i in range(9)]
  source = sources.Source("jsonl", str(write(tmp_path / "a.jsonl", rows)))
  said = []
  monkeypatch.setattr(token_store, "GROUP_CHARS", 6)  # three rows
  monkeypatch.setattr(token_store, "SAY_EVERY", 0.0)
  token_store.tokenise(source, words, V, tmp_path / "cache", said.append)
  number = r"[\d,]+ tokens/s"
  assert len(said) == 4
  for line, count in zip(said, (3, 6, 9), strict=False):
    start = f"tokenising {source}: {count} documents, {3 * count} tokens, "
    assert re.fullmatch(f"{re.escape(start)}{number} so far", line)
  start = f"tokenised {source}: 9 documents, 27 tokens, "
  assert re.fullmatch(f"{re.escape(start)}{number}", said[3])
  said.clear()
  token_store.tokenise(source, words, V, tmp_path / "cache", said.append)
  assert not said  # it was kept
  monkeypatch.setattr(token_store, "SAY_EVERY", 60.0)
  token_store.tokenise(source, words, V, None, said.append)
  assert len(said) == 1
