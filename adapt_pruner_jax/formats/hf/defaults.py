"""Fields of config.json that several families have, with their defaults."""

REQUIRED = object()  # in place of a default

COMMON = {
  "vocab_size": REQUIRED,
  "hidden_size": REQUIRED,
  "intermediate_size": REQUIRED,
  "num_hidden_layers": REQUIRED,
  "num_attention_heads": REQUIRED,
  "num_key_value_heads": None,  # null = as many as query heads
  "head_dim": None,  # null = hidden_size / num_attention_heads
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": None,
  "rope_theta": 1e4,
  "rope_scaling": None,
  "rope_parameters": None,
}
SILU = {"hidden_act": "silu"}
ATTENTION_BIAS = {"attention_bias": False}  # of q, k, v and o
MLP_BIAS = {"mlp_bias": False}
LAYER_NORM = {"norm": "layer", "norm_bias": True}
NO_IDS = {"bos_token_id": None, "eos_token_id": None}
QWEN = {
  **COMMON,
  **SILU,
  **NO_IDS,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "layer_types": None,
}
GEMMA = {
  **COMMON,
  **ATTENTION_BIAS,
  "hidden_activation": "gelu_pytorch_tanh",
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 8192,
  "tie_word_embeddings": True,
  "bos_token_id": 2,
  "eos_token_id": 1,
  "pad_token_id": 0,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
}
GEMMA_FIXED = {"norm_order": "sandwich", "norm_offset": 1.0}
LLAMA = {**COMMON, **SILU, **ATTENTION_BIAS, **MLP_BIAS}
OLMO = {
  **COMMON,
  **SILU,
  **ATTENTION_BIAS,
  "rms_norm_eps": 1e-5,
  "bos_token_id": None,
  "eos_token_id": 50279,
  "pad_token_id": 1,
}
EXPERTS = {
  "num_experts_per_tok": 8,
  "router_aux_loss_coef": 0.001,
  "output_router_logits": False,
}
MULTIPLIERS = {  # Granite
  "attention_multiplier": 1.0,
  "embedding_multiplier": 1.0,
  "residual_multiplier": 1.0,
  "logits_scaling": 1.0,
}
