"""Writes GGUF files: layers of unequal sizes and all.

llama.cpp reads sizes layer by layer only in some architectures. `deci` serves
LLaMA, Mistral and Qwen2, `openelm` Qwen3 with a tied output; Qwen3 without is
zero-padded to equal layers (`hf/uniform.py`). A model whose layers are equal
gets the plain architecture of its family.
"""

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.gguf import layout, reader, vocab
from adapt_pruner_jax.formats.gguf.layout import Part, package
from adapt_pruner_jax.formats.hf import reopen, save
from adapt_pruner_jax.formats.hf.tensors import hf_shape, to_hf
from adapt_pruner_jax.formats.hf.uniform import pad
from adapt_pruner_jax.formats.hf.weights import Get, getter
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope, rope_frequencies
from adapt_pruner_jax.storage import publish

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# How far a value may be from what it was, as a share of the tensor's largest.
TOLERANCE = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2}
TOLERANCE["Q4_0"] = 0.13  # a block's scale is an eighth of its largest
LOGITS_TOLERANCE = 1e-4  # of the largest
LLAMA_LIKE = ("llama", "mistral", "qwen2", "mobilellm")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of the file.

  Attributes:
    shape: as in a HuggingFace checkpoint, [out, in].
    kind: a gguf.GGMLQuantizationType.
    content: of `parts`, or these numbers.
  """

  name: str
  shape: tuple[int, ...]
  kind: Any
  parts: list[Part]
  content: np.ndarray | None = None


def write(
  config: ModelConfig,
  params: Params,
  out: Path,
  *,
  source: Path | None = None,
  kind: str = "",
) -> None:
  """Writes a .gguf file; it is read again and compared before it counts.

  Args:
    source: a directory with the tokenizer; without, the file has token ids
      only, which is said.
    kind: f32, f16, bf16, q8_0 or q4_0 (rows that are no multiple of 32 stay
      f16, and q4_0 leaves the output matrix q8_0), or "": each matrix as it is
      stored. Vectors are always f32.

  Raises:
    UserError: a family or structure that llama.cpp has no architecture for, a
      tokenizer that it does not know, or weights that the kind cannot hold.
  """
  gguf = package()
  kind = STORED.get(kind, kind)
  if kind and kind not in KINDS:
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
    planned = tensors(config, params, arch, kind)
    _write_sizes(writer, config, _usual(planned))
    vocab.write(writer, config, source)
    _write_tensors(writer, planned, config, getter(params), arch)
    compare(temporary, config, params, planned)


def header_bytes(
  config: ModelConfig, params: Params, source: Path | None, kind: str
) -> int:
  """Bytes of a file beside its tensors, at most, of layers of unequal sizes.

  Args:
    config, params: the model, shapes and dtypes of which are enough.
    source, kind: as of `write`; without a source its words are not counted.
  """
  last = max(config.ffn_widths[-1] - 1, 1)
  uneven = dataclasses.replace(
    config, ffn_widths=(*config.ffn_widths[:-1], last)
  )
  arch = architecture(uneven)
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "header.gguf"
    writer = package().GGUFWriter(str(file), arch)
    planned = tensors(config, params, arch, kind)
    _write_sizes(writer, uneven, _usual(planned))
    if source is not None:
      vocab.write(writer, config, source)
    _write_header(writer, planned)
    writer.close()
    # Each tensor begins at a multiple of the alignment.
    size = file.stat().st_size + len(planned) * writer.data_alignment
  return size + sum(t.content.nbytes for t in planned if not t.parts)


def _usual(planned: list[Tensor]) -> Any:
  """The kind that most matrices have."""
  kinds = Counter(t.kind for t in planned if len(t.shape) > 1)
  return kinds.most_common(1)[0][0]


def architecture(config: ModelConfig) -> str:
  """The llama.cpp architecture that computes this model.

  Raises:
    UserError: there is none; says which format can.
  """
  why = None
  if config.residual:
    why = "a model cut by SliceGPT, which only orbax can hold"
  elif config.rope.partial != 1:
    why = (
      f"rotary embeddings of a part of each head ({config.rope.partial}) in "
      f"the family {config.family}; --format=hf can"
    )
  elif config.family == "qwen3" and _biases(config):
    why = "biases beside norms of queries and keys; --format=hf can"
  elif config.family not in (*LLAMA_LIKE, "qwen3"):
    why = (
      f"the family {config.family}; write --format=hf_uniform and use "
      "llama.cpp's own converter on it"
    )
  elif any(0 < window < config.context for window in config.window):
    why = (
      "sliding windows; exact within the window only: drop them with "
      "--ignore_fields=sliding_window if your prompts are shorter"
    )
  elif config.family == "qwen3":
    holes = 0 in config.kv_groups or 0 in config.ffn_widths
    uneven = not _is_uniform(config)
    return "openelm" if config.tied and uneven and not holes else "qwen3"
  elif 0 in config.kv_groups or 0 in config.ffn_widths:
    why = "layers without attention or MLP; --format=hf can"
  if why:
    raise UserError(f"gguf has no architecture for {why}")
  return "llama" if _is_uniform(config) else "deci"


def tensors(
  config: ModelConfig, params: Params, arch: str, kind: str
) -> list[Tensor]:
  """What the file will hold, known before any weight is read."""
  types = package().GGMLQuantizationType
  output = layout.NAMES["embedding" if config.tied else "lm_head"]
  found = []
  for name, parts in layout.tensors(config, arch):
    shapes = [hf_shape(part.name, config.sizes(part.layer)) for part in parts]
    shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
    dtypes = [_leaf(params, part).dtype for part in parts]
    stored = kind or STORED[str(jnp.result_type(*dtypes))]
    if len(shape) == 1:
      stored = "f32"
    elif stored in ("q8_0", "q4_0") and shape[-1] % 32:
      stored = "f16"
    elif stored == "q4_0" and name == output:
      stored = "q8_0"
    found.append(Tensor(name, shape, types[stored.upper()], parts))
  if config.rope.kind == "llama3":
    plain = rope_frequencies(Rope(theta=config.rope.theta), config.head_dim)
    ratio = plain / rope_frequencies(config.rope, config.head_dim)
    content = ratio.astype(np.float32)
    name = layout.ROPE_FACTORS
    found.append(Tensor(name, content.shape, types.F32, [], content))
  return found


def _leaf(params: Params, part: Part) -> Any:
  tree = params if part.layer is None else params[f"layer_{part.layer}"]
  return tree[part.name]


def contents(
  tensor: Tensor, config: ModelConfig, get: Get, arch: str
) -> np.ndarray:
  """A tensor in float32, in the file's order of rows."""
  if tensor.content is not None:
    return tensor.content
  rows = []
  for part in tensor.parts:
    array = to_hf(part.name, get((part.layer, part.name)).astype(np.float32))
    if layout.is_interleaved(part.name, arch):
      array = layout.interleave(array, config.head_dim)
    rows.append(array)
  return rows[0] if len(rows) == 1 else np.concatenate(rows)


