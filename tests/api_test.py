"""The Python API does what the commands do."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax import api
from adapt_pruner_jax.data import sources
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.runs import run as run_
from tests.small_runs import recipe


@pytest.mark.slow
def test_the_same_as_a_run(small_model, tmp_path):
  """Also what is drawn for the refit; saved and opened again."""
  config = recipe(small_model, stages=1, refit="final")
  summary = run_.run(config, tmp_path / "work")
  text = sources.embedded_text("heldout")

  model = api.load(small_model, mesh=sharding.make_mesh(tensor=2))
  assert not model.params["embedding"].sharding.is_fully_replicated
  smaller = api.prune(
    model,
    ratio=0.3,
    samples=8,
    seq_len=16,
    batch=4,
    refit_samples=16,
    step_size=0.05,
    refit="final",
  )
  api.save(smaller, tmp_path / "out")
  again = api.load(tmp_path / "out")
  assert again.config.units() == smaller.config.units()
  run = api.load(tmp_path / "work" / "model")
  assert again.config == run.config
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    again.params,
    run.params,
  )
  found = api.perplexity(again, text, seq_len=64)
  assert found == pytest.approx(summary["perplexity_after"], rel=1e-4)


def test_a_smaller_vocabulary(small_model, tmp_path):
  """Rows of the kept tokens, as the folder that a run would open has them."""
  model = api.load(small_model)
  cut = api.cut_vocabulary(model, tmp_path / "cut", ratio=0.04)
  assert cut.config.vocab_size == int(300 * 0.96)
  again = api.load(cut.source)
  assert again.config == cut.config
  jax.tree.map(np.testing.assert_array_equal, again.params, cut.params)
  # A change of the weights in memory is not lost.
  params = jax.tree.map(lambda x: x + 1, model.params)
  other = api.cut_vocabulary(
    model._replace(params=params), tmp_path / "cut", ratio=0.04
  )
  np.testing.assert_array_equal(
    other.params["embedding"], cut.params["embedding"] + 1
  )
  api.save(cut, tmp_path / "out")
  assert api.load(tmp_path / "out").config == cut.config
  with pytest.raises(UserError, match="how much to cut"):
    api.cut_vocabulary(model, tmp_path / "cut")


def test_a_smaller_vocabulary_of_another_type_and_end(small_model, tmp_path):
  """The export has the stored type, and ids of the tokens that are left."""
  convert.convert(str(small_model), tmp_path / "half", "hf", dtype="bfloat16")
  file = tmp_path / "half" / "config.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps(content | {"eos_token_id": 299}))
  (tmp_path / "half" / "generation_config.json").unlink(missing_ok=True)
  cut = api.cut_vocabulary(
    api.load(tmp_path / "half"), tmp_path / "cut", ratio=0.04
  )
  assert cut.config.eos_ids == api.load(cut.source).config.eos_ids == (287,)
  api.save(cut, tmp_path / "out")
  content = json.loads((tmp_path / "out" / "config.json").read_text())
  assert content["eos_token_id"] == 287
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}


def test_float16_is_scored_in_float32(small_model, tmp_path):
  """There scores of many tokens underflow; what is written is float16."""
  half = api.load(small_model, "float16")
  small = api.prune(half, ratio=0.1, method="magnitude", refit="none")
  assert {x.dtype.name for x in jax.tree.leaves(small.params)} == {"float32"}
  api.save(small, tmp_path / "out")
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {str(x.dtype) for x in tensors.values()} == {"float16"}
  config = recipe(small_model, stages=1)
  config.model.dtype, config.train.tokens = "float16", 0
  assert config.weight_dtype() == "float32"


def test_what_is_refused(small_model):
  model = api.load(small_model)
  with pytest.raises(UserError, match="goes to a disk"):
    api.cut_vocabulary(model, "gs://bucket/cut", ratio=0.04)
  with pytest.raises(UserError, match="no tokenizer"):
    api.perplexity(model._replace(source=None), "text")
  with pytest.raises(UserError, match='must be text: "2"'):
    api.prune(model, ratio=0.3, method="curvature", refit=2)
  with pytest.raises(UserError, match="--dtype=int8 is not one of"):
    api.load(small_model, dtype="int8")
