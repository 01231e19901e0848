"""Reads GGUF files: the config of the model, and its tensors dequantised.

The tensors are offered under the names and in the layout of a HuggingFace
checkpoint, so that `hf/load.py` opens both alike.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError, first_line, nearest
from adapt_pruner_jax.formats.gguf import layout
from adapt_pruner_jax.formats.gguf.layout import Part, package
from adapt_pruner_jax.formats.hf import config_json, load, parameters, tensors
from adapt_pruner_jax.formats.hf.fields import tidy
from adapt_pruner_jax.formats.hf.files import ALL
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope, rope_frequencies

ARCHITECTURES = ("llama", "deci", "qwen2", "qwen3", "openelm")
# Of an architecture; others change the function unless they are off.
_KNOWN = """
  block_count context_length embedding_length feed_forward_length vocab_size
  attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon
  attention.key_length attention.value_length attention.causal
  rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor
  rope.scaling.finetuned rope.scaling.original_context_length rope.scale_linear
  tensor_data_layout
"""
KNOWN = frozenset(_KNOWN.split())
# As they are; any other kind is dequantised to float32, which holds it exactly.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROPE_ERROR = 1e-5  # relative, of factors stored in float32


class File:
  """An opened GGUF file; only its header is read.

  Attributes:
    arch: llama.cpp's name of the architecture.
    tensors: by name, as gguf.GGUFReader gives them.
  """

  def __init__(self, path: Path):
    """Raises a UserError for a file that is damaged or of an unknown kind."""
    self.path = path
    try:
      opened = package().GGUFReader(path)
    except UserError:
      raise
    except Exception as error:  # whatever a damaged header makes of numpy
      why = first_line(error)
      hint = "get it again, or pip install -U gguf"
      raise UserError(
        f"{path} cannot be read as gguf; it is damaged, cut off or of a newer "
        f"kind ({why}): {hint}"
      ) from error
    self._fields = opened.fields
    self.tensors = {tensor.name: tensor for tensor in opened.tensors}
    self.arch = self.get("general.architecture", "")
    if self.get("split.count", 1) > 1:
      raise UserError(
        f"{path} is one of {self.get('split.count')} parts of a model: join "
        "them with llama-gguf-split --merge"
      )
    if self.arch not in ARCHITECTURES:
      raise UserError(
        f"{path}: the architecture {self.arch or '(none)'} is not supported"
        f"{nearest(self.arch, ARCHITECTURES)}; supported: "
        f"{', '.join(ARCHITECTURES)}. Use the model's HuggingFace directory"
      )
    self._check_kinds()

  def get(self, key: str, default: Any = None) -> Any:
    """A setting of the file, or `default`."""
    field = self._fields.get(key)
    return default if field is None else field.contents()

  def size(self, key: str, default: Any = None) -> Any:
    """A setting of the architecture.

    Raises:
      UserError: the file lacks it and there is no default.
    """
    found = self.get(f"{self.arch}.{key}", default)
    if found is None:
      raise UserError(f"{self.path}: the setting {self.arch}.{key} is missing")
    return found

  def unknown(self) -> dict[str, Any]:
    """Settings of the architecture that are on and not known here."""
    start = f"{self.arch}."
    names = [
      name
      for name in self._fields
      if name.startswith(start) and name.removeprefix(start) not in KNOWN
    ]
    found = {name: self.get(name) for name in names}
    return {name: value for name, value in found.items() if value}

  def _check_kinds(self) -> None:
    """Raises a UserError for a kind that the package cannot dequantise."""
    some = {tensor.tensor_type: tensor for tensor in self.tensors.values()}
    for kind, tensor in some.items():
      try:
        package().quants.dequantize(tensor.data[:1], kind)
      except NotImplementedError as error:
        raise UserError(
          f"{self.path}: {tensor.name} is stored as {kind.name}, which the "
          "package gguf cannot dequantise; use a file of another kind, such as "
          "Q8_0"
        ) from error


def read_config(file: File) -> ModelConfig:
  """The config of a file's model.

  Raises:
    UserError: a setting is missing, contradicts another, or is not supported.
  """
  count = file.size("block_count")
  heads = _each(file, "attention.head_count", count)
  groups = _each(file, "attention.head_count_kv", count, default=heads)
  both = list(zip(heads, groups, strict=True))
  ratios = {h / k if k else math.inf for h, k in both if h}
  if len(ratios) != 1 or not (ratio := ratios.pop()).is_integer():
    raise UserError(
      f"{file.path}: heads {heads} on key/value heads {groups}; each key/value "
      "head must serve the same number of heads, in all layers"
    )
  kv_groups = tuple(k if h else 0 for h, k in both)
  hidden = file.size("embedding_length")
  head_dim = file.size("attention.key_length", hidden // max(heads))
  _check_heads(file, head_dim)
  biases = _biases(file)
  qwen3 = file.arch in ("qwen3", "openelm")
  # Qwen2 is LLaMA with biases of q, k and v alone.
  qwen2 = file.arch == "qwen2" or (biases["qkv_bias"] and not biases["o_bias"])
  return ModelConfig(
    family="qwen3" if qwen3 else "qwen2" if qwen2 else "llama",
    vocab_size=_vocab_size(file),
    hidden_size=hidden,
    queries_per_group=int(ratio),
    head_dim=head_dim,
    kv_groups=kv_groups,
    ffn_widths=_each(file, "feed_forward_length", count),
    norm_eps=_float(file.size("attention.layer_norm_rms_epsilon")),
    rope=_rope(file, head_dim),
    context=file.size("context_length"),
    tied=layout.NAMES["lm_head"] not in file.tensors,
    qk_norm="head" if qwen3 else "",
    bos_id=file.get("tokenizer.ggml.bos_token_id"),
    eos_ids=_ends(file),
    pad_id=file.get("tokenizer.ggml.padding_token_id"),
    **biases,
  )


def raw_config(file: File) -> dict[str, Any]:
  """config.json of a file; settings that are not known here among its fields.

  Those are refused by name when it is read, and can be ignored by name.
  """
  config = read_config(file)
  dtype = tensor_dtype(file.tensors[layout.NAMES["embedding"]])
  raw = config_json.write(config)
  return raw | {"dtype": dtype, "torch_dtype": dtype} | file.unknown()


def tensor_dtype(tensor: Any) -> str:
  """The dtype in which a tensor is offered."""
  return PLAIN.get(tensor.tensor_type.name, "float32")


class Checkpoint:
  """The tensors of a file, as `hf.files.Checkpoint` offers those of a folder.

  Attributes:
    folder: the file.
    shapes, dtypes: of each tensor, by its name in a HuggingFace checkpoint.
  """

  def __init__(self, file: File, config: ModelConfig):
    """Raises a UserError for tensors that are no part of the model."""
    self.folder = file.path
    self._file, self._config = file, config
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._place: dict[str, tuple[str, Part, int]] = {}
    names = tensors.places(config)
    used = {layout.ROPE_FACTORS}
    for name, parts in layout.tensors(config, file.arch):
      if name not in file.tensors:
        raise UserError(f"{file.path}: the tensor {name} is missing")
      used.add(name)
      shape = tuple(int(n) for n in reversed(file.tensors[name].shape))
      start = 0
      for part in parts:
        rows = names[part.layer, part.name].rows if len(parts) > 1 else shape[0]
        tensor = names[part.layer, part.name].tensor
        self.shapes[tensor] = (rows, *shape[1:])
        self.dtypes[tensor] = tensor_dtype(file.tensors[name])
        self._place[tensor] = name, part, start
        start += rows
      if start != shape[0]:
        raise UserError(f"{file.path}: {name} has {shape[0]} rows, not {start}")
    for name in file.tensors:
      if name not in used:
        raise UserError(
          f"{file.path}: the tensor {name} is not known in a {file.arch} model "
          "and may change what it computes"
        )

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of a tensor, dequantised, in the order of Transformers."""
    name, part, first = self._place[tensor]
    number, *rest = self.shapes[tensor]
    start, stop, _ = rows.indices(number)
    turned = layout.is_interleaved(part.name, self._file.arch)
    # Whole heads, if their rows change places.
    step = self._config.head_dim if turned else 1
    low, high = start // step * step, -(-stop // step) * step
    data = self._read(name, first + low, first + high)
    data = data.reshape(high - low, *rest)
    if turned:
      data = layout.deinterleave(data, step)
    return data[start - low : stop - low]

  def _read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor of the file, dequantised."""
    found = self._file.tensors[name]
    data = found.data.reshape(int(found.shape[-1]), -1)[start:stop]
    if found.tensor_type.name in PLAIN:
      return np.ascontiguousarray(data).view(jnp.dtype(tensor_dtype(found)))
    return package().quants.dequantize(data, found.tensor_type)


def stored(path: Path, dtype: str | None = None) -> tuple[ModelConfig, Params]:
  """The model of a file, its parameters left there, as `hf.load.stored`.

  Raises:
    UserError: what `File`, `read_config` and `Checkpoint` raise.
  """
  file = File(path)
  config = read_config(file)
  checkpoint = Checkpoint(file, config)
  load.check_tensors(checkpoint, config)
  params: Params = {}
  for (layer, name), place in tensors.places(config).items():
    tree = params
    if layer is not None:
      tree = params.setdefault(axes.layer_name(layer), {})
    kind = jnp.dtype(dtype or checkpoint.dtypes[place.tensor])
    sizes = config.sizes(layer)
    tree[name] = parameters.Stored(checkpoint, name, place, sizes, kind)
  return config, params


def _each(
  file: File, key: str, count: int, default: Any = None
) -> tuple[int, ...]:
  """A size of each layer, which the file gives for each or for all."""
  found = file.size(key, default)
  sizes = tuple(found) if isinstance(found, list | tuple) else (found,) * count
  if len(sizes) < count:
    raise UserError(
      f"{file.path}: {file.arch}.{key} has {len(sizes)} values for {count} "
      "layers"
    )
  return tuple(int(size) for size in sizes[:count])


def _check_heads(file: File, head_dim: int) -> None:
  """Refuses heads of which our layers have no kind."""
  others = {
    "attention.value_length": "values of another size than keys",
    "rope.dimension_count": "rotary embeddings of a part of each head",
  }
  for key, what in others.items():
    if file.size(key, head_dim) != head_dim:
      raise UserError(
        f"{file.path}: {file.arch}.{key}={file.size(key)} with heads of "
        f"{head_dim}: {what} are not supported here"
      )


def _vocab_size(file: File) -> int:
  """Rows of the embedding; the file may say nothing, or less."""
  name = layout.NAMES["embedding"]
  if name not in file.tensors:
    raise UserError(f"{file.path}: the tensor {name} is missing")
  return int(file.tensors[name].shape[-1])


def _biases(file: File) -> dict[str, bool]:
  names = {
    "qkv_bias": layout.NAMES["q_bias"],
    "o_bias": layout.NAMES["o_bias"],
    "gate_up_bias": layout.NAMES["gate_bias"],
    "down_bias": layout.NAMES["down_bias"],
  }
  return {
    bias: any(tensor.endswith(f".{name}") for tensor in file.tensors)
    for bias, name in names.items()
  }


def _ends(file: File) -> tuple[int, ...]:
  """The tokens that end a text, a turn and a message."""
  roles = [
    file.get(f"tokenizer.ggml.{x}_token_id") for x in ("eos", "eot", "eom")
  ]
  return tuple(dict.fromkeys(x for x in roles if x is not None))


def _float(value: float) -> float:
  """A float32 as the shortest decimal that means it."""
  return float(str(np.float32(value)))


def _rope(file: File, head_dim: int) -> Rope:
  """The rotary embedding; LLaMA 3's is in a tensor."""
  theta = _float(file.size("rope.freq_base", 10_000.0))
  kind = file.size("rope.scaling.type", "none")
  factor = file.size("rope.scaling.factor", file.size("rope.scale_linear", 1.0))
  factors = file.tensors.get(layout.ROPE_FACTORS)
  linear = kind == "linear" or (kind == "none" and factor not in (0, 1))
  if linear and factors is None:
    return Rope(theta=theta, kind="linear", factor=_float(factor or 1.0))
  if linear or kind != "none":
    raise UserError(
      f"{file.path}: rope scaling {kind} (factor {factor}) is not supported; "
      "none, linear and LLaMA 3's are, one at a time"
    )
  if factors is None:
    return Rope(theta=theta)
  return llama3_rope(theta, np.asarray(factors.data), head_dim, file.path)