def stored(tensor: Tensor, array: np.ndarray) -> np.ndarray:
  """Float32 numbers in the tensor's kind.

  Raises:
    UserError: NaN, infinity, or more than the kind can hold.
  """
  gguf = package()
  array = np.ascontiguousarray(array)
  largest = np.abs(array).max(initial=0)
  if not np.isfinite(largest):
    raise UserError(
      f"the model is not written: {tensor.name} has NaN or infinite values"
    )
  kind = tensor.kind.name
  half = float(np.finfo(np.float16).max)
  if largest > {"F16": half, "Q8_0": 127 * half}.get(kind, np.inf):
    raise UserError(
      f"{tensor.name} has weights up to {largest:.3g}, and {kind.lower()} "
      f"holds at most {half:.0f} (times 127 in q8_0): write --dtype=bf16 or "
      "--dtype=f32"
    )
  if kind == "F32":
    return array
  if kind == "F16":
    return array.astype(np.float16)
  return gguf.quants.quantize(array, tensor.kind)


def _write_tensors(
  writer: Any, planned: list[Tensor], config: ModelConfig, get: Get, arch: str
) -> None:
  """Writes the header, then the tensors one after the other."""
  _write_header(writer, planned)
  for tensor in planned:
    array = stored(tensor, contents(tensor, config, get, arch))
    writer.write_tensor_data(array)
  writer.close()


def _write_header(writer: Any, planned: list[Tensor]) -> None:
  sizes = package().GGML_QUANT_SIZES
  for tensor in planned:
    block, size = sizes[tensor.kind]
    writer.add_tensor_info(
      tensor.name,
      tensor.shape,
      np.dtype(np.float32),
      int(np.prod(tensor.shape)) // block * size,
      tensor.kind,
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()


def _write_sizes(writer: Any, config: ModelConfig, kind: Any) -> None:
  gguf = package()
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
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
  }
  writer.add_file_type(file_type[kind.name])


def compare(
  path: Path, config: ModelConfig, params: Params, planned: list[Tensor]
) -> None:
  """Opens a written file as any other and compares it with the model.

  Each parameter must come back to within its kind's rounding. Under the same
  config that is the same function; where another config comes back (LLaMA 3's
  rope is stored as factors) logits of both, on the parameters that came back,
  are compared too.

  Raises:
    RuntimeError: they differ.
  """
  found, tree = reader.stored(path)
  back, get = getter(tree), getter(params)
  for tensor in planned:
    for part in tensor.parts:
      want = get((part.layer, part.name)).astype(np.float32)
      error = np.abs(back((part.layer, part.name)) - want).max(initial=0)
      largest = np.abs(want).max(initial=0)
      rounding = 1e-7 * (tensor.kind.name != "F32")  # of the smallest halves
      if not error <= TOLERANCE[tensor.kind.name] * largest + rounding:
        raise RuntimeError(f"{tensor.name} reads back with an error of {error}")
  names = ("family", "bos_id", "eos_ids", "pad_id", "window")
  same = {name: getattr(config, name) for name in names}
  found = dataclasses.replace(found, **same)
  if found != config:
    _compare_logits(config, found, back)


def _compare_logits(config: ModelConfig, found: ModelConfig, get: Get) -> None:
  ids = np.arange(min(reopen.TOKENS, config.context))[None] % config.vocab_size
  both = zip(
    reopen.walk(config, get, ids), reopen.walk(found, get, ids), strict=True
  )
  for (where, want), (_, got) in both:
    error = np.abs(got - want).max()
    if not error <= LOGITS_TOLERANCE * max(1, np.abs(want).max()):
      raise RuntimeError(
        f"what was written is another function than the model: {where} differs "
        f"by {error:.2g}"
      )


def _biases(config: ModelConfig) -> bool:
  return any(
    (config.qkv_bias, config.o_bias, config.gate_up_bias, config.down_bias)
  )


def _is_uniform(config: ModelConfig) -> bool:
  return len(set(config.kv_groups)) == 1 and len(set(config.ffn_widths)) == 1
