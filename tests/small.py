"""A small uneven model for tests, and the options that families have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.models.second_kinds import DeltaNet, WideHeads

CONFIG = ModelConfig(
  family="llama",
  vocab_size=40,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(4, 2, 3),
  ffn_widths=(24, 40, 17),
  norm_eps=1e-5,
  rope=Rope(),
  context=64,
  tied=False,
)
SMOLLM2_135M = dataclasses.replace(
  CONFIG,
  vocab_size=49152,
  hidden_size=576,
  queries_per_group=3,
  head_dim=64,
  kv_groups=(3,) * 30,
  ffn_widths=(1536,) * 30,
)
LLAMA_8B = dataclasses.replace(  # of Llama-3.1-8B's sizes
  CONFIG,
  vocab_size=128256,
  hidden_size=4096,
  queries_per_group=4,
  head_dim=128,
  kv_groups=(8,) * 32,
  ffn_widths=(14336,) * 32,
)
# What differs between families, each the fields that it changes.
WIDE = {  # as in Gemma 4
  "norm_order": "sandwich",
  "qk_norm": "head",
  "v_norm": True,
  "out_scale": True,
  "attn_scale": 1.0,
  "window": (3, 0, 3),
  "rope": Rope(kind="proportional", partial=0.5),
  "local_rope": Rope(theta=100.0),
  "wide": (0, 1, 0),
}
OPTIONS = {
  "plain": {},
  "biases": {
    "qkv_bias": True,
    "o_bias": True,
    "gate_up_bias": True,
    "down_bias": True,
    "tied": True,
  },
  "norm of each head": {"qk_norm": "head"},
  "norm of all heads": {"qk_norm": "all", "norm_order": "post"},
  "sandwich": {
    "norm_order": "sandwich",
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "attn_softcap": 5.0,
    "final_softcap": 3.0,
    "embed_scale": 4.0,
    "window": (3, 0, 3),
    "local_rope": Rope(theta=100.0),
  },
  "parallel": {
    "parallel": True,
    "shared_norm": True,
    "head_bias": True,
    "norm": "layer",
    "norm_bias": True,
    "gated": False,
    "activation": "xielu",
    "qkv_bias": True,
    "o_bias": True,
    "gate_up_bias": True,
    "down_bias": True,
  },
  "experts": {
    "experts": 5,
    "experts_per_token": 2,
    "router_norm": True,
    "router_loss": 0.5,
    "router_loss_on": True,
  },
  "experts beside an MLP": {
    "norm_order": "sandwich",
    "experts": 5,
    "experts_per_token": 2,
    "router_norm": True,
    "shared_width": 6,
    "expert_norms": True,
  },
  "scales": {
    "parallel": True,
    "residual_scale": 0.5,
    "logit_scale": 0.25,
    "attn_scale": 0.3,
    "rope": Rope(partial=0.5, query_growth=0.5, original_context=8),
    "nope": (0, 1, 0),
  },
  "wide": {
    **WIDE,
    "activation": "gelu_tanh",
    "wide_heads": WideHeads(queries_per_group=3, head_dim=8, has_v=False),
  },
  "shared": {
    **WIDE,
    "kv_groups": (4, 2, 4),
    "wide_heads": WideHeads(queries_per_group=3, head_dim=8),
    "reuses": (0, 0, 1),
    "reused_groups": (4, 0),
    "told": 5,
    "told_layers": 3,
  },
  "delta": {
    "delta": (0, 1, 0),
    "delta_net": DeltaNet(values_per_key=2, key_dim=4, value_dim=6, taps=3),
    "attn_gate": True,
    "qkv_bias": True,
    "qk_norm": "head",
    "norm_offset": 1.0,
  },
}


def option(name: str) -> ModelConfig:
  return dataclasses.replace(CONFIG, **OPTIONS[name])


def random_params(
  config: ModelConfig, seed: int = 0, dtype: jnp.dtype = jnp.float32
) -> axes.Params:
  """Random everywhere, so that no norm or bias is trivial; in numpy."""
  rng = np.random.default_rng(seed)

  def draw(name, _, leaf):
    middle = 1 - config.norm_offset if "norm" in name else 0.0
    middle += name.endswith("_scale")
    drawn = middle + 0.2 * rng.normal(size=leaf.shape)
    return np.asarray(drawn, np.float32).astype(leaf.dtype)

  return axes.map_named(draw, model_config.abstract_params(config, dtype))


def random_kept(config: ModelConfig, seed: int = 0, share: float = 0.6):
  """Some units of each module, at least one; of each expert other ones."""
  rng = np.random.default_rng(seed)

  def some(unit, width):
    drawn = lambda: rng.permutation(width)[: max(1, round(share * width))]
    if unit == "F" and config.experts:
      return np.stack([np.sort(drawn()) for _ in range(config.experts)])
    return np.sort(drawn())

  return {
    u: tuple(some(u, width) for width in widths)
    for u, widths in config.units().items()
  }


def one_device() -> jax.sharding.Mesh:
  return sharding.make_mesh(devices=jax.devices()[:1])


def tokens(config: ModelConfig, rows: int, length: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
