"""GGUF files as models: ours, those of others, and damaged ones."""

import dataclasses
import json
import tracemalloc

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax import api, cli
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.formats.gguf import reader, writer
from adapt_pruner_jax.formats.hf import config_json, load
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.rope import Rope, rope_frequencies
from tests import small
from tests.formats.gguf_test import CASES, IDS, LLAMA3, UNEVEN, case, logits_of

# Equal layers whose rows are multiples of 256, as K-quants need them.
WIDE = dataclasses.replace(
  UNEVEN,
  hidden_size=256,
  kv_groups=(2, 2),
  ffn_widths=(256, 256),
  head_dim=64,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_as_the_same_function(name, tmp_path):
  config, params = case(name)
  writer.write(config, params, tmp_path / "model.gguf")
  found, found_params = load.load(tmp_path / "model.gguf")
  got = logits_of(found, found_params, IDS)
  want = logits_of(config, params, IDS)
  np.testing.assert_allclose(got, want, atol=1e-5)
  if "qwen3" not in name:  # whose layers may have been padded
    assert found.kv_groups == config.kv_groups
    assert found.ffn_widths == config.ffn_widths


@pytest.mark.parametrize(
  "kind, dtype", [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")]
)
def test_matrices_stay_as_they_are_stored(kind, dtype, tmp_path):
  """Bit for bit, without a word; vectors are float32 in every file."""
  config, params = case("llama")
  params["embedding"] = params["embedding"].astype(dtype)
  params["layer_1"]["up"] = params["layer_1"]["up"].astype(dtype)
  writer.write(config, params, tmp_path / "model.gguf")
  kinds = {
    name: tensor.tensor_type.name.lower()
    for name, tensor in reader.File(tmp_path / "model.gguf").tensors.items()
  }
  assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == kind
  assert kinds["blk.0.ffn_up.weight"] == "f32"
  _, found = load.load(tmp_path / "model.gguf", dtype=None)
  assert found["embedding"].dtype == found["layer_1"]["up"].dtype == dtype
  np.testing.assert_array_equal(found["embedding"], params["embedding"])


def with_kinds(path, kinds):
  """A LLaMA with the matrices of its layers in these kinds, in turn."""
  params = small.random_params(WIDE)
  made = gguf.GGUFWriter(str(path), "llama")
  planned = writer.tensors(WIDE, params, "llama", "f32")
  writer._write_sizes(made, WIDE, planned[0].kind)
  get = writer.getter(params)
  turn = 0
  for tensor in planned:
    array = writer.contents(tensor, WIDE, get, "llama")
    kind = None
    if tensor.name.startswith("blk.") and array.ndim > 1:
      kind = gguf.GGMLQuantizationType[kinds[turn % len(kinds)]]
      turn += 1
      array = quantized(array, kind)
    made.add_tensor(tensor.name, np.ascontiguousarray(array), raw_dtype=kind)
  made.write_header_to_file()
  made.write_kv_data_to_file()
  made.write_tensors_to_file()
  made.close()


def quantized(array, kind):
  try:
    return gguf.quants.quantize(np.ascontiguousarray(array), kind)
  except NotImplementedError:  # K-quants: any bytes, with small scales
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*array.shape[:-1], array.shape[-1] // block, size)
    made = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    made[..., -4:] = np.array([1e-4, 1e-4], np.float16).view(np.uint8)
    if kind.name != "Q6_K":  # its one scale is at the end, theirs in front
      made[..., :4] = made[..., -4:]
    return made.reshape(*array.shape[:-1], -1)


OLD = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kinds", [OLD, K_QUANTS])
def test_quantized_files_are_what_transformers_reads(kinds, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  with_kinds(tmp_path / "model.gguf", kinds)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="model.gguf", dtype=torch.float32
  )
  with torch.no_grad():
    want = model(torch.tensor([IDS])).logits[0].numpy()
  config, params = load.load(tmp_path / "model.gguf")
  got = logits_of(config, params, IDS)
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_block_of_q6_k_by_hand(tmp_path):
  """Weights are d * scale * (q - 32); all q are 0 here."""
  block = np.zeros(210, np.uint8)
  block[192:208] = np.full(16, 2, np.int8).view(np.uint8)
  block[208:] = np.array([0.5], np.float16).view(np.uint8)
  with_kinds(tmp_path / "model.gguf", ["F32"])
  file = reader.File(tmp_path / "model.gguf")
  name = "blk.0.ffn_up.weight"
  file.tensors[name] = file.tensors[name]._replace(
    tensor_type=gguf.GGMLQuantizationType.Q6_K, data=np.tile(block, (256, 1))
  )
  found = reader.Checkpoint(file, reader.read_config(file))
  array = found.array("model.layers.0.mlp.up_proj.weight")
  np.testing.assert_array_equal(array, np.full((256, 256), -32.0))


def test_a_file_is_a_model_wherever_one_is_named(small_model, tmp_path, capsys):
  """To HuggingFace and back, in Python and on the command line."""
  config, params = load.load(small_model)
  out = tmp_path / "model.gguf"
  convert.convert(str(small_model), out, "gguf")
  assert load.read_config(out).kv_groups == config.kv_groups
  found = api.load(out)
  want = logits_of(config, params, IDS)
  np.testing.assert_allclose(logits_of(*found[:2], IDS), want, atol=1e-5)
  convert.convert(str(out), tmp_path / "hf", "hf")
  again = load.load(tmp_path / "hf")
  np.testing.assert_allclose(logits_of(*again, IDS), want, atol=1e-5)
  text = "It's 12,345 o'clock."
  tokenizers = [load_tokenizer(x) for x in (small_model, tmp_path / "hf")]
  ids = [tokenizer.encode(text) for tokenizer in tokenizers]
  assert ids[0] == ids[1]
  said = []
  for model in (small_model, out):
    command = ["generate", f"--model={model}", "--prompt=Once upon"]
    with pytest.raises(SystemExit) as ended:
      cli.main([*command, "--max_new_tokens=3"])
    assert not ended.value.code
    said.append(capsys.readouterr().out)
  assert said[0] == said[1]


@pytest.mark.parametrize("arch", ["llama", "openelm"])
def test_what_is_made_of_a_file_has_its_dtypes(arch, tmp_path):
  """Also after pruning; openelm has q, k and v in one tensor."""
  changes = {"family": "qwen3", "qk_norm": "head", "tied": True}
  config = UNEVEN
  if arch == "openelm":
    config = dataclasses.replace(UNEVEN, **changes)
  params = small.random_params(config)
  path = tmp_path / "model.gguf"
  writer.write(config, params, path, kind="bf16")
  assert reader.File(path).arch == ("deci" if arch == "llama" else arch)
  model = api.load(path)
  api.save(model, tmp_path / "same")
  cut = dataclasses.replace(
    model.config, ffn_widths=tuple(f - 1 for f in model.config.ffn_widths)
  )
  fewer = small.random_params(cut)
  api.save(model._replace(config=cut, params=fewer), tmp_path / "cut")
  for name in ("same", "cut"):
    _, stored = load.stored(tmp_path / name)
    layer = stored["layer_1"]
    assert {str(layer[n].dtype) for n in ("q", "k", "up")} == {"bfloat16"}
    assert layer["attn_norm"].dtype == "float32"


@pytest.mark.parametrize(
  "rope, head_dim",
  [
    (dataclasses.replace(LLAMA3, factor=32.0, original_context=8192), 64),
    (dataclasses.replace(LLAMA3, factor=8.0, original_context=8192), 128),
    (dataclasses.replace(LLAMA3, original_context=5000), 64),
    (
      dataclasses.replace(
        LLAMA3, original_context=3000, high_freq_factor=2.5, factor=10.0
      ),
      128,
    ),
  ],
)
def test_llama_3_ropes_are_found_by_their_factors(rope, head_dim, tmp_path):
  plain = rope_frequencies(Rope(theta=rope.theta), head_dim)
  factors = plain / rope_frequencies(rope, head_dim)
  found = reader.llama3_rope(rope.theta, factors, head_dim, tmp_path)
  np.testing.assert_allclose(
    rope_frequencies(found, head_dim), rope_frequencies(rope, head_dim), 1e-5
  )


def test_other_factors_are_refused(tmp_path):
  factors = np.array([1, 3, 2, 8], np.float32)
  with pytest.raises(UserError, match="none of LLaMA 3's kind"):
    reader.llama3_rope(1e4, factors, 8, tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  path = tmp_path_factory.mktemp("good") / "good.gguf"
  writer.write(*case("llama"), path)
  return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.5, 0.99])
def test_a_file_that_is_cut_off(share, good, tmp_path):
  (tmp_path / "cut.gguf").write_bytes(good[: int(len(good) * share)])
  with pytest.raises(UserError, match="damaged, cut off") as said:
    load.load(tmp_path / "cut.gguf")
  assert "\n" not in str(said.value)
  assert str(tmp_path / "cut.gguf") in str(said.value)


def rewritten(path, arch="llama", change=lambda made: None, leave="", more=""):
  """A file with other settings, without a tensor, or with one more."""
  config, params = case("equal layers")
  made = gguf.GGUFWriter(str(path), arch)
  planned = writer.tensors(config, params, "llama", "f32")
  writer._write_sizes(made, config, planned[0].kind)
  change(made)
  for tensor in planned:
    array = writer.contents(tensor, config, writer.getter(params), "llama")
    if tensor.name != leave:
      made.add_tensor(tensor.name, np.ascontiguousarray(array))
  if more:
    made.add_tensor(more, np.zeros(4, np.float32))
  made.write_header_to_file()
  made.write_kv_data_to_file()
  made.write_tensors_to_file()
  made.close()


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"arch": "qwen35moe"}, "qwen35moe is not supported.*qwen3"),
    ({"change": lambda m: m.add_uint16("split.count", 3)}, "--merge"),
    ({"change": lambda m: m.add_expert_count(8)}, "ignore_fields=llama.expert"),
    ({"leave": "blk.1.ffn_up.weight"}, "blk.1.ffn_up.weight is missing"),
    ({"leave": "token_embd.weight"}, "token_embd.weight is missing"),
    ({"more": "blk.0.attn_sinks.weight"}, "attn_sinks.weight is not known"),
    (
      {"change": lambda m: m.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
      "rope scaling yarn",
    ),
  ],
)
def test_files_that_cannot_be_opened(changes, said, tmp_path):
  rewritten(tmp_path / "model.gguf", **changes)
  with pytest.raises(UserError, match=said) as error:
    load.load(tmp_path / "model.gguf")
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "cache").rglob("config.json")) or "ignore" in said


