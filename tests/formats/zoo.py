"""Tiny random models of every family, made by Transformers."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.models import axes, model_config

BASE = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "initializer_range": 0.2,
  "max_position_embeddings": 64,
  "pad_token_id": None,
  "bos_token_id": 1,
  "eos_token_id": [2, 3],
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 5e5,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e6,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "mscale": 1.0,
  "mscale_all_dim": 0.7,
  "beta_fast": 4.0,
}
# Rows of 40 tokens are beyond the original context.
LONGROPE = {
  "rope_type": "longrope",
  "rope_theta": 1e4,
  "partial_rotary_factor": 0.75,
  "short_factor": [1.0, 1.1, 1.3],
  "long_factor": [1.5, 3.0, 6.0],
  "original_max_position_embeddings": 24,
}
HALF_TURNS = {
  "rope_type": "default",
  "rope_theta": 1e4,
  "partial_rotary_factor": 0.5,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
GEMMA4 = {
  "head_dim": 8,
  "global_head_dim": 16,
  "num_global_key_value_heads": 2,
  "attention_k_eq_v": True,
  "sliding_window": 8,
  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
  "final_logit_softcapping": 3.0,
  "hidden_size_per_layer_input": 0,
}
# As E2B and E4B: the last layers of either kind use keys and values of others.
GEMMA4_E = {
  **GEMMA4,
  "attention_k_eq_v": False,
  "num_hidden_layers": 5,
  "layer_types": [*GEMMA4["layer_types"], *GEMMA4["layer_types"][1:]],
  "hidden_size_per_layer_input": 6,
  "vocab_size_per_layer_input": BASE["vocab_size"],
  "num_kv_shared_layers": 2,
  "use_double_wide_mlp": True,
}
UNEVEN = {"K": (4, 1, 2), "F": (24, 17, 5)}
HOLES = {"K": (0, 4, 1), "F": (24, 0, 7)}  # the first layer has no attention
# name: (model_type, what differs from BASE). Sequences are longer than windows.
CASES = {
  "llama": ("llama", {"num_key_value_heads": 8, "eos_token_id": 2}),
  "llama_bias": (
    "llama",
    {
      "attention_bias": True,
      "mlp_bias": True,
      "head_dim": 16,
      "tie_word_embeddings": True,
    },
  ),
  "llama3": ("llama", {"rope_parameters": LLAMA3}),
  "llama_linear": (
    "llama",
    {
      "rope_parameters": {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 1e4,
      }
    },
  ),
  "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
  "ministral": (
    "ministral",
    {"sliding_window": 8, "layer_types": KINDS, "head_dim": 16},
  ),
  "qwen2": ("qwen2", {"tie_word_embeddings": True}),
  "qwen2_window": (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
  ),
  "qwen3": ("qwen3", {"head_dim": 16}),
  "qwen3_5_text": (
    "qwen3_5_text",
    {
      "head_dim": 16,
      "initializer_range": 0.12,
      "attention_bias": True,
      "layer_types": ["linear_attention", "full_attention", "linear_attention"],
      "linear_key_head_dim": 8,
      "linear_value_head_dim": 12,
      "linear_num_key_heads": 4,
      "linear_num_value_heads": 8,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
      },
    },
  ),
  "qwen3_5_moe_text": (
    "qwen3_5_moe_text",
    {
      "head_dim": 16,
      "initializer_range": 0.12,
      "layer_types": ["linear_attention", "full_attention", "linear_attention"],
      "linear_key_head_dim": 8,
      "linear_value_head_dim": 12,
      "linear_num_key_heads": 4,
      "linear_num_value_heads": 8,
      "moe_intermediate_size": 24,
      "shared_expert_intermediate_size": 12,
      "num_experts": 4,
      "num_experts_per_tok": 2,
    },
  ),
  "exaone4": ("exaone4", {"sliding_window": 8, "layer_types": KINDS}),
  "glm": ("glm", {"head_dim": 16}),
  "glm4": ("glm4", {"head_dim": 16}),
  "hunyuan_v1_dense": (
    "hunyuan_v1_dense",
    {
      "head_dim": 16,
      "attention_bias": True,
      "rope_parameters": {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "alpha": 50.0,
        "factor": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
      },
    },
  ),
  "helium": ("helium", {"head_dim": 4, "attention_bias": True}),
  "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
  "gemma2": (
    "gemma2",
    {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma3_text": (
    "gemma3_text",
    {
      **GEMMA,
      "layer_types": KINDS,
      "attn_logit_softcapping": 2.0,  # passed over
      "final_logit_softcapping": 3.0,
      "rope_parameters": {
        "full_attention": {
          "rope_type": "linear",
          "factor": 8.0,
          "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
  ),
  "gemma4_text": ("gemma4_text", GEMMA4),
  "gemma4_e_text": ("gemma4_text", GEMMA4_E),
  "gemma4_moe_text": (
    "gemma4_text",
    {
      **GEMMA4,
      "attention_k_eq_v": False,
      "enable_moe_block": True,
      "intermediate_size": 12,
      "moe_intermediate_size": 24,
      "num_experts": 4,
      "top_k_experts": 2,
    },
  ),
  "phi3": ("phi3", {"sliding_window": 8}),
  "phi3_longrope": (
    "phi3",
    {
      "num_attention_heads": 4,
      "num_key_value_heads": 4,
      "original_max_position_embeddings": 24,
      "rope_parameters": LONGROPE,
      "tie_word_embeddings": True,
    },
  ),
  "olmo2": ("olmo2", {}),
  "olmo3": (
    "olmo3",
    {
      "sliding_window": 8,
      "layer_types": KINDS,
      "rope_parameters": {
        "full_attention": YARN,
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
      },
    },
  ),
  "smollm3": (
    "smollm3",
    {
      "no_rope_layers": [1, 0, 1],
      "use_sliding_window": True,
      "sliding_window": 8,
      "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "attention_bias": True,
    },
  ),
  "ministral3": (
    "ministral3",
    {
      "head_dim": 16,
      "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5},
      "tie_word_embeddings": True,
    },
  ),
  "granite": (
    "granite",
    {
      "attention_multiplier": 0.3,
      "embedding_multiplier": 3.0,
      "residual_multiplier": 0.4,
      "logits_scaling": 0.7,
      "mlp_bias": True,
    },
  ),
  "gpt_neox": (
    "gpt_neox",
    {
      "num_attention_heads": 4,
      "num_key_value_heads": 4,
      "rope_parameters": HALF_TURNS,
    },
  ),
  "arcee": ("arcee", {"mlp_bias": True}),
  "nemotron": ("nemotron", {"attention_bias": True}),
  "seed_oss": ("seed_oss", {"head_dim": 16}),
  "starcoder2": ("starcoder2", {"sliding_window": 8}),
  "cohere": ("cohere", {"logit_scale": 0.5, "attention_bias": True}),
  "cohere2": (
    "cohere2",
    {"logit_scale": 1.5, "sliding_window": 8, "layer_types": KINDS},
  ),
  "stablelm": (
    "stablelm",
    {"use_qkv_bias": True, "rope_parameters": HALF_TURNS},
  ),
  "stablelm_parallel": (
    "stablelm",
    {"use_parallel_residual": True, "rope_parameters": HALF_TURNS},
  ),
  "phi": ("phi", {"rope_parameters": HALF_TURNS}),
  "apertus": (
    "apertus",
    {"attention_bias": True, "rope_parameters": LLAMA3},
  ),
  "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
  "granitemoe": (
    "granitemoe",
    {
      "attention_multiplier": 0.3,
      "embedding_multiplier": 3.0,
      "residual_multiplier": 0.4,
      "logits_scaling": 0.7,
      "num_local_experts": 5,
      "num_experts_per_tok": 2,
      "output_router_logits": True,
    },
  ),
  "gpt_oss": (
    "gpt_oss",
    {
      "head_dim": 16,
      "num_local_experts": 5,
      "num_experts_per_tok": 2,
      "sliding_window": 8,
      "layer_types": KINDS,
      "swiglu_limit": 0.7,
      "swiglu_alpha": 1.3,
      "rope_parameters": {**YARN, "truncate": False},
    },
  ),
  "olmoe": (
    "olmoe",
    {"num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True},
  ),
  "qwen3_moe": (
    "qwen3_moe",
    {
      "head_dim": 16,
      "moe_intermediate_size": 24,
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "norm_topk_prob": True,
    },
  ),
  "granitemoehybrid": (
    "granitemoehybrid",
    {
      "attention_multiplier": 0.3,
      "embedding_multiplier": 3.0,
      "residual_multiplier": 0.4,
      "logits_scaling": 0.7,
      "shared_intermediate_size": 24,
      "num_local_experts": 0,
      "layer_types": ["full_attention"] * 3,
      "position_embedding_type": "rope",
      "mamba_n_heads": 1,
    },
  ),
}
# Exports of these are opened by Transformers 5 alone.
SINCE_5 = ("ernie4_5", "granitemoehybrid", "ministral3", "olmo3", "smollm3")
SINCE_5 += ("phi3_longrope", "gpt_neox", "seed_oss", "arcee", "nemotron")
SINCE_5 += ("starcoder2", "qwen3_5_text", "exaone4", "glm", "helium")
SINCE_5 += ("hunyuan_v1_dense", "granitemoe", "olmoe", "qwen3_moe")
SINCE_5 += ("cohere", "cohere2", "stablelm", "stablelm_parallel", "phi")
SINCE_5 += ("apertus", "gpt_oss", "qwen3_5_moe_text", "ministral")
SINCE_5 += ("gemma4_text", "gemma4_e_text", "gemma4_moe_text")
# Of other numbers of layers, where those that share have to be whole.
OWN_UNEVEN = {"gemma4_e_text": {"K": (1, 4, 4, 4, 4), "F": (24, 17, 5, 40, 9)}}
OWN_HOLES = {"gemma4_e_text": {"K": (0, 4, 4, 4, 4), "F": (24, 0, 7, 40, 0)}}


def slow_if(name: str, slow: Collection[str]) -> object:
  """A parameter of a test that is among the slow ones."""
  return pytest.param(name, marks=pytest.mark.slow) if name in slow else name


@dataclasses.dataclass(frozen=True)
class Animal:
  """A model on disk, and what Transformers computes with it."""

  path: Path
  tokens_BT: np.ndarray
  logits_BTV: np.ndarray


class Zoo(dict):
  """The animals by the names of `CASES`, each written when it is asked for."""

  def __init__(self, root: Path):
    """Takes the directory below which they are written."""
    super().__init__()
    self.root = root

  def __missing__(self, name: str) -> Animal:
    return self.setdefault(name, write(self.root / name, name))


def peer_config(name: str) -> object:
  """The configuration of a case."""
  import transformers

  kind, changes = CASES[name]
  return transformers.AutoConfig.for_model(kind, **{**BASE, **changes})


def make(root: Path, names: Collection[str]) -> dict[str, Animal]:
  """Writes cases below `root`."""
  return {name: write(root / name, name) for name in names}


def write(path: Path, name: str) -> Animal:
  """Writes the model of a case to `path`."""
  import torch
  import transformers

  torch.manual_seed(0)
  tokens = np.random.default_rng(0).integers(BASE["vocab_size"], size=(2, 40))
  peer = transformers.AutoModelForCausalLM.from_config(
    peer_config(name), attn_implementation="eager"
  ).eval()
  for of, param in peer.named_parameters():
    # Norms and biases, which start as ones and zeros.
    if param.ndim == 1 or of.endswith("bias"):
      torch.nn.init.normal_(param, 0.3, 0.3)
  for of, buffer in peer.named_buffers():
    if of.endswith("layer_scalar"):  # starts as one
      torch.nn.init.uniform_(buffer, 0.5, 1.5)
  peer.save_pretrained(path)
  with torch.no_grad():
    logits = peer(torch.tensor(tokens)).logits.numpy()
  return Animal(path, tokens, logits)


def rewrite_config(path: Path, **changes: object) -> None:
  """Changes fields of a config.json; `...` deletes one."""
  file = path / "config.json"
  raw = json.loads(file.read_text()) | changes
  raw = {name: value for name, value in raw.items() if value is not ...}
  file.write_text(json.dumps(raw))


def cut(config, params, K, F):
  """The model with the first K groups and F channels of each layer."""
  new = dataclasses.replace(config, kv_groups=K, ffn_widths=F)

  def one(name, layer, x):
    if layer is None:
      return x
    indices = {"K": np.arange(K[layer]), "F": np.arange(F[layer])}
    if config.experts:
      indices["F"] = np.tile(indices["F"], (config.experts, 1))
    return axes.take(name, x, indices)

  params = axes.map_named(one, params)
  for i in range(new.num_layers):
    tree, names = params[axes.layer_name(i)], model_config.layer_names(new, i)
    params[axes.layer_name(i)] = {n: tree[n] for n in names}
  return new, params


def with_output_biases(config, params):
  """As FLAP leaves it."""
  rng = np.random.default_rng(0)
  for i in range(config.num_layers):
    for name in ("o_bias", "down_bias"):
      bias = rng.normal(0, 0.3, config.hidden_size)
      params[axes.layer_name(i)][name] = jnp.asarray(bias, jnp.float32)
  return dataclasses.replace(config, o_bias=True, down_bias=True), params
