"""`adapt-pruner tokenize`."""

import signal

import pytest

from adapt_pruner_jax.data import token_store
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.runs import tokenize


def test_a_run_finds_the_tokens(small_model, tmp_path, monkeypatch):
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "kept"))
  text = tmp_path / "a.txt"
  text.write_text("a text, and some more of it")
  spec = f"text:{text},weight=0.5,embedded,limit=3"
  said = []
  tokenize.tokenize(spec, str(small_model), say=said.append)
  assert len(list(tmp_path.rglob("*.safetensors"))) == 2
  assert str(tmp_path / "kept" / "tokens") in said[-1]

  def unread(*_):
    raise AssertionError("was tokenised again")

  monkeypatch.setattr(token_store, "read_from", unread)
  (source, _) = parse_sources(spec, "data.source")
  found = token_store.tokenise(
    source, load_tokenizer(small_model), 300, tmp_path / "kept" / "tokens"
  )
  assert f"text:{text}: {len(found.tokens):,} tokens" in said[1]
  with pytest.raises(UserError, match="--source=nowhere:x: 'nowhere' is not"):
    tokenize.tokenize("nowhere:x", str(small_model))
  with pytest.raises(UserError, match="--tokens=-5 must be at least 0"):
    tokenize.tokenize("embedded", str(small_model), tokens=-5)
  with pytest.raises(UserError, match="npy is not tokenised"):
    tokenize.tokenize("npy:x", str(small_model))


def test_stopped(small_model, tmp_path, monkeypatch):
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "kept"))

  monkeypatch.setattr(token_store.encoding, "GROUP_CHARS", 100)
  monkeypatch.setattr(
    token_store.Progress, "add", lambda *_: signal.raise_signal(signal.SIGTERM)
  )
  with pytest.raises(StoppedError, match="the same command goes on"):
    tokenize.tokenize("embedded,limit=3", str(small_model))
