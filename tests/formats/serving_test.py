"""Exports in vLLM and MLX, each of which needs an environment of its own.

VLLM_PYTHON and MLX_PYTHON name their interpreters (see docs/formats.md).
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.rope import Rope
from tests import small

HERE = Path(__file__).parent
# Smaller heads than of 32 are more than vLLM's attention on a CPU can do.
LLAMA = model_config.ModelConfig(
  family="llama",
  vocab_size=64,
  hidden_size=256,
  queries_per_group=2,
  head_dim=32,
  kv_groups=(4, 1, 2),
  ffn_widths=(96, 40, 64),
  norm_eps=1e-5,
  rope=Rope(),
  context=64,
  tied=False,
)
FAMILIES = {
  "llama": {},
  "qwen2": {"qkv_bias": True, "tied": True},
  "qwen3": {"qk_norm": "head", "tied": True},
}
NEW = 8


@pytest.mark.slow
@pytest.mark.parametrize(
  "runtime, family, format, runs_as",
  [
    ("vllm", "llama", "hf", "TransformersForCausalLM"),
    ("vllm", "qwen2", "hf", "TransformersForCausalLM"),
    ("vllm", "qwen3", "hf", "TransformersForCausalLM"),
    ("vllm", "llama", "hf_uniform", "LlamaForCausalLM"),
    ("mlx", "llama", "hf_uniform", "mlx_lm.models.llama"),
    ("mlx", "qwen2", "hf_uniform", "mlx_lm.models.qwen2"),
    ("mlx", "qwen3", "hf_uniform", "mlx_lm.models.qwen3"),
  ],
)
def test_computes_the_same(runtime, family, format, runs_as, tmp_path):
  variable = f"{runtime.upper()}_PYTHON"
  python = os.environ.get(variable)
  if not python:
    pytest.skip(f"{variable} is not set (see docs/formats.md)")
  config = dataclasses.replace(LLAMA, family=family, **FAMILIES[family])
  params = small.random_params(config)
  path, tokens = tmp_path / f"{family}-{format}", tmp_path / "tokens.npy"
  save.save(config, params, path, format=format, say=lambda _: None)
  ids = np.random.default_rng(0).integers(config.vocab_size, size=40)
  np.save(tokens, ids)
  peer = HERE / f"{runtime}_peer.py"
  done = subprocess.run(
    [python, str(peer), str(path), str(tokens), str(NEW)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["class"] == runs_as
  want, _ = jax.jit(decoder.Decoder(config).apply)(
    {"params": params}, ids[None]
  )
  largest = np.abs(want).max()
  assert largest > 0.5
  np.testing.assert_allclose(found["logits"], want[0], atol=1e-4 * largest)
  (greedy,) = generate.generate(config, params, [ids.tolist()], NEW, eos_ids=())
  assert found["greedy"] == greedy