def test_a_setting_can_be_ignored_by_name(tmp_path):
  rewritten(
    tmp_path / "model.gguf", change=lambda made: made.add_expert_count(8)
  )
  config, _ = load.load(
    tmp_path / "model.gguf", ignore_fields="llama.expert_count"
  )
  assert config.num_layers == 3


def test_kinds_that_cannot_be_dequantised(tmp_path, good, monkeypatch):
  (tmp_path / "model.gguf").write_bytes(good)

  def refuse(data, kind):
    raise NotImplementedError

  monkeypatch.setattr(gguf.quants, "dequantize", refuse)
  with pytest.raises(UserError, match="F32, which the package gguf cannot"):
    load.load(tmp_path / "model.gguf")


def test_a_changed_file_is_read_anew(tmp_path):
  path = tmp_path / "model.gguf"
  writer.write(*case("llama"), path)
  first = load.resolve(path)
  assert load.resolve(path) == first
  writer.write(*case("tied"), path)
  assert load.read_config(path).tied
  assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_weights_that_float16_cannot_hold(kind, tmp_path):
  config, params = case("equal layers")
  large = params["layer_0"]["up"] * 1e8
  params["layer_0"]["up"] = large.astype(jnp.bfloat16)
  out = tmp_path / "model.gguf"
  with pytest.raises(UserError, match=r"blk.0.ffn_up.*--dtype=bf16"):
    writer.write(config, params, out, kind=kind)
  assert not out.exists()
  writer.write(config, params, out, kind="bf16")
  _, found = load.load(out)
  np.testing.assert_array_equal(
    found["layer_0"]["up"], params["layer_0"]["up"].astype(np.float32)
  )


