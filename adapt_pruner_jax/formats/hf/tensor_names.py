"""Names of tensors in checkpoints, by our parameters' names."""

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
OUTER_PHI = {
  **OUTER,
  "final_norm": "model.final_layernorm.weight",
  "final_norm_bias": "model.final_layernorm.bias",
  "lm_head_bias": "lm_head.bias",
}
PHI = {
  "o": "self_attn.dense.weight",
  "o_bias": "self_attn.dense.bias",
  "up": "mlp.fc1.weight",
  "up_bias": "mlp.fc1.bias",
  "down": "mlp.fc2.weight",
  "down_bias": "mlp.fc2.bias",
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
Q_GATE = {  # each head's rows behind those of its queries
  "q_gate": "self_attn.q_proj.weight",
  "q_gate_bias": "self_attn.q_proj.bias",
}
DELTA_NET = {
  **{f"delta_{n}": "linear_attn.in_proj_qkv.weight" for n in "qkv"},
  **{f"delta_conv_{n}": "linear_attn.conv1d.weight" for n in "qkv"},
  "delta_gate": "linear_attn.in_proj_z.weight",
  "delta_beta": "linear_attn.in_proj_b.weight",
  "delta_decay": "linear_attn.in_proj_a.weight",
  "delta_decay_bias": "linear_attn.dt_bias",
  "delta_log_rate": "linear_attn.A_log",
  "delta_norm": "linear_attn.norm.weight",
  "delta_o": "linear_attn.out_proj.weight",
}
WIDE = {  # heads of another size, in some layers
  f"wide_{name}": tensor
  for name, tensor in (LAYER | QK_NORM).items()
  if name in ("q", "k", "v", "o", "q_norm", "k_norm")
}
OUTER_TOLD = {
  **OUTER,
  "told": "model.embed_tokens_per_layer.weight",
  "told_proj": "model.per_layer_model_projection.weight",
  "told_norm": "model.per_layer_projection_norm.weight",
}
TOLD = {  # what is behind the MLP of a layer of such a model
  "told_gate": "per_layer_input_gate.weight",
  "told_out": "per_layer_projection.weight",
  "told_post_norm": "post_per_layer_input_norm.weight",
  "out_scale": "layer_scalar",
}
SANDWICH = {
  "attn_post_norm": "post_attention_layernorm.weight",
  "mlp_norm": "pre_feedforward_layernorm.weight",
  "mlp_post_norm": "post_feedforward_layernorm.weight",
}
POST = {
  "attn_post_norm": "post_attention_layernorm.weight",
  "mlp_post_norm": "post_feedforward_layernorm.weight",
}
APERTUS = {
  "attn_norm": "attention_layernorm.weight",
  "mlp_norm": "feedforward_layernorm.weight",
  "xielu_positive": "mlp.act_fn.alpha_p",
  "xielu_negative": "mlp.act_fn.alpha_n",
  "xielu_beta": "mlp.act_fn.beta",
  "xielu_eps": "mlp.act_fn.eps",
}
SHARED_MLP = {
  "gate": "shared_mlp.input_linear.weight",  # and the two that follow it
  "up": "shared_mlp.input_linear.weight",
  "down": "shared_mlp.output_linear.weight",
}
# "*" stands for the number of an expert, each of which has tensors of its own.
EACH_EXPERT = {
  "router": "mlp.gate.weight",
  "moe_gate": "mlp.experts.*.gate_proj.weight",
  "moe_up": "mlp.experts.*.up_proj.weight",
  "moe_down": "mlp.experts.*.down_proj.weight",
}
SHARED_EXPERT = {
  "shared_gate": "mlp.shared_expert.gate_proj.weight",
  "shared_up": "mlp.shared_expert.up_proj.weight",
  "shared_down": "mlp.shared_expert.down_proj.weight",
  "shared_open": "mlp.shared_expert_gate.weight",
}
GEMMA4_EXPERTS = {
  "router": "router.proj.weight",
  "router_scale": "router.scale",
  "expert_scale": "router.per_expert_scale",
  "moe_norm": "pre_feedforward_layernorm_2.weight",
  **dict.fromkeys(("moe_gate", "moe_up"), "experts.gate_up_proj"),
  "moe_down": "experts.down_proj",
  "moe_post_norm": "post_feedforward_layernorm_2.weight",
  "shared_gate": "mlp.gate_proj.weight",
  "shared_up": "mlp.up_proj.weight",
  "shared_down": "mlp.down_proj.weight",
  "shared_post_norm": "post_feedforward_layernorm_1.weight",
}
EXPERTS_FUSED = {
  "router": "block_sparse_moe.router.layer.weight",
  "moe_gate": "block_sparse_moe.input_linear.weight",
  "moe_up": "block_sparse_moe.input_linear.weight",
  "moe_down": "block_sparse_moe.output_linear.weight",
}
GPT_OSS = {
  "sinks": "self_attn.sinks",
  "router": "mlp.router.weight",
  "router_bias": "mlp.router.bias",
  **dict.fromkeys(("moe_gate", "moe_up"), "mlp.experts.gate_up_proj"),
  "moe_down": "mlp.experts.down_proj",
  "moe_down_bias": "mlp.experts.down_proj_bias",
  **dict.fromkeys(
    ("moe_gate_bias", "moe_up_bias"), "mlp.experts.gate_up_proj_bias"
  ),
}


def experts_in_memory(block: str, router: str) -> dict[str, str]:
  """Names that Transformers 5 has for experts once it has read them.

  It stores and finds others, but not for classes of our own.

  Args:
    block: module below a layer.
    router: module in that.
  """
  fused = f"{block}.experts.gate_up_proj"
  return {
    "router": f"{block}.{router}.weight",
    "moe_gate": fused,
    "moe_up": fused,
    "moe_down": f"{block}.experts.down_proj",
  }


FUSED_MLP = dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight")
FUSED = dict.fromkeys("qkv", "self_attn.qkv_proj.weight") | FUSED_MLP
