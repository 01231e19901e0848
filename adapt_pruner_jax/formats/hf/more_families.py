"""Rows of the table of families, continued: see `families`."""

from adapt_pruner_jax.formats.hf.defaults import (
  ATTENTION_BIAS,
  COMMON,
  MLP_BIAS,
  NO_IDS,
  SILU,
)
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.tensor_names import (
  DELTA_NET,
  FUSED_MLP,
  LAYER,
  POST,
  Q_GATE,
  QK_NORM,
)

GLM = {
  **COMMON,
  **SILU,
  "attention_bias": True,
  "num_key_value_heads": 2,
  "head_dim": 128,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1.5625e-7,
  "partial_rotary_factor": 0.5,
  "bos_token_id": None,
  "eos_token_id": [151329, 151336, 151338],
  "pad_token_id": 151329,
}
MORE = {
  # Qwen 3.5 and 3.6, dense
  "qwen3_5_text": Family(
    "qwen3_5",
    "Qwen3_5",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      **NO_IDS,
      # What the configs inside of the multimodal ones may leave out.
      "vocab_size": 248320,
      "hidden_size": 4096,
      "intermediate_size": 12288,
      "num_hidden_layers": 32,
      "num_attention_heads": 16,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "max_position_embeddings": 32768,
      "partial_rotary_factor": 0.25,
      "layer_types": None,
      "full_attention_interval": 4,
      "linear_conv_kernel_dim": 4,
      "linear_key_head_dim": 128,
      "linear_value_head_dim": 128,
      "linear_num_key_heads": 16,
      "linear_num_value_heads": 32,
    },
    fixed={"norm_offset": 1.0, "qk_norm": "head", "attn_gate": True},
    tensors=LAYER | QK_NORM | Q_GATE | DELTA_NET,
    by_head=("q", "q_gate", "q_bias", "q_gate_bias"),
    must={"hidden_act": "silu"},
    passed=(
      *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
      *("mamba_ssm_dtype", "mlp_only_layers"),
    ),
    delta=True,
    text="Text",
    heads=("SequenceClassification",),
  ),
  "exaone4": Family(
    "exaone4",
    "Exaone4",
    {
      **COMMON,
      **SILU,
      "num_key_value_heads": 32,
      "rms_norm_eps": 1e-5,
      "bos_token_id": 0,
      "sliding_window": 4096,
      "sliding_window_pattern": 4,
      "layer_types": None,
    },
    fixed={"norm_order": "post", "qk_norm": "head"},
    tensors=LAYER | POST | QK_NORM,
    windows="pattern",
    nope="full",
  ),
  "glm": Family(
    "glm",
    "Glm",
    GLM,
    tensors=LAYER | FUSED_MLP,
    interleaved=True,
    bias_of_o=False,
  ),
  "glm4": Family(
    "glm4",
    "Glm4",
    GLM,
    fixed={"norm_order": "sandwich"},
    tensors=LAYER
    | FUSED_MLP
    | {
      "attn_post_norm": "post_self_attn_layernorm.weight",
      "mlp_post_norm": "post_mlp_layernorm.weight",
    },
    interleaved=True,
    bias_of_o=False,
  ),
  "hunyuan_v1_dense": Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      "rms_norm_eps": 1e-5,
      "pad_token_id": 0,
    },
    fixed={"qk_norm": "head", "qk_norm_late": True},
    tensors=LAYER
    | {
      "q_norm": "self_attn.query_layernorm.weight",
      "k_norm": "self_attn.key_layernorm.weight",
    },
    passed=("eod_token_id",),
    rope_alpha=True,
    heads=("SequenceClassification",),
  ),
  "helium": Family(
    "helium",
    "Helium",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      **MLP_BIAS,
      "num_key_value_heads": 20,
      "head_dim": 128,
      "max_position_embeddings": 4096,
      "rms_norm_eps": 1e-8,
      "rope_theta": 1e5,
      "pad_token_id": 3,
    },
    interleaved=True,
    bias_of_o=False,
  ),
}