def llama3_rope(
  theta: float, factors: np.ndarray, head_dim: int, path: Path
) -> Rope:
  """The LLaMA 3 rope that slows each frequency by these factors.

  A file has the factors [head_dim / 2] and not the four numbers they come from.
  All models so far have low_freq_factor 1 and high_freq_factor 4 and a context
  that is a power of two; else the line through the frequencies in between gives
  the latter two, with the former 1.

  Raises:
    UserError: no such rope does.
  """
  plain = rope_frequencies(Rope(theta=theta), head_dim)
  largest = float(factors.max())
  if plain.shape != factors.shape or not largest >= 1:
    raise UserError(f"{path}: {layout.ROPE_FACTORS} does not fit the heads")
  if largest == 1:
    return Rope(theta=theta)
  common = functools.partial(
    Rope, theta=theta, kind="llama3", factor=tidy(_float(largest))
  )
  ropes = [common(original_context=2**k) for k in (13, *range(2, 24))]
  between = (factors > 1) & (factors < largest)
  if between.sum() > 1:
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    turns = plain[between] / (2 * np.pi)
    slope, start = np.polyfit(turns.astype(np.float64), smooth, 1)
    high = round(1 - 1 / start, 3)
    context = round(slope * (high - 1))
    ropes.append(common(high_freq_factor=high, original_context=context))
  for rope in ropes:
    ratio = plain / rope_frequencies(rope, head_dim)
    if np.allclose(ratio, factors, rtol=ROPE_ERROR, atol=0):
      return rope
  raise UserError(
    f"{path}: the factors in {layout.ROPE_FACTORS} are none of LLaMA 3's kind"
  )
