"""Opening HuggingFace directories: real models, meshes, and all bad input."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load, save, tensors
from adapt_pruner_jax.models import decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope

CONFIG = ModelConfig(
  family="llama",
  vocab_size=24,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(2, 2),
  ffn_widths=(12, 12),
  norm_eps=1e-5,
  rope=Rope(),
  context=32,
  tied=False,
)


UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A model and its directory."""
  path = tmp_path_factory.mktemp("load") / "model"
  params = decoder.init_params(CONFIG, jax.random.key(0))
  save.save(CONFIG, params, path, say=lambda _: None)
  return path, params


@pytest.fixture
def broken(written, tmp_path):
  """A copy to break."""
  path = tmp_path / "model"
  shutil.copytree(written[0], path)
  return path


def refusal(path, **options):
  with pytest.raises(UserError) as caught:
    load.load(path, **options)
  text = str(caught.value)
  assert "\n" not in text
  return text


def same(one, two):
  return jax.tree.all(jax.tree.map(np.array_equal, one, two))


def change_tensors(path, change):
  """Rewrites the weights after `change(dict of arrays)`."""
  file = path / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  change(arrays)
  safetensors.numpy.save_file(arrays, file)


@pytest.mark.parametrize(
  "name", ["stories260K", "babyllama-char105-930K", "babyllama-char361-960K"]
)
def test_real_models(shared_data, name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  path = shared_data / "models" / name
  config, params = load.load(path)
  tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, 48))
  peer = transformers.AutoModelForCausalLM.from_pretrained(path)
  with torch.no_grad():
    expected = peer(torch.tensor(tokens)).logits.numpy()
  found = decoder.Decoder(config).apply({"params": params}, tokens)[0]
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_mesh(written, shape):
  """Each device gets its part, whatever is cut: D, whole heads, or less."""
  path, params = written
  mesh = sharding.make_mesh(*shape)
  config, found = load.load(path, mesh=mesh)
  assert config == CONFIG
  placed = sharding.param_shardings(params, mesh)
  for array, where in zip(
    jax.tree.leaves(found), jax.tree.leaves(placed), strict=True
  ):
    assert array.sharding == where
  assert same(found, params)


