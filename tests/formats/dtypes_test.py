"""What is written has the dtypes of what it came from, tensor by tensor."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax import api
from adapt_pruner_jax.data import sources
from adapt_pruner_jax.formats import convert, dtypes, opening
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.runs import run
from tests import small
from tests.small_runs import recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Most of the time goes into compiling programs that run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def mix(path):
  """Makes all of a model bfloat16 but for its norms."""
  arrays = load_file(path / WEIGHTS)
  for name, array in arrays.items():
    if "norm" not in name:
      arrays[name] = array.astype(ml_dtypes.bfloat16)
  save_file(arrays, path / WEIGHTS, metadata={"format": "pt"})
  config = json.loads((path / "config.json").read_text())
  config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
  (path / "config.json").write_text(json.dumps(config))
  return arrays


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """A model of odd widths, and its tensors."""
  path = tmp_path_factory.mktemp("mixed") / "model"
  params = small.random_params(small.CONFIG)
  save.save(small.CONFIG, params, path, say=lambda _: None)
  return path, mix(path)


def assert_same(path, arrays):
  found = load_file(path / WEIGHTS)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype, name
    assert found[name].tobytes() == array.tobytes(), name


def test_convert_keeps_the_mixture(mixed, tmp_path):
  source, arrays = mixed
  convert.convert(str(source), tmp_path / "hf", "hf")
  assert_same(tmp_path / "hf", arrays)
  convert.convert(str(source), tmp_path / "orbax", "orbax")
  convert.convert(str(tmp_path / "orbax"), tmp_path / "back", "hf")
  assert_same(tmp_path / "back", arrays)
  for name in ("hf", "back"):
    raw = json.loads((tmp_path / name / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
  convert.convert(str(source), tmp_path / "u", "hf_uniform")
  kinds = {
    n: str(a.dtype) for n, a in load_file(tmp_path / "u" / WEIGHTS).items()
  }
  assert kinds == {n: str(a.dtype) for n, a in arrays.items()}
  convert.convert(str(source), tmp_path / "one", "hf", dtype="float16")
  found = load_file(tmp_path / "one" / WEIGHTS)
  assert {str(a.dtype) for a in found.values()} == {"float16"}


def test_mixed_files_are_aligned_for_others(mixed, tmp_path):
  """Torch refuses a float32 that begins amid four bytes."""
  torch = pytest.importorskip("torch")
  source, arrays = mixed
  convert.convert(str(source), tmp_path / "hf", "hf")
  with safetensors.safe_open(tmp_path / "hf" / WEIGHTS, "pt") as opened:
    for name, array in arrays.items():
      tensor = opened.get_tensor(name)
      assert torch.equal(tensor.float(), torch.tensor(array.astype(np.float32)))


def test_the_api_saves_as_stored(mixed, tmp_path):
  source, arrays = mixed
  model = api.load(source)
  kinds = {str(x.dtype) for x in jax.tree.leaves(model.params)}
  assert kinds == {"float32"}  # of the arithmetic
  api.save(model, tmp_path / "hf")
  assert_same(tmp_path / "hf", arrays)
  api.save(model, tmp_path / "orbax", "orbax")
  _, again, _ = opening.open_model(str(tmp_path / "orbax"), None)
  assert again["layer_1"]["attn_norm"].dtype == "float32"
  assert again["layer_1"]["q"].dtype == "bfloat16"
  api.save(api.load(tmp_path / "orbax"), tmp_path / "back")
  assert_same(tmp_path / "back", arrays)
  api.save(api.load(source, dtype="float16"), tmp_path / "half")
  found = load_file(tmp_path / "half" / WEIGHTS)
  assert {str(a.dtype) for a in found.values()} == {"float16"}
  # Without a parent, and where a layer is gone.
  alone = api.Model(model.config, model.params)
  api.save(alone, tmp_path / "alone")
  found = load_file(tmp_path / "alone" / WEIGHTS)
  assert {str(a.dtype) for a in found.values()} == {"float32"}
  config = dataclasses.replace(
    model.config, kv_groups=(0, 2, 3), ffn_widths=(0, 40, 17)
  )
  fewer = api.Model(config, {**model.params, "layer_0": {}}, str(source))
  api.save(fewer, tmp_path / "fewer")
  found = load_file(tmp_path / "fewer" / WEIGHTS)
  first = "model.layers.{}.self_attn.q_proj.weight"
  assert np.array_equal(found[first.format(0)], arrays[first.format(1)])
  assert str(found[first.format(0)].dtype) == "bfloat16"


def test_an_index_that_lists_a_tied_matrix(mixed, tmp_path):
  """It opens, and so what comes of it is written."""
  path = shutil.copytree(mixed[0], tmp_path / "model")
  arrays = load_file(path / WEIGHTS)
  del arrays["lm_head.weight"]
  (path / WEIGHTS).unlink()
  shard = "model-00001-of-00001.safetensors"
  save_file(arrays, path / shard, metadata={"format": "pt"})
  index = {"weight_map": dict.fromkeys([*arrays, "lm_head.weight"], shard)}
  (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
  config = json.loads((path / "config.json").read_text())
  config["tie_word_embeddings"] = True
  (path / "config.json").write_text(json.dumps(config))
  api.save(api.load(path), tmp_path / "saved")
  assert_same(tmp_path / "saved", arrays)


def test_layers_that_share_their_weights(mixed, tmp_path):
  """MobileLLM's: each stored one gives two of ours their dtypes."""
  params = small.random_params(small.CONFIG)
  source = tmp_path / "shared"
  save.save(small.CONFIG, params, source, say=lambda _: None)
  arrays = load_file(source / WEIGHTS)
  for name, array in arrays.items():
    if "layers.0." not in name:
      arrays[name] = array.astype(ml_dtypes.bfloat16)
  save_file(arrays, source / WEIGHTS, metadata={"format": "pt"})
  config = json.loads((source / "config.json").read_text())
  config |= {
    "model_type": "mobilellm",
    "architectures": ["MobileLLMForCausalLM"],
    "layer_sharing": True,
  }
  twice = {}
  for layer, sizes in config["per_layer_config"].items():
    twice |= {str(2 * int(layer) + i): sizes for i in range(2)}
  (source / "config.json").write_text(
    json.dumps(config | {"per_layer_config": twice})
  )
  model = api.load(source)
  written = dtypes.for_export(model.config, model.params, source, "")
  kinds = [str(written[f"layer_{i}"]["q"].dtype) for i in range(6)]
  assert kinds == ["float32"] * 2 + ["bfloat16"] * 4


