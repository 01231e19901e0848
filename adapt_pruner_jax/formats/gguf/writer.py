"""GGUF files, which llama.cpp runs: layers of unequal sizes and all.

llama.cpp reads sizes layer by layer only in some architectures. `deci` serves
LLaMA, Mistral and Qwen2, `openelm` Qwen3 with a tied output; Qwen3 without is
zero-padded to equal layers (`hf/uniform.py`). A model whose layers are equal
gets the plain architecture of its family.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.gguf import vocab
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.formats.hf.tensors import to_hf
from adapt_pruner_jax.formats.hf.uniform import pad
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope, rope_frequencies
from adapt_pruner_jax.storage import publish

KINDS = ("f32", "f16", "q8_0")
LLAMA_LIKE = ("llama", "mistral", "qwen2", "mobilellm")
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


def write(
  config: ModelConfig,
  params: Params,
  out: Path,
  *,
  source: Path | None = None,
  kind: str = "f32",
) -> None:
  """Writes a .gguf file; it is read again and compared before it counts.

  Args:
    source: a directory with the tokenizer; without, the file has token ids
      only, which is said.
    kind: f32, f16 or q8_0 (rows that are no multiple of 32 stay f16).

  Raises:
    UserError: a family or structure that llama.cpp has no architecture for, or
      a tokenizer that it does not know.
  """
  gguf = _package()
  if kind not in KINDS:
    raise UserError(
      f"--dtype={kind} of a gguf is not one of {', '.join(KINDS)}"
      f"{nearest(kind, KINDS)}"
    )
  config, params = save.without_empty_layers(config, params)
  arch = architecture(config)
  if arch == "qwen3" and not _is_uniform(config):
    config, params = pad(config, params)
  publish.require_free(out, overwrite=True)
  with publish.file(out) as temporary:
    writer = gguf.GGUFWriter(str(temporary), arch)
    _write_sizes(writer, config, kind)
    vocab.write(writer, config, source)
    for tensor, array in tensors(config, params, arch):
      stored, quantization = _stored(gguf, tensor, array, kind)
      writer.add_tensor(tensor, stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(gguf, temporary, config, params, arch, kind)


def architecture(config: ModelConfig) -> str:
  """The llama.cpp architecture that computes this model.

  Raises:
    UserError: there is none; says which format can.
  """
  why = None
  if config.residual:
    why = "a model cut by SliceGPT, which only orbax can hold"
  elif config.family == "qwen3" and _biases(config):
    why = "biases beside norms of queries and keys; --format=hf can"
  elif config.family == "qwen3":
    holes = 0 in config.kv_groups or 0 in config.ffn_widths
    uneven = not _is_uniform(config)
    return "openelm" if config.tied and uneven and not holes else "qwen3"
  elif config.family not in LLAMA_LIKE:
    why = (
      f"the family {config.family}; write --format=hf_uniform and use "
      "llama.cpp's own converter on it"
    )
  elif any(config.window):
    why = (
      "sliding windows; exact within the window only: drop them with "
      "--ignore_fields=sliding_window if your prompts are shorter"
    )
  elif 0 in config.kv_groups or 0 in config.ffn_widths:
    why = "layers without attention or MLP; --format=hf can"
  if why:
    raise UserError(f"gguf has no architecture for {why}")
  return "llama" if _is_uniform(config) else "deci"


def tensors(
  config: ModelConfig, params: Params, arch: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and float32 contents, one at a time."""

  def array(name: str, leaf: jax.Array) -> np.ndarray:
    made = to_hf(name, np.asarray(jax.device_get(leaf), np.float32))
    if arch in ("llama", "deci") and name in INTERLEAVED:
      made = interleave(made, config.head_dim)
    return np.ascontiguousarray(made)

  for name in model_config.outer_names(config):
    yield NAMES[name], array(name, params[name])
  if config.rope.kind == "llama3":
    plain = Rope(theta=config.rope.theta)
    slowed = rope_frequencies(config.rope, config.head_dim)
    ratio = rope_frequencies(plain, config.head_dim) / slowed
    yield "rope_freqs.weight", ratio.astype(np.float32)
  for i in range(config.num_layers):
    layer = params[axes.layer_name(i)]
    names = model_config.layer_names(config, i)
    if arch == "openelm":  # q, k and v one below the other
      fused = [array(name, layer[name]) for name in "qkv"]
      yield f"blk.{i}.attn_qkv.weight", np.concatenate(fused)
      names = [name for name in names if name not in "qkv"]
    for name in names:
      yield f"blk.{i}.{NAMES[name]}", array(name, layer[name])


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows of a head from (first half, second half) to pairs side by side."""
  heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows.shape)


def _write_sizes(writer: Any, config: ModelConfig, kind: str) -> None:
  gguf = _package()
  uniform = _is_uniform(config)
  heads = [k * config.queries_per_group for k in config.kv_groups]
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.context)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(
    config.ffn_widths[0] if uniform else list(config.ffn_widths)
  )
  writer.add_head_count(heads[0] if uniform else heads)
  writer.add_head_count_kv(
    config.kv_groups[0] if uniform else list(config.kv_groups)
  )
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_vocab_size(config.vocab_size)
  if config.rope.kind == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope.factor)
  file_type = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
  }
  writer.add_file_type(file_type[kind])


def _stored(
  gguf: Any, name: str, array: np.ndarray, kind: str
) -> tuple[np.ndarray, Any]:
  """An array as it is stored, and the name of that form (None: numpy's)."""
  if array.ndim == 1 or kind == "f32":
    return array, None
  if kind == "q8_0" and array.shape[-1] % 32 == 0:
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(array, q8_0), q8_0
  return array.astype(np.float16), None


def _compare(
  gguf: Any,
  file: Path,
  config: ModelConfig,
  params: Params,
  arch: str,
  kind: str,
) -> None:
  """Reads the file again: every tensor there, none other, as it should be."""
  found = {t.name: t for t in gguf.GGUFReader(file).tensors}
  tolerance = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}[kind]
  for name, want in tensors(config, params, arch):
    tensor = found.pop(name)
    got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    error = np.abs(got.reshape(want.shape) - want).max()
    if not error <= tolerance * np.abs(want).max() + 1e-7 * (kind != "f32"):
      raise RuntimeError(f"{name} reads back with an error of {error}")
  assert not found, f"written without a reason: {sorted(found)}"


def _biases(config: ModelConfig) -> bool:
  return any(
    (config.qkv_bias, config.o_bias, config.gate_up_bias, config.down_bias)
  )


def _is_uniform(config: ModelConfig) -> bool:
  return len(set(config.kv_groups)) == 1 and len(set(config.ffn_widths)) == 1


def _package() -> Any:
  try:
    import gguf
  except ImportError as error:
    raise UserError(
      "gguf files need the package gguf: pip install 'adapt-pruner-jax[gguf]'"
    ) from error
  return gguf