def test_nan_is_not_written(tmp_path):
  config, params = case("equal layers")
  params["layer_0"]["up"] = params["layer_0"]["up"] * np.nan
  with pytest.raises(UserError, match="NaN"):
    writer.write(config, params, tmp_path / "model.gguf")
  assert not list(tmp_path.glob("*.gguf"))


def test_the_advice_about_windows_works(tmp_path):
  """Also where the field is absent, which means 4096 in Mistral."""
  raw = config_json.write(dataclasses.replace(UNEVEN, family="mistral"))
  raw |= {"sliding_window": 8}
  config = config_json.read(raw)
  params = small.random_params(config)
  with pytest.raises(UserError, match="--ignore_fields=sliding_window"):
    writer.write(config, params, tmp_path / "model.gguf")
  ignoring = config_json.read(raw, "sliding_window")
  assert not ignoring.window
  writer.write(ignoring, params, tmp_path / "model.gguf")


def test_windows_as_long_as_the_context_are_none(tmp_path):
  config = dataclasses.replace(UNEVEN, family="mistral", window=(64, 64, 64))
  writer.write(config, small.random_params(config), tmp_path / "model.gguf")
  assert (tmp_path / "model.gguf").is_file()


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
  config = dataclasses.replace(
    UNEVEN,
    hidden_size=128,
    kv_groups=(2, 1) * 8,
    ffn_widths=(2048,) * 16,
    tied=True,
  )
  rng = np.random.default_rng(0)
  params = {}
  for layer in (None, *range(config.num_layers)):
    tree = params if layer is None else params.setdefault(f"layer_{layer}", {})
    names = writer.layout.tensors(config, "deci")
    for part in (p for _, parts in names for p in parts if p.layer == layer):
      shape = axes.shape(part.name, config.sizes(layer))
      tree[part.name] = rng.normal(size=shape).astype(np.float32)
  tracemalloc.start()
  writer.write(config, params, tmp_path / "model.gguf", kind="q8_0")
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  largest = 2048 * 128 * 4
  # Rounding to q8_0 takes several copies of it; there are 48 such tensors.
  assert peak < 14 * largest


def test_the_directory_is_of_plain_files(small_model, tmp_path):
  """Without the link to the weights, it is what the tokenizer needs."""
  convert.convert(str(small_model), tmp_path / "model.gguf", "gguf")
  folder = load.resolve(tmp_path / "model.gguf")
  names = {file.name for file in folder.iterdir()}
  assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
  assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_a_cache_that_cannot_be_written(good, tmp_path, monkeypatch):
  (tmp_path / "model.gguf").write_bytes(good)
  (tmp_path / "cache").write_text("a file")
  with pytest.raises(UserError, match="set ADAPT_PRUNER_CACHE"):
    load.resolve(tmp_path / "model.gguf")
  monkeypatch.delenv("ADAPT_PRUNER_CACHE")

  def homeless():
    raise RuntimeError

  monkeypatch.setattr("pathlib.Path.home", homeless)
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  assert tmp_path in load.resolve(tmp_path / "model.gguf").parents
