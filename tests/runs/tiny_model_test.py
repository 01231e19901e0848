import dataclasses
import json

import jax
import numpy as np
import pytest

from adapt_pruner_jax.data import packing
from adapt_pruner_jax.data.sources import embedded_text
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.runs import tiny_model

SMALL = tiny_model.Recipe(
  V=300, D=32, L=2, K=2, G=2, H=8, F=48, context=32, batch=16, steps=120
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A cache with one trained model, and what was said meanwhile."""
  lines = []
  cache = tmp_path_factory.mktemp("cache")
  return cache, tiny_model.base_model(cache, lines.append, SMALL), lines


def test_learns_more_than_frequencies(made):
  _, path, lines = made
  losses = json.loads((path / tiny_model.MANIFEST).read_text())["heldout"]
  assert losses["loss"] < losses["unigram_loss"] - 0.2
  assert any("step 120/120" in line for line in lines)
  assert f"perplexity {losses['perplexity']:.1f}" in lines[-1]


def test_only_the_model_is_left_in_the_cache(made):
  cache, path, _ = made
  assert list(cache.iterdir()) == [path]


def test_cached_model_is_not_trained_again(made, monkeypatch):
  cache, path, _ = made
  monkeypatch.setattr(tiny_model, "fit", None)
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(cache))
  assert tiny_model.base_model(recipe=SMALL) == path


def test_other_recipe_is_another_model(made):
  other = dataclasses.replace(SMALL, steps=121)
  assert tiny_model._key(other) != tiny_model._key(SMALL)


@pytest.mark.parametrize("how", ["cut", "gone", "extra", "manifest"])
def test_damaged_cache_is_made_again(made, tmp_path, monkeypatch, how):
  _, path, _ = made
  monkeypatch.setattr(tiny_model, "_make", lambda made, *_: fake(made))

  def fake(made):
    made.mkdir(exist_ok=True)
    (made / "model.safetensors").write_bytes(b"weights")
    sums = {"sha256": tiny_model._checksums(made)}
    (made / tiny_model.MANIFEST).write_text(json.dumps(sums))

  path = tiny_model.base_model(tmp_path, recipe=SMALL)
  weights = path / "model.safetensors"
  match how:
    case "cut":
      weights.write_bytes(b"weigh")
    case "gone":
      weights.unlink()
    case "extra":
      (path / "code.py").touch()
    case "manifest":
      (path / tiny_model.MANIFEST).write_text("[]")
  lines = []
  assert tiny_model.base_model(tmp_path, lines.append, recipe=SMALL) == path
  assert [line for line in lines if "damaged" in line]
  assert weights.read_bytes() == b"weights"
  assert tiny_model.is_intact(path)


def test_failure_leaves_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(tiny_model, "fit", fail)
  with pytest.raises(KeyboardInterrupt):
    tiny_model.base_model(tmp_path, recipe=SMALL)
  assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="set ADAPT_PRUNER_CACHE"):
    tiny_model.base_model(tmp_path / "file" / "cache", recipe=SMALL)


def test_tokenizer_is_lossless_and_deterministic(tmp_path):
  one = tiny_model.train_tokenizer(tmp_path / "one", 300)
  two = tiny_model.train_tokenizer(tmp_path / "two", 300)
  assert one.backend.to_str() == two.backend.to_str()
  text = embedded_text("heldout")[:2000] + " naïve ☃\r\n\t"
  assert one.backend.decode(one.encode(text)) == text
  assert one.bos_id == one.eos_id == 0
  assert one.backend.get_vocab_size() == 300


def test_directory_opens_as_a_model(made):
  load = pytest.importorskip("adapt_pruner_jax.formats.hf.load")
  _, path, _ = made
  config, params = load.load(path, "float32")
  assert model_config.count_params(config) == model_config.count_params(
    tiny_model.config_of(SMALL)
  )
  tokens = packing.heldout_tokens(
    embedded_text("heldout"), load_tokenizer(path), config.vocab_size
  )
  logits, _ = decoder.Decoder(config).apply(
    {"params": params}, tokens[None, :8]
  )
  assert np.isfinite(logits).all()
  assert jax.tree.structure(params) == jax.tree.structure(
    model_config.abstract_params(config, np.float32)
  )


def test_directory_opens_in_transformers(made):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  _, path, _ = made
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  text = "The import statement\n  binds names."
  assert tokenizer(text)["input_ids"] == load_tokenizer(path).encode(text)
  assert tokenizer.eos_token_id == 0
  peer = transformers.AutoModelForCausalLM.from_pretrained(path)
  assert peer.generation_config.eos_token_id == 0
