"""Names of tensors in GGUF files and the order of their rows."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig

ROPE_FACTORS = "rope_freqs.weight"  # by which LLaMA 3 slows each frequency
NAMES = {
  "embedding": "token_embd.weight",
  "final_norm": "output_norm.weight",
  "lm_head": "output.weight",
  "attn_norm": "attn_norm.weight",
  "q": "attn_q.weight",
  "k": "attn_k.weight",
  "v": "attn_v.weight",
  "o": "attn_output.weight",
  "q_bias": "attn_q.bias",
  "k_bias": "attn_k.bias",
  "v_bias": "attn_v.bias",
  "o_bias": "attn_output.bias",
  "q_norm": "attn_q_norm.weight",
  "k_norm": "attn_k_norm.weight",
  "mlp_norm": "ffn_norm.weight",
  "gate": "ffn_gate.weight",
  "up": "ffn_up.weight",
  "down": "ffn_down.weight",
  "gate_bias": "ffn_gate.bias",
  "up_bias": "ffn_up.bias",
  "down_bias": "ffn_down.bias",
}
# Rotary channels that lie side by side, where ours are half a head apart.
INTERLEAVED = ("q", "k", "q_bias", "k_bias")
INTERLEAVED_ARCHITECTURES = ("llama", "deci")
# Where q, k and v lie one below the other.
FUSED = "attn_qkv.weight"
FUSED_ARCHITECTURES = ("openelm",)


@dataclasses.dataclass(frozen=True)
class Part:
  """A parameter that lies in a tensor, alone or below others."""

  layer: int | None  # None: outside the layers
  name: str


def tensors(config: ModelConfig, arch: str) -> Iterator[tuple[str, list[Part]]]:
  """Each tensor of a file and the parameters that lie in it, in order."""
  for name in model_config.outer_names(config):
    yield NAMES[name], [Part(None, name)]
  for i in range(config.num_layers):
    names = model_config.layer_names(config, i)
    if arch in FUSED_ARCHITECTURES and "q" in names:
      yield f"blk.{i}.{FUSED}", [Part(i, name) for name in "qkv"]
      names = [name for name in names if name not in ("q", "k", "v")]
    for name in names:
      yield f"blk.{i}.{NAMES[name]}", [Part(i, name)]


def is_interleaved(name: str, arch: str) -> bool:
  """Whether rotary channels of parameter `name` lie side by side."""
  return name in INTERLEAVED and arch in INTERLEAVED_ARCHITECTURES


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows of a head from (first half, second half) to pairs side by side."""
  heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """The inverse of `interleave`."""
  heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows.shape)


def package() -> Any:
  """The package gguf.

  Raises:
    UserError: it is not installed.
  """
  try:
    import gguf
  except ImportError as error:
    raise UserError(
      "gguf files need the package gguf: pip install 'adapt-pruner-jax[gguf]'"
    ) from error
  return gguf
