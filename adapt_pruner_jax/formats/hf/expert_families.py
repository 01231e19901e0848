"""Rows of `families` whose MLPs are mixtures of experts."""

from adapt_pruner_jax.formats.hf.defaults import (
  ATTENTION_BIAS,
  COMMON,
  EXPERTS,
  MULTIPLIERS,
  NO_IDS,
  OLMO,
  SILU,
)
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.tensor_names import (
  EACH_EXPERT,
  EXPERTS_FUSED,
  LAYER,
  QK_NORM,
  QK_NORM_ALL,
  experts_in_memory,
)

EXPERT_FAMILIES = {
  "granitemoe": Family(
    "granitemoe",
    "GraniteMoe",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      **MULTIPLIERS,
      **EXPERTS,
      "num_experts": 8,
      "num_experts_per_tok": 2,
    },
    fixed={"router_norm": True},
    tensors=LAYER | EXPERTS_FUSED,
    own=experts_in_memory("block_sparse_moe", "router"),
    renamed={"num_experts": "num_local_experts"},
    heads=(),
  ),
  "olmoe": Family(
    "olmoe",
    "Olmoe",
    {
      **OLMO,
      **EXPERTS,
      "num_experts": 64,
      "max_position_embeddings": 4096,
      "router_aux_loss_coef": 0.01,
      "norm_topk_prob": False,
      "clip_qkv": None,
    },
    fixed={"qk_norm": "all"},
    tensors=LAYER | QK_NORM_ALL | EACH_EXPERT,
    own=experts_in_memory("mlp", "gate"),
    must={"clip_qkv": None},
    heads=(),
  ),
  "qwen3_moe": Family(
    "qwen3_moe",
    "Qwen3Moe",
    {
      **COMMON,
      **SILU,
      **NO_IDS,
      **ATTENTION_BIAS,
      **EXPERTS,
      "intermediate_size": 768,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "num_experts": 128,
      "norm_topk_prob": False,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
      "use_sliding_window": False,
    },
    fixed={"qk_norm": "head"},
    tensors=LAYER | QK_NORM | EACH_EXPERT,
    own=experts_in_memory("mlp", "gate"),
    renamed={"intermediate_size": "moe_intermediate_size"},
    must={
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
      "use_sliding_window": False,
    },
    passed=("sliding_window", "max_window_layers"),
  ),
}