@pytest.mark.parametrize("odd", range(8))
def test_loaded_parameters_are_no_longer_in_the_file(written, broken, odd):
  """However the data is aligned in it, which the format leaves open."""
  file = broken / "model.safetensors"
  content = file.read_bytes()
  size = int.from_bytes(content[:8], "little")
  head = (size + odd).to_bytes(8, "little") + content[8 : 8 + size] + b" " * odd
  file.write_bytes(head + content[8 + size :])
  _, params = load.load(broken)
  with open(file, "r+b") as opened:  # in place: a map of it would change
    opened.seek(len(head))
    opened.write(bytes(len(content) - 8 - size))
  assert same(params, written[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(written, tmp_path, dtype):
  path, params = written
  _, found = load.load(path, dtype)
  expected = jax.tree.map(lambda x: x.astype(dtype), params)
  assert same(found, expected)
  assert found["layer_0"]["q"].dtype == dtype
  save.save(CONFIG, expected, tmp_path / "half", say=lambda _: None)
  _, stored = load.load(tmp_path / "half", None)
  assert stored["layer_0"]["q"].dtype == dtype
  assert same(stored, expected)
  raw = json.loads((tmp_path / "half" / "config.json").read_text())
  assert raw["torch_dtype"] == raw["dtype"] == dtype


def test_layouts():
  """Rows of q are ordered by KV group, query head, channel."""
  sizes = {"D": 3, "K": 2, "G": 2, "H": 5, "M": 3}
  rows = np.arange(2 * 2 * 5)[:, None] * 100 + np.arange(3)
  q_DKGH = tensors.from_hf("q", rows, sizes)
  assert q_DKGH[2, 1, 0, 4] == (1 * 10 + 0 * 5 + 4) * 100 + 2
  o_KGHM = tensors.from_hf("o", rows.T, sizes)
  assert o_KGHM[1, 0, 4, 2] == (1 * 10 + 0 * 5 + 4) * 100 + 2
  for name, array in [("q", q_DKGH), ("o", o_KGHM)]:
    back = tensors.to_hf(name, array)
    np.testing.assert_array_equal(back, rows if name == "q" else rows.T)


def test_phi3_rows_are_one_below_the_other():
  config = dataclasses.replace(CONFIG, family="phi3")
  places = tensors.places(config)
  q, k, v = (places[0, name] for name in "qkv")
  assert q.tensor == k.tensor == "model.layers.0.self_attn.qkv_proj.weight"
  assert (q.start, k.start, v.start) == (0, 16, 24)
  assert places[1, "up"].start == 12
  assert tensors.tensor_shapes(config)[q.tensor] == (32, 16)


def test_tied_twice(written, broken):
  """A tied matrix may be stored twice, but not differently."""
  path = broken
  raw = json.loads((path / "config.json").read_text())
  raw["tie_word_embeddings"] = True
  (path / "config.json").write_text(json.dumps(raw))
  text = refusal(path)
  assert "lm_head.weight" in text
  assert "tie_word_embeddings" in text
  # The remedy that it names, and what Transformers makes of the file.
  assert 'set "tie_word_embeddings": false' in text
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  peer = transformers.AutoModelForCausalLM.from_pretrained(path)
  ids = np.arange(12)[None]
  with torch.no_grad():
    expected = peer(torch.tensor(ids)).logits.numpy()
  (path / "config.json").write_text(json.dumps({**raw, **UNTIED}))
  config, params = load.load(path)
  found = decoder.Decoder(config).apply({"params": params}, ids)[0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  (path / "config.json").write_text(json.dumps(raw))

  def tie(arrays):
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

  change_tensors(path, tie)
  config, params = load.load(path)
  assert config.tied
  assert "lm_head" not in params


def test_an_index_that_lists_a_tied_matrix(broken):
  """As some published ones do, though no file has it."""
  raw = json.loads((broken / "config.json").read_text())
  change_tensors(broken, lambda a: a.pop("lm_head.weight"))
  names = safetensors.numpy.load_file(broken / "model.safetensors").keys()
  shard = "model-00001-of-00001.safetensors"
  (broken / "model.safetensors").rename(broken / shard)
  index = {"weight_map": dict.fromkeys([*names, "lm_head.weight"], shard)}
  (broken / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "lm_head.weight is missing" in refusal(broken)
  raw["tie_word_embeddings"] = True
  (broken / "config.json").write_text(json.dumps(raw))
  config, _ = load.load(broken)
  assert config.tied


def test_shards_without_an_index(written, tmp_path):
  path = tmp_path / "sharded"
  _, params = written
  save.save(CONFIG, params, path, shard_bytes=2000, say=lambda _: None)
  (path / "model.safetensors.index.json").unlink()
  _, found = load.load(path)
  assert same(found, params)
  files = sorted(path.glob("*.safetensors"))
  files[1].unlink()
  text = refusal(path)
  assert files[0].name in text
  assert f"of {len(files)} shards not number 2" in text
  for file in files[:1] + files[2:]:
    file.rename(path / file.name.replace(f"{len(files):05}", "00002"))
  assert "of 2 shards" in refusal(path)


def test_left_over_buffers_are_ignored(broken, written):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  change_tensors(broken, lambda a: a.update({name: np.ones(2, np.float32)}))
  _, params = load.load(broken)
  assert same(params, written[1])


def test_masks_in_files_of_pythia(animals, broken, tmp_path):
  """As its published files have them; they mean something nowhere else."""
  whole = animals["gpt_neox"].path
  path = shutil.copytree(whole, tmp_path / "pythia")
  name = "gpt_neox.layers.0.attention."
  masks = {
    f"{name}bias": np.tril(np.ones((1, 1, 64, 64), bool)),
    f"{name}masked_bias": np.array(-1e9, np.float32),
    f"{name}rotary_emb.inv_freq": np.ones(2, np.float32),
  }
  change_tensors(path, lambda a: a.update(masks))
  assert same(load.load(path)[1], load.load(whole)[1])
  name = "model.layers.0.attention.bias"
  change_tensors(broken, lambda a: a.update({name: masks.popitem()[1]}))
  assert f"{name} is unexpected" in refusal(broken)
  change_tensors(broken, lambda a: a.update({name: np.ones(2, bool)}))
  assert f"{name} is stored as BOOL" in refusal(broken)


@pytest.mark.parametrize(
  "change, words",
  [
    (
      lambda a: a.pop("model.layers.1.mlp.up_proj.weight"),
      "model.layers.1.mlp.up_proj.weight is missing",
    ),
    (
      lambda a: a.update({"model.layers.7.x.weight": np.ones(3, np.float32)}),
      "model.layers.7.x.weight is unexpected",
    ),
    (
      lambda a: a.update({"model.norm.weight": np.ones(3, np.float32)}),
      "model.norm.weight has shape [3], expected [16]",
    ),
    (
      lambda a: a.update({"model.norm.weight": np.ones(16, np.int8)}),
      "model.norm.weight is stored as I8",
    ),
  ],
)
def test_wrong_tensors(broken, change, words):
  change_tensors(broken, change)
  assert words in refusal(broken)


def test_damaged_files(broken):
  file = broken / "model.safetensors"
  whole = file.read_bytes()
  for damaged in (whole[:-4], whole[:20], b"", b"\xff" * 100):
    file.write_bytes(damaged)
    text = refusal(broken)
    assert str(file) in text
    assert "truncated or damaged" in text


def test_missing_weights(broken, tmp_path):
  (broken / "model.safetensors").unlink()
  assert "has no weights: no model.safetensors" in refusal(broken)
  (broken / "pytorch_model.bin").write_bytes(b"not read")
  text = refusal(broken)
  assert "pytorch_model.bin" in text
  assert "save_pretrained" in text


def test_index(written, tmp_path):
  path = tmp_path / "sharded"
  _, params = written
  save.save(CONFIG, params, path, shard_bytes=2000, say=lambda _: None)
  _, found = load.load(path)
  assert same(found, params)
  index_file = path / "model.safetensors.index.json"
  index = json.loads(index_file.read_text())
  files = sorted({*index["weight_map"].values()})
  assert len(files) > 3
  sizes = [(path / f).stat().st_size for f in files]
  assert all(size < 2000 + 1500 for size in sizes)  # and a header

  def with_map(**changes):
    changed = index["weight_map"] | changes
    index_file.write_text(json.dumps({"weight_map": changed}))
    return refusal(path)

  shutil.copyfile(path / files[0], tmp_path / "outside.safetensors")
  for outside in ("../outside.safetensors", str(tmp_path / "outside"), 7):
    text = with_map(**{"lm_head.weight": outside})
    assert "is not the name of a file in the folder" in text
  assert "gone.safetensors is missing" in with_map(x="gone.safetensors")
  assert "has no tensor y" in with_map(y=files[0])
  for content in ("{}", '{"weight_map": []}'):
    index_file.write_text(content)
    assert "has no weight_map" in refusal(path)


def test_bad_config_files(broken):
  file = broken / "config.json"
  for content, words in [
    ("{", "is damaged, it is not JSON"),
    ("[]", "must hold a JSON object"),
    ('{"model_type": "t5"}', "model_type t5 is not supported"),
  ]:
    file.write_text(content)
    assert words in refusal(broken)
  file.unlink()
  assert "has no config.json" in refusal(broken)


def test_config_without_weights(broken):
  (broken / "model.safetensors").unlink()
  assert load.read_config(broken) == CONFIG
