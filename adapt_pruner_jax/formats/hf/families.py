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
OUTER_NEOX = {
  "embedding": "gpt_neox.embed_in.weight",
  "final_norm": "gpt_neox.final_layer_norm.weight",
  "final_norm_bias": "gpt_neox.final_layer_norm.bias",
  "lm_head": "embed_out.weight",
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
NORM_BIASES = {
  "attn_norm_bias": "input_layernorm.bias",
  "mlp_norm_bias": "post_attention_layernorm.bias",
}
NO_GATE = {
  "up": "mlp.c_fc.weight",
  "down": "mlp.c_proj.weight",
  "up_bias": "mlp.c_fc.bias",
  "down_bias": "mlp.c_proj.bias",
}
NEOX = {
  "attn_norm": "input_layernorm.weight",
  "mlp_norm": "post_attention_layernorm.weight",
  **NORM_BIASES,
  **dict.fromkeys("qkv", "attention.query_key_value.weight"),
  **{f"{n}_bias": "attention.query_key_value.bias" for n in "qkv"},
  "o": "attention.dense.weight",
  "o_bias": "attention.dense.bias",
  "up": "mlp.dense_h_to_4h.weight",
  "up_bias": "mlp.dense_h_to_4h.bias",
  "down": "mlp.dense_4h_to_h.weight",
  "down_bias": "mlp.dense_4h_to_h.bias",
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
SHARED_MLP = {
  "gate": "shared_mlp.input_linear.weight",  # and the two that follow it
  "up": "shared_mlp.input_linear.weight",
  "down": "shared_mlp.output_linear.weight",
}
FUSED = dict.fromkeys("qkv", "self_attn.qkv_proj.weight") | dict.fromkeys(
  ("gate", "up"), "mlp.gate_up_proj.weight"
)
ROPES = (
  *("default", "linear", "dynamic", "llama3", "yarn", "longrope"),
  "proportional",
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
    outer: names of the tensors outside the layers.
    layer: what the name of its layer's class ends with.
    body: of the model without head, in the class with one.
    by_head: parameters that share a tensor head by head, not one below the
      other.
    renamed: what it calls some fields, by what all others call them.
    must: fields that have to have this value; other values are not supported.
    passed: fields that count only in parts which `must` leaves no room for.
    written: values of such fields that its config class has to see.
    windows: which layers have a sliding window: "" none, "all", "last" (from
      max_window_layers on), "pattern" (all but every n-th), "nope" (those
      without rotary embeddings), "kinds" (none, but each layer has a kind).
    period: n of the pattern.
    divides: Transformers insists that the heads divide the hidden size.
    ropes: kinds of rotary embedding that its config class lets pass.
    rope: fields of the rotary embedding where a file says nothing of it.
    rope_aliases: what it calls some kinds.
    local_rope: layers with a window have a rotary embedding of their own.
    interleaved: rotary pairs lie side by side in its files.
    query_growth: queries grow with their position, as its rope says.
    nope: which layers have no rotary embeddings: "" none, "list" (those with a
      0 in no_rope_layers), "switch" (all, by position_embedding_type).
    text: "Text" in the names of classes (Gemma 3).
    heads: tasks for which Transformers has a class besides the language model.
  """

  module: str
  prefix: str
  fields: dict[str, Any]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  tensors: dict[str, str] = dataclasses.field(default_factory=lambda: LAYER)
  outer: dict[str, str] = dataclasses.field(default_factory=lambda: OUTER)
  body: str = "model"
  layer: str = "DecoderLayer"
  by_head: tuple[str, ...] = ()
  renamed: dict[str, str] = dataclasses.field(default_factory=dict)
  must: dict[str, Any] = dataclasses.field(default_factory=dict)
  passed: tuple[str, ...] = ()
  written: dict[str, Any] = dataclasses.field(default_factory=dict)
  windows: str = ""
  period: int = 2
  divides: bool = False
  ropes: tuple[str, ...] = ROPES
  rope: dict[str, Any] = dataclasses.field(default_factory=dict)
  rope_aliases: dict[str, str] = dataclasses.field(default_factory=dict)
  local_rope: bool = False
  query_growth: bool = False
  interleaved: bool = False
  nope: str = ""
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

  def module_of(self, name: str) -> str:
    """Below a layer, the module of our parameter `name`."""
    return self.tensors[name].removesuffix(".weight")


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
MULTIPLIERS = {  # Granite
  "attention_multiplier": 1.0,
  "embedding_multiplier": 1.0,
  "residual_multiplier": 1.0,
  "logits_scaling": 1.0,
}

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
      # What the configs inside of Gemma 3's multimodal ones leave out.
      "vocab_size": 262208,
      "hidden_size": 2304,
      "intermediate_size": 9216,
      "num_hidden_layers": 26,
      "num_attention_heads": 8,
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
    local_rope=True,
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
    ropes=("default", "longrope"),
    rope_aliases={"su": "longrope", "yarn": "longrope"},
  ),
  "olmo2": Family(
    "olmo2",
    "Olmo2",
    OLMO,
    fixed={"norm_order": "post", "qk_norm": "all"},
    tensors=LAYER | POST | QK_NORM_ALL,
    heads=(),
  ),
  "olmo3": Family(
    "olmo3",
    "Olmo3",
    {
      **OLMO,
      "rope_theta": 5e5,
      "sliding_window": 4096,
      "layer_types": None,
    },
    fixed={"norm_order": "post", "qk_norm": "all"},
    tensors=LAYER | POST | QK_NORM_ALL,
    windows="pattern",
    period=4,
    local_rope=True,
    heads=("SequenceClassification",),
  ),
  "granite": Family("granite", "Granite", {**LLAMA, **MULTIPLIERS}, heads=()),
  # Granite 4 without experts and Mamba layers
  "granitemoehybrid": Family(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    {
      **COMMON,
      **SILU,
      **ATTENTION_BIAS,
      **MULTIPLIERS,
      "intermediate_size": 1024,
      "layer_types": None,
      "position_embedding_type": None,
      "num_local_experts": 8,
    },
    tensors=LAYER | SHARED_MLP,
    renamed={"intermediate_size": "shared_intermediate_size"},
    must={"num_local_experts": 0},
    passed=(
      *("mamba_chunk_size", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head"),
      *("mamba_d_state", "mamba_expand", "mamba_n_groups", "mamba_n_heads"),
      *("mamba_proj_bias", "time_step_limit", "num_experts_per_tok"),
      *("output_router_logits", "router_aux_loss_coef", "init_method"),
    ),
    written={"mamba_n_heads": 1, "mamba_d_head": "auto"},
    windows="kinds",
    nope="switch",
    heads=(),
  ),
  "ernie4_5": Family(
    "ernie4_5",
    "Ernie4_5",
    {
      **COMMON,
      **SILU,
      "use_bias": False,  # of all seven matrices
      "num_key_value_heads": 2,
      "head_dim": 128,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131072,
      "tie_word_embeddings": True,
      "pad_token_id": 0,
      "rope_theta": 5e5,
    },
    interleaved=True,
    heads=(),
  ),
  # Pythia
  "gpt_neox": Family(
    "gpt_neox",
    "GPTNeoX",
    {
      **COMMON,
      "hidden_act": "gelu",
      "attention_bias": True,
      "use_parallel_residual": True,
      "rms_norm_eps": 1e-5,
      "bos_token_id": 0,
      "partial_rotary_factor": 0.25,
    },
    fixed={
      **LAYER_NORM,
      "gated": False,
      "gate_up_bias": True,
      "down_bias": True,
    },
    tensors=NEOX,
    outer=OUTER_NEOX,
    body="gpt_neox",
    layer="Layer",
    by_head=("q", "k", "v", "q_bias", "k_bias", "v_bias"),
    renamed={
      "rms_norm_eps": "layer_norm_eps",
      "rope_theta": "rotary_emb_base",
      "partial_rotary_factor": "rotary_pct",
    },
    divides=True,
    heads=(),
  ),
  "arcee": Family(
    "arcee",
    "Arcee",
    {
      **LLAMA,
      "hidden_act": "relu2",
      "max_position_embeddings": 4096,
      "rms_norm_eps": 1e-5,
      "bos_token_id": 128000,
      "eos_token_id": 128001,
    },
    fixed={"gated": False},
    divides=True,
  ),
  "nemotron": Family(
    "nemotron",
    "Nemotron",
    {
      **LLAMA,
      "hidden_act": "relu2",
      "max_position_embeddings": 4096,
      "rms_norm_eps": 1e-5,
      "bos_token_id": 2,
      "eos_token_id": 3,
      "partial_rotary_factor": 0.5,
    },
    fixed={**LAYER_NORM, "norm_offset": 1.0, "gated": False},
    tensors=LAYER | NORM_BIASES,
    outer=OUTER | {"final_norm_bias": "model.norm.bias"},
    renamed={"rms_norm_eps": "norm_eps"},
  ),
  "seed_oss": Family(
    "seed_oss",
    "SeedOss",
    {
      **LLAMA,
      "attention_bias": True,
      "attention_out_bias": False,
      "num_key_value_heads": 8,
      "head_dim": 128,
      "max_position_embeddings": 524288,
      "bos_token_id": 0,
      "pad_token_id": 1,
    },
  ),
  "starcoder2": Family(
    "starcoder2",
    "Starcoder2",
    {
      **COMMON,
      "hidden_act": "gelu_pytorch_tanh",
      "use_bias": True,
      "num_key_value_heads": 2,
      "max_position_embeddings": 4096,
      "rms_norm_eps": 1e-5,
      "tie_word_embeddings": True,
      "bos_token_id": 50256,
      "eos_token_id": 50256,
      "sliding_window": None,
    },
    fixed={**LAYER_NORM, "gated": False},
    tensors=LAYER | NORM_BIASES | NO_GATE,
    outer=OUTER | {"final_norm_bias": "model.norm.bias"},
    renamed={"rms_norm_eps": "norm_epsilon"},
    windows="all",
  ),
  "smollm3": Family(
    "smollm3",
    "SmolLM3",
    {
      **LLAMA,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "tie_word_embeddings": True,
      "bos_token_id": 128000,
      "eos_token_id": 128001,
      "pad_token_id": 128004,
      "rope_theta": 2e6,
      "use_sliding_window": False,
      "sliding_window": None,
      "layer_types": None,
      "no_rope_layers": None,
      "no_rope_layer_interval": 4,
    },
    passed=("max_window_layers",),
    windows="nope",
    nope="list",
  ),
  "ministral3": Family(
    "ministral3",
    "Ministral3",
    {
      **COMMON,
      **SILU,
      "num_key_value_heads": 8,
      "head_dim": 128,
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 262144,
      "pad_token_id": 11,
      "sliding_window": None,
    },
    windows="all",
    ropes=("yarn",),
    rope={
      "rope_type": "yarn",
      "rope_theta": 1e6,
      "factor": 16.0,
      "original_max_position_embeddings": 16384,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
      "llama_4_scaling_beta": 0.1,
    },
    query_growth=True,
  ),
}
# MobileLLM is LLaMA under another name; `config_json` translates it.
SUPPORTED = (*FAMILIES, "mobilellm")
