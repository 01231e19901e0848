"""GGUF files, read back and, where llama.cpp is installed, run by it."""

import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.runs import tiny_model
from tests import small

UNEVEN = ModelConfig(
  family="llama",
  vocab_size=64,
  hidden_size=32,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(2, 1, 2),
  ffn_widths=(32, 64, 40),
  norm_eps=1e-5,
  rope=Rope(),
  context=64,
  tied=False,
)
LLAMA3 = Rope(
  theta=5e5,
  kind="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_context=16,
)
CASES = {
  "llama": {},
  "smallest layer first": {"kv_groups": (1, 2, 2), "ffn_widths": (32, 64, 40)},
  "tied": {"tied": True},
  "equal layers": {"kv_groups": (2, 2, 2), "ffn_widths": (48, 48, 48)},
  "llama3 rope": {"rope": LLAMA3},
  "linear rope": {"rope": Rope(kind="linear", factor=4.0)},
  "mobilellm": {"family": "mobilellm", "tied": True},
  "mistral": {"family": "mistral"},
  "qwen2": {"family": "qwen2", "qkv_bias": True},
  "qwen2 tied": {"family": "qwen2", "qkv_bias": True, "tied": True},
  "qwen3 tied": {"family": "qwen3", "qk_norm": "head", "tied": True},
  "qwen3": {"family": "qwen3", "qk_norm": "head"},
  "qwen3 tied, attention gone": {
    "family": "qwen3",
    "qk_norm": "head",
    "tied": True,
    "kv_groups": (2, 0, 1),
  },
  "all biases": {
    "qkv_bias": True,
    "o_bias": True,
    "gate_up_bias": True,
    "down_bias": True,
  },
  "FLAP's biases": {"o_bias": True, "down_bias": True},
}
IDS = [1, 5, 9, 33, 2, 17, 60, 8, 40, 3]


def case(name):
  config = dataclasses.replace(UNEVEN, **CASES[name])
  return config, small.random_params(config)


def logits_of(config, params, ids):
  found, _ = decoder.Decoder(config).apply({"params": params}, np.array([ids]))
  return np.asarray(found[0])


def llama_logits(path, ids):
  llama_cpp = pytest.importorskip(
    "llama_cpp",
    reason="llama-cpp-python is not installed (see docs/formats.md)",
  )
  llama = llama_cpp.Llama(
    str(path),
    n_ctx=64,
    logits_all=True,
    verbose=False,
    type_k=llama_cpp.GGML_TYPE_F32,
    type_v=llama_cpp.GGML_TYPE_F32,
    n_threads=1,
  )
  llama.eval(ids)
  return np.array(llama.scores[: len(ids)])


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name, tmp_path):
  config, params = case(name)
  writer.write(config, params, tmp_path / "model.gguf")
  got = llama_logits(tmp_path / "model.gguf", IDS)
  want = logits_of(config, params, IDS)
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_files_compute_nearly_the_same(kind, tmp_path):
  config, params = case("llama")
  writer.write(config, params, tmp_path / "full.gguf")
  writer.write(config, params, tmp_path / "model.gguf", kind=kind)
  full, smaller = (
    (tmp_path / n).stat().st_size for n in ("full.gguf", "model.gguf")
  )
  assert smaller < full
  want = logits_of(config, params, IDS)
  got = llama_logits(tmp_path / "model.gguf", IDS)
  assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_layers_that_are_gone_are_left_out(tmp_path):
  config = dataclasses.replace(
    UNEVEN, kv_groups=(2, 0, 1), ffn_widths=(32, 0, 64)
  )
  params = small.random_params(config)
  writer.write(config, params, tmp_path / "model.gguf")
  got = llama_logits(tmp_path / "model.gguf", IDS)
  np.testing.assert_allclose(got, logits_of(config, params, IDS), atol=1e-4)


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"family": "gemma2"}, "hf_uniform"),
    ({"residual": ((32, 32, 32),) * 3}, "only orbax"),
    ({"window": (8, 8, 8), "family": "mistral"}, "sliding windows"),
    ({"rope": Rope(partial=0.5)}, "a part of each head"),
    ({"rope": Rope(kind="yarn", factor=2.0)}, "of the kind yarn"),
    ({"family": "smollm3", "nope": (0, 1, 0)}, "the family smollm3"),
    (
      {"rope": Rope(partial=0.5), "family": "qwen3", "qk_norm": "head"},
      "a part of each head",
    ),
    ({"kv_groups": (2, 0, 1)}, "without attention"),
    (
      {
        "family": "qwen3",
        "qk_norm": "head",
        "tied": True,
        "o_bias": True,
        "down_bias": True,
      },
      "--format=hf",
    ),
  ],
)
def test_what_llama_cpp_cannot_express_is_refused(changes, said, tmp_path):
  config = dataclasses.replace(UNEVEN, **changes)
  with pytest.raises(UserError, match=said):
    writer.write(config, {}, tmp_path / "model.gguf")
  assert not list(tmp_path.iterdir())


def test_tokenizer_of_the_tiny_model(tmp_path):
  tokenizer = tiny_model.train_tokenizer(tmp_path / "tokenizer", 300)
  config = dataclasses.replace(UNEVEN, vocab_size=320, bos_id=0, eos_ids=(0,))
  writer.write(
    config,
    small.random_params(config),
    tmp_path / "model.gguf",
    source=tmp_path / "tokenizer",
  )
  assert_tokenises_alike(tmp_path / "model.gguf", tokenizer)


PROBES = (
  "Once upon a time",
  "It's 12,345 o'clock.\n\n  Two  spaces",
  "naïve café 中文 🙂",
)


def assert_tokenises_alike(path, tokenizer):
  llama_cpp = pytest.importorskip("llama_cpp")
  llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
  for text in PROBES:
    got = llama.tokenize(text.encode(), add_bos=True, special=False)
    assert got == tokenizer.encode(text), text


def test_a_story_told_by_llama_cpp(shared_data, tmp_path):
  """The real model, pruned by 30 %, says the same in both."""
  folder = shared_data / "models" / "stories260K"
  config, params = load.load(str(folder))
  keep = {
    "K": tuple(np.arange(k) for k in (4, 3, 4, 2, 3)),
    "F": tuple(np.arange(f) for f in (172, 96, 100, 110, 128)),
  }
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  config, params = surgery.gather(config, params, keep, mesh)
  writer.write(config, params, tmp_path / "model.gguf", source=folder)
  tokenizer = load_tokenizer(folder)
  assert_tokenises_alike(tmp_path / "model.gguf", tokenizer)
  prompt = tokenizer.encode("Once upon a time")
  (want,) = generate.generate(config, params, [prompt], 40, eos_ids=())
  llama_cpp = pytest.importorskip("llama_cpp")
  llama = llama_cpp.Llama(
    str(tmp_path / "model.gguf"),
    n_ctx=128,
    verbose=False,
    type_k=llama_cpp.GGML_TYPE_F32,
    type_v=llama_cpp.GGML_TYPE_F32,
    n_threads=1,
  )
  told = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
  assert [next(told) for _ in range(40)] == want
