"""Model families, one row of a table each.

A row says which fields of config.json the family reads, what each is when it is
absent (the defaults of its class in Transformers), what holds for all of its
models, and what its tensors are called. `config_json` and `tensors` read the
table both ways.
"""

import dataclasses
from typing import Any

REQUIRED = object()  # in place of a default

OUTER = {
  "embedding": "model.embed_tokens.weight",
  "final_norm": "model.norm.weight",
  "lm_head": "lm_head.weight",
}
# Our parameter: its tensor behind "model.layers.N."
LAYER = {
  "attn_norm": "input_layernorm.weight",
  "q": "self_attn.q_proj.weight",
  "k": "self_attn.k_proj.weight",
  "v": "self_attn.v_proj.weight",
  "o": "self_attn.o_proj.weight",
  "q_bias": "self_attn.q_proj.bias",
  "k_bias": "self_attn.k_proj.bias",
  "v_bias": "self_attn.v_proj.bias",
  "o_bias": "self_attn.o_proj.bias",
  "mlp_norm": "post_attention_layernorm.weight",
  "gate": "mlp.gate_proj.weight",
  "up": "mlp.up_proj.weight",
  "down": "mlp.down_proj.weight",
  "gate_bias": "mlp.gate_proj.bias",
  "up_bias": "mlp.up_proj.bias",
  "down_bias": "mlp.down_proj.bias",
}
QK_NORM = {
  "q_norm": "self_attn.q_norm.weight",
  "k_norm": "self_attn.k_norm.weight",
}
QK_NORM_ALL = {f"{name}_all": tensor for name, tensor in QK_NORM.items()}
SANDWICH = {
  "attn_post_norm": "post_attention_layernorm.weight",
  "mlp_norm": "pre_feedforward_layernorm.weight",
  "mlp_post_norm": "post_feedforward_layernorm.weight",
}
POST = {
  "attn_post_norm": "post_attention_layernorm.weight",
  "mlp_post_norm": "post_feedforward_layernorm.weight",
}
FUSED = dict.fromkeys("qkv", "self_attn.qkv_proj.weight") | dict.fromkeys(
  ("gate", "up"), "mlp.gate_up_proj.weight"
)


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of the table.

  Attributes:
    module: of Transformers, below `transformers.models`.
    prefix: of its classes, as in LlamaForCausalLM; the config class is
      `config_class`, the model without head `model_class`.
    fields: of config.json, with their defaults.
    fixed: fields of `ModelConfig` that hold for all models of the family.
    tensors: names as in `LAYER`.
    windows: which layers have a sliding window: "" none, "all", "last" (from
      max_window_layers on), "pattern" (all but every n-th).
    divides: Transformers insists that the heads divide the hidden size.
    ropes: kinds of rotary embedding that its config class lets pass.
    text: "Text" in the names of classes (Gemma 3).
    heads: tasks for which Transformers has a class besides the language model.
  """

  module: str
  prefix: str
  fields: dict[str, Any]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  tensors: dict[str, str] = dataclasses.field(default_factory=lambda: LAYER)
  windows: str = ""
  divides: bool = False
  ropes: tuple[str, ...] = ("default", "linear", "llama3")
  text: str = ""
  heads: tuple[str, ...] = ("SequenceClassification", "TokenClassification")

  @property
  def config_class(self) -> str:
    return f"{self.prefix}{self.text}Config"

  @property
  def model_class(self) -> str:
    return f"{self.prefix}{self.text}Model"

  def head_class(self, task: str) -> str:
    return f"{self.prefix}{self.text}For{task}"


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

FAMILIES = {
  "llama": Family("llama", "Llama", LLAMA, divides=True),
  "mistral": Family(
    "mistral",
    "Mistral",
    {
      **COMMON,
      **SILU,
      "num_key_value_heads": 8,
      "max_position_embeddings": 131072,
      "sliding_window": 4096,  # also when the field is absent
    },
    windows="all",
  ),
  "qwen2": Family(
    "qwen2", "Qwen2", QWEN, fixed={"qkv_bias": True}, windows="last"
  ),
  "qwen3": Family(
    "qwen3",
    "Qwen3",
    {**QWEN, **ATTENTION_BIAS, "head_dim": 128},
    fixed={"qk_norm": "head"},
    tensors=LAYER | QK_NORM,
    windows="last",
  ),
  "gemma": Family(
    "gemma",
    "Gemma",
    {
      **COMMON,
      **ATTENTION_BIAS,
      "hidden_act": "gelu_pytorch_tanh",
      "num_key_value_heads": 16,
      "head_dim": 256,
      "max_position_embeddings": 8192,
      "tie_word_embeddings": True,
      "bos_token_id": 2,
      "eos_token_id": 1,
      "pad_token_id": 0,
    },
    fixed={"norm_offset": 1.0},
  ),
  "gemma2": Family(
    "gemma2",
    "Gemma2",
    {**GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    fixed=GEMMA_FIXED,
    tensors=LAYER | SANDWICH,
    windows="pattern",
    divides=True,
  ),
  "gemma3_text": Family(
    "gemma3",
    "Gemma3",
    {
      **GEMMA,
      "rope_theta": 1e6,
      "max_position_embeddings": 131072,
      "final_logit_softcapping": None,
      "attn_logit_softcapping": None,
      "rope_local_base_freq": 1e4,
      "sliding_window_pattern": 6,
    },
    fixed={**GEMMA_FIXED, "qk_norm": "head"},
    tensors=LAYER | SANDWICH | QK_NORM,
    windows="pattern",
    divides=True,
    text="Text",
    heads=("SequenceClassification",),
  ),
  "phi3": Family(
    "phi3",
    "Phi3",
    {
      **COMMON,
      **SILU,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096,
      "partial_rotary_factor": 1.0,
      "sliding_window": None,
      "eos_token_id": 32000,
      "pad_token_id": 32000,
    },
    tensors=LAYER | FUSED,
    windows="all",
    ropes=("default",),
  ),
  "olmo2": Family(
    "olmo2",
    "Olmo2",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      "rms_norm_eps": 1e-5,
      "bos_token_id": None,
      "eos_token_id": 50279,
      "pad_token_id": 1,
    },
    fixed={"norm_order": "post", "qk_norm": "all"},
    tensors=LAYER | POST | QK_NORM_ALL,
    heads=(),
  ),
  "granite": Family(
    "granite",
    "Granite",
    {
      **LLAMA,
      "attention_multiplier": 1.0,
      "embedding_multiplier": 1.0,
      "residual_multiplier": 1.0,
      "logits_scaling": 1.0,
    },
    heads=(),
  ),
}
# MobileLLM is LLaMA under another name; `config_json` translates it.
SUPPORTED = (*FAMILIES, "mobilellm")