def test_what_slicegpt_adds_is_as_most_of_the_others(mixed):
  sizes = ((16, 12, 10), (10, 9, 11), (11, 8, 7))
  config = dataclasses.replace(small.CONFIG, residual=sizes)
  params = small.random_params(config)
  written = dtypes.for_export(config, params, mixed[0], "")
  kinds = {n: str(x.dtype) for n, x in written["layer_1"].items()}
  assert kinds["attn_norm"] == kinds["mlp_norm"] == "float32"
  assert kinds["attn_shortcut"] == kinds["q"] == kinds["down"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 512], ids=["pruned", "trained"])
def test_a_run_writes_as_stored(small_model, tmp_path, tokens):
  """The result of a bfloat16 model is smaller than it, on the disk too."""
  parent = shutil.copytree(small_model, tmp_path / "parent")
  before = mix(parent)
  settings = recipe(parent, stages=1, tokens=tokens, refit="final")
  assert settings.model.dtype == ""
  summary = run.run(settings, tmp_path / "work")
  after = load_file(tmp_path / "work" / "model" / WEIGHTS)
  assert {n: a.dtype for n, a in after.items()} == {
    n: a.dtype for n, a in before.items()
  }
  old, new = (
    p.stat().st_size
    for p in (parent / WEIGHTS, tmp_path / "work" / "model" / WEIGHTS)
  )
  count = model_config.count_params
  share = count(load.read_config(tmp_path / "work" / "model")) / count(
    load.read_config(parent)
  )
  assert new / old == pytest.approx(share, abs=0.05)
  # The number beside it is that of what was written.
  model = api.load(tmp_path / "work" / "model")
  found = api.perplexity(model, sources.embedded_text("heldout"), seq_len=64)
  assert found == pytest.approx(summary["perplexity_after"], rel=1e-6)


@pytest.mark.slow
def test_a_run_writes_as_asked(small_model, tmp_path):
  settings = recipe(small_model, stages=1, tokens=512)
  settings.model.dtype = "bfloat16"
  run.run(settings, tmp_path / "work")
  after = load_file(tmp_path / "work" / "model" / WEIGHTS)
  assert {str(a.dtype) for a in after.values()} == {"bfloat16"}
