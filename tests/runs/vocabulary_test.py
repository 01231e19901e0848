"""Runs that cut the vocabulary first, of a real small model."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.data.sources import embedded_text
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.planning import plan
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import run, vocabulary
from adapt_pruner_jax.runs.inputs import open_inputs
from adapt_pruner_jax.runs.recovery import teacher_of
from tests.small_runs import recipe

KEEP = 420


@pytest.fixture(scope="module")
def stories(shared_data):
  return shared_data / "models" / "stories260K"


def cut_recipe(model, **vocab) -> Config:
  config = recipe(model, stages=1)
  config.vocab = dataclasses.replace(config.vocab, **vocab)
  return config


@pytest.fixture(scope="module")
def cut(stories, tmp_path_factory):
  """A run that cuts the vocabulary and nothing else."""
  config = cut_recipe(stories, keep_tokens=KEEP)
  config.prune.ratio = 0.0
  path = tmp_path_factory.mktemp("cut") / "work"
  return path, run.run(config, path)


def test_another_config_is_another_directory(stories, tmp_path):
  """What it has copied must be what the model has now."""
  model = tmp_path / "model"
  shutil.copytree(stories, model)
  tokenizer, config = load_tokenizer(model), cut_recipe(model, keep_tokens=KEEP)
  make = lambda: vocabulary.cut(
    *(config, model, load.read_config(model), tokenizer, tmp_path / "cache"),
    lambda _: None,
  )
  folder = make()
  assert make() == folder
  raw = json.loads((model / "config.json").read_text())
  (model / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))
  assert load.read_config(make()).rope.theta == 5e5


def logits_of(folder, ids_BT):
  config, params = load.load(str(folder))
  run = jax.jit(decoder.Decoder(config).apply)
  return np.asarray(run({"params": params}, jnp.asarray(ids_BT))[0])


@pytest.mark.slow
def test_the_cut_model_in_transformers(cut, stories):
  """Its logits are the original's of the kept ids; its ids mean the same."""
  import torch
  import transformers

  path, summary = cut
  kept = np.array(json.loads((path / "kept.json").read_text())["vocab"])
  new = {int(old): i for i, old in enumerate(kept)}
  assert len(kept) == KEEP

  def opened(folder):
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return auto.eval(), transformers.AutoTokenizer.from_pretrained(folder)

  (old, old_tokenizer), (small, tokenizer) = (
    opened(stories),
    opened(path / "model"),
  )
  same = 0
  for text in embedded_text("heldout").split("\n")[:400]:
    ids = old_tokenizer(text).input_ids
    if {*ids} <= new.keys():
      assert tokenizer(text).input_ids == [new[i] for i in ids]
      same += 1
    assert tokenizer.decode(tokenizer(text).input_ids) == (
      old_tokenizer.decode(ids)
    )
  assert same > 50
  some = np.random.default_rng(0).integers(KEEP, size=(2, 24))
  with torch.no_grad():
    expected = old(torch.tensor(kept[some])).logits.numpy()[..., kept]
    found = small(torch.tensor(some)).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for name in ("bos_token_id", "eos_token_id"):
    old_id, new_id = (getattr(m.config, name) for m in (old, small))
    assert new_id == new[old_id]
  assert small.generation_config.eos_token_id == small.config.eos_token_id


@pytest.mark.slow
def test_what_the_summary_says(cut, stories):
  """Bits per byte by hand, from the perplexity of the run's own tokens."""
  path, summary = cut
  config = load.read_config(str(stories))
  gone = (config.vocab_size - KEEP) * config.hidden_size
  before, after = summary["params_before"], summary["params_after"]
  assert before == model_config.count_params(config)
  assert after == before - gone * (1 if config.tied else 2)
  assert summary["vocab"]["tokens_after"] == KEEP
  text = embedded_text("heldout")
  for when, folder in (("before", stories), ("after", path / "model")):
    tokenizer = load_tokenizer(folder)
    number = len(tokenizer.encode(text)) - 1  # all but the begin token
    nats = math.log(summary[f"perplexity_{when}"]) * number
    bits = nats / len(text.encode()) / math.log(2)
    assert summary[f"bits_per_byte_{when}"] == pytest.approx(bits, rel=1e-3)


