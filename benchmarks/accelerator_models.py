"""Models that accelerators are measured with, before a prune and after."""

import numpy as np

from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope

# Llama-3.2-1B, Qwen3-4B, Llama-3.1-8B, Qwen3-30B-A3B, and one to try the
# scripts with.
MODELS = {
  "1b": {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "queries_per_group": 4,
    "head_dim": 64,
    "kv_groups": (8,) * 16,
    "ffn_widths": (8192,) * 16,
    "tied": True,
  },
  "4b": {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "queries_per_group": 4,
    "head_dim": 128,
    "kv_groups": (8,) * 36,
    "ffn_widths": (9728,) * 36,
    "tied": True,
    "qk_norm": "head",
  },
  "8b": {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "queries_per_group": 4,
    "head_dim": 128,
    "kv_groups": (8,) * 32,
    "ffn_widths": (14336,) * 32,
    "tied": False,
  },
  "30b-a3b": {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "queries_per_group": 8,
    "head_dim": 128,
    "kv_groups": (4,) * 48,
    "ffn_widths": (768,) * 48,
    "tied": False,
    "qk_norm": "head",
    "experts": 128,
    "experts_per_token": 8,
    "router_norm": True,
  },
  "tiny": {
    "vocab_size": 64,
    "hidden_size": 16,
    "queries_per_group": 2,
    "head_dim": 8,
    "kv_groups": (2,),
    "ffn_widths": (24,),
    "tied": True,
  },
}
# Shares of a layer's KV groups and channels that the paper's method has left of
# SmolLM2-135M-Instruct at 20 % (benchmarks/real_model.jsonl).
ADAPT_KV = (1, 1, *(2 / 3,) * 5, *(1,) * 23)
ADAPT_FFN = tuple(
  width / 1536
  for width in (
    *(1536, 1093, 1021, 1017, 1019, 1018, 1019, 1019, 1022, 1019),
    *(1023, 1022, 1015, 1014, 1013, 1016, 1017, 1013, 1020, 1023),
    *(1028, 1024, 1025, 1030, 1087, 1014, 1015, 1026, 1028, 1128),
  )
)


def original(name: str) -> ModelConfig:
  """A model before pruning."""
  return ModelConfig(
    family="llama",
    norm_eps=1e-5,
    rope=Rope(theta=500000.0),
    context=131072,
    **MODELS[name],
  )


def pruned(full: ModelConfig, profile: str = "adapt") -> ModelConfig:
  """A model as a prune leaves it.

  Args:
    full: before it.
    profile: `adapt`, or `random` between half and all of each layer.
  """
  number = full.num_layers
  if profile == "random":
    rng = np.random.default_rng(0)
    shares = [rng.uniform(0.5, 1, number) for _ in "KF"]
  else:
    at = np.linspace(0, len(ADAPT_FFN) - 1, number).round().astype(int)
    shares = [np.array(s)[at] for s in (ADAPT_KV, ADAPT_FFN)]
  units = {
    unit: tuple(max(1, int(n * s)) for n, s in zip(widths, share, strict=True))
    for (unit, widths), share in zip(full.units().items(), shares, strict=True)
  }
  return full.with_units(units)