@pytest.mark.slow
def test_all_formats_are_one_model(cut, tmp_path):
  path, _ = cut
  ids_BT = np.arange(24)[None] * 7 % KEEP
  expected = logits_of(path / "model", ids_BT)
  texts = embedded_text("heldout").split("\n")[:100]
  tokenizer = load_tokenizer(path / "model")
  for format, name in (("gguf", "m.gguf"), ("orbax", "o"), ("hf_uniform", "u")):
    convert.convert(str(path / "model"), tmp_path / name, format)
    source, back = str(tmp_path / name), tmp_path / f"back-{format}"
    convert.convert(source, back, "hf", dtype="float32")
    np.testing.assert_allclose(logits_of(back, ids_BT), expected, atol=1e-4)
    again = load_tokenizer(back)
    assert [again.encode(t) for t in texts] == [
      tokenizer.encode(t) for t in texts
    ]


@pytest.mark.slow
def test_pruned_and_trained_after_it(stories, tmp_path):
  """What it saves counts; the teacher says the kept ids alone; it goes on."""
  config = cut_recipe(stories, ratio=0.2)
  config.train = dataclasses.replace(
    config.train, tokens=8 * 8 * 32, distill_alpha=0.5
  )
  work = tmp_path / "work"
  summary = run.run(config, work)
  full = load.read_config(str(stories))
  target = int(model_config.count_params(full) * 0.7)
  assert target - 3 * full.hidden_size < summary["params_after"] <= target
  with Log(tmp_path) as log:
    inputs = open_inputs(config, tmp_path, log)
    teacher, params = teacher_of(inputs)
  assert teacher.vocab_size == int(full.vocab_size * 0.8)
  _, whole = load.load(str(stories))
  kept = json.loads((work / "kept.json").read_text())["vocab"]
  rows = np.asarray(whole["embedding"])[kept]
  np.testing.assert_array_equal(np.asarray(params["embedding"]), rows)
  (work / "summary.json").unlink()  # cut off at the end
  again = run.run(config, work)
  assert again["bits_per_byte_after"] == summary["bits_per_byte_after"]


@pytest.mark.slow
def test_a_vocabulary_that_reaches_the_target_alone(stories, tmp_path):
  config = cut_recipe(stories, keep_tokens=KEEP)
  config.prune.ratio = 0.01
  config.eval.text = ""
  summary = run.run(config, tmp_path / "work")
  assert summary["ffn_after"] == summary["ffn_before"]
  assert summary["params_after"] < summary["target_params"] + 1


@pytest.mark.slow
def test_the_plan_says_what_it_saves(stories):
  config = cut_recipe(stories, ratio=0.5)
  config.eval.text = ""
  found = plan.plan(config)
  dense = load.read_config(str(stories))
  small = dataclasses.replace(dense, vocab_size=256)
  assert found["vocab"] == {
    "tokens_before": 512,
    "tokens_after": 256,
    "params_after": model_config.count_params(small),
  }
  assert found["params"] == model_config.count_params(dense)
  assert found["target_params"] == int(found["params"] * 0.7)
  assert found["stages"][-1]["params"] <= found["target_params"]


@pytest.mark.parametrize(
  ("vocab", "message"),
  [
    ({"keep_tokens": 9}, "keep_tokens at least 26"),
    ({"keep_tokens": 512}, "is not below the model's 512 tokens"),
    ({"keep_tokens": 9, "ratio": 0.1}, "give one of them"),
    ({"ratio": 1.5}, "must be in"),
    ({"keep_tokens": 400, "source": "npy:a.npy"}, "says nothing of a vocab"),
  ],
)
def test_bad_input(stories, tmp_path, vocab, message):
  with pytest.raises(UserError, match=message):
    run.run(cut_recipe(stories, **vocab), tmp_path / "work")
  assert not (tmp_path / "work" / "config.json").exists()
