"""The language model inside of a multimodal one: its config and its tensors.

What surrounds it (towers for pictures and sound, projectors, heads that guess
several tokens ahead) is left out; what is exported is a plain text model.
"""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import carried, fp8, mxfp4, tensors, turned
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.fields import NONE, Raw, require
from adapt_pruner_jax.formats.hf.files import (
  ALL,
  CONFIG,
  Checkpoint,
  read_object,
  readable,
)
from adapt_pruner_jax.formats.hf.tensor_names import OUTER, OUTER_TOLD
from adapt_pruner_jax.models.model_config import ModelConfig

# Multimodal types: of what type the language model is if its config says none.
WRAPPERS = {
  "gemma3": "gemma3_text",
  "gemma4": "gemma4_text",
  "gemma4_unified": "gemma4_unified_text",
  "mistral3": "mistral",
  **dict.fromkeys(("llava", "llava_next", "llava_next_video"), "llama"),
  **dict.fromkeys(("vipllava", "video_llava"), "llama"),
  **dict.fromkeys(("idefics3", "smolvlm"), "llama"),
  **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "janus"), "llama"),
  **dict.fromkeys(("llava_onevision", "internvl", "ovis2"), "qwen2"),
  **dict.fromkeys(("got_ocr2", "video_llama_3", "pp_chart2table"), "qwen2"),
  # The model's own class passes over logit_scale, that of the text does not,
  # nor do servers: what the config says is meant.
  **dict.fromkeys(("aya_vision", "cohere2_vision"), "cohere2"),
  "exaone4_5": "exaone4",
  "idefics2": "mistral",
  "lighton_ocr": "qwen3",
  **dict.fromkeys(
    ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), "qwen3_5_text"
  ),
  # Sound in place of pictures.
  **dict.fromkeys(("glmasr", "voxtral"), "llama"),
  **dict.fromkeys(("audioflamingo3", "qwen2_audio", "vibevoice_asr"), "qwen2"),
  **dict.fromkeys(("granite_speech", "granite_speech_plus"), "granite"),
  **dict.fromkeys(("fun_asr_nano", "moss_transcribe_diarize"), "qwen3"),
  "qwen3_asr": "qwen3",
  "qwen2_vl": "qwen2_vl_text",
  "qwen2_5_vl": "qwen2_5_vl_text",
  "qwen3_vl": "qwen3_vl_text",
  "qwen3_vl_moe": "qwen3_vl_moe_text",
  "qwen3_5": "qwen3_5_text",
  "qwen3_5_moe": "qwen3_5_moe_text",
  "qwen2_5_omni_thinker": "qwen2_5_omni_text",
  "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
}
# Types with such a one inside, in the field thinker_config, that also speak.
SPEAKING = ("qwen2_5_omni", "qwen3_omni_moe")
THINKER = "thinker_config"
# Those whose class ties the output matrix where the file does not say.
TIE = ("gemma3", "gemma4", "gemma4_unified", "mistral3", "internvl")
TIE += ("aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid")
TIE += ("janus", "got_ocr2", "lighton_ocr", "ovis2", "glmasr", "qwen3_asr")
TIE += ("granite_speech", "granite_speech_plus", "pp_chart2table")
TIE += ("minicpm_ocr", "fun_asr_nano", "moss_transcribe_diarize")
# Those that tie it where the config inside says so.
ASK_INSIDE = ("llava", "llava_next_video", "llava_onevision")
ASK_INSIDE += ("qwen2_vl", "qwen2_5_vl", "video_llama_3")
# Types whose first files have the language model's fields beside the others.
FLAT = ("qwen2_vl", "qwen2_5_vl")
OTHER_PARTS = ("vision_", "image_", "video_")  # how their fields begin
# What SmolVLM's text_config says of the way from pictures to text.
PROJECTOR = ("perceiver_config", "pixel_shuffle_factor", "use_resampler")


def _sizes(V: int, D: int, F: int, L: int, heads: int) -> dict[str, Any]:
  sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F}
  return {**sizes, "num_hidden_layers": L, "num_attention_heads": heads}


QWEN2_VL = {
  **_sizes(152064, 8192, 29568, 80, 64),
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "max_window_layers": 80,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
}
# What is meant by fields that a text_config leaves out, by its type, where the
# family's row has something else or nothing.
ABSENT = {
  "llama": _sizes(32000, 4096, 11008, 32, 32),
  "mistral": _sizes(32000, 4096, 14336, 32, 32),
  "ministral3": _sizes(131072, 4096, 14336, 34, 32),
  "cohere2": _sizes(256000, 8192, 22528, 40, 64),
  "gemma4_unified_text": {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
  },
  **dict.fromkeys(("qwen2", "qwen3"), _sizes(151936, 4096, 22016, 32, 32)),
  **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), QWEN2_VL),
  "qwen3_vl_text": {
    **_sizes(151936, 4096, 22016, 32, 32),
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
  },
  "qwen2_5_omni_text": {
    **_sizes(152064, 3584, 18944, 28, 28),
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "max_window_layers": 28,
  },
  # What its class has for sizes is no model: heads of 73 channels.
  "qwen3_omni_moe_text": {"num_key_value_heads": 4, "norm_topk_prob": True},
  "qwen3_vl_moe_text": {
    **_sizes(151936, 2048, 5632, 24, 16),
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
  },
}
# Types of such parts that are the same function of text as a plain family.
SAME = {
  "qwen2_vl_text": "qwen2",
  "qwen2_5_vl_text": "qwen2",
  "qwen3_vl_text": "qwen3",
  "qwen3_vl_moe_text": "qwen3_moe",
  "qwen2_5_omni_text": "qwen2",
  "qwen3_omni_moe_text": "qwen3_moe",
  "gemma4_unified_text": "gemma4_text",
}
# What such configs say, and their classes pass over.
PASSED = {
  "qwen3_vl_moe_text": ("norm_topk_prob",),
  "qwen2_5_omni_text": ("init_std",),
  "qwen3_omni_moe_text": ("use_qk_norm", "shared_expert_intermediate_size"),
}
# Of the outer config, what the inner one has where it does not say it itself.
INHERITED = (
  *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
  *("dtype", "torch_dtype", "quantization_config", "transformers_version"),
)
# Beginnings of names, by release, and what they are in a plain text model.
BEGINNINGS = {
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.lm_head.": "lm_head.",
  "model.text_model.": "model.",
}
# What old files have beside parameters, in all families.
UNREAD = tuple(
  f"*.rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached")
)
PLAIN = ("model.layers.", "lm_head.", *OUTER_TOLD.values())


def config_of(raw: Raw, path: str) -> Raw:
  """The config.json of the language model; `raw` itself if it is one.

  Raises:
    UserError: a wrapper without the config of its language model; a type that
      is no word.
  """
  raw = _wrapper(raw, path)
  outer = raw.get("model_type")
  require(outer, (str, NONE), "model_type", path)
  if outer not in WRAPPERS:
    return raw
  inner = raw.get("text_config")
  if inner is None and outer in FLAT and "hidden_size" in raw:
    inner = {n: v for n, v in raw.items() if not n.startswith(OTHER_PARTS)}
    del inner["model_type"]
  if not isinstance(inner, dict):
    raise UserError(
      f"{path}: a model of type {outer} needs the field text_config"
    )
  kind = inner.get("model_type", WRAPPERS[outer])
  require(kind, (str,), "text_config.model_type", path)
  # The first two say of what class the whole is, or the part while in there.
  unread = ("architectures", *PROJECTOR, *PASSED.get(kind, ()))
  said = {name: v for name, v in inner.items() if name not in unread}
  made = {**ABSENT.get(kind, {}), **_inherited(raw), **said}
  made["model_type"] = SAME.get(kind, kind)
  for field in ("rope_scaling", "rope_parameters"):
    rope = made.get(field)
    if kind in SAME and isinstance(rope, dict):
      made[field] = _of_text(rope)
  return made


def _wrapper(raw: Raw, path: str) -> Raw:
  """What is around the language model; `raw` unless that is one level lower.

  Raises:
    UserError: it should be there, and is not.
  """
  kind = raw.get("model_type")
  if kind not in SPEAKING:
    return raw
  inner = raw.get(THINKER)
  if not isinstance(inner, dict):
    raise UserError(f"{path}: a model of type {kind} needs the field {THINKER}")
  return {**_inherited(raw), **inner, "model_type": f"{kind}_thinker"}


def _inherited(raw: Raw) -> Raw:
  return {name: raw[name] for name in INHERITED if name in raw}


def tied_as_stored(config: ModelConfig, raw: Raw, folder: Path) -> ModelConfig:
  """With its output matrix tied, or not, as the wrapper's class would have it.

  The wrapper's word counts there, not that of the config inside, in as far as
  the matrix is stored or not: files of Mistral Small say nothing, and have it.

  Args:
    config: of the language model.
    raw: the config.json of the whole, in `folder`.
  """
  raw = _wrapper(raw, CONFIG)
  kind = raw.get("model_type")
  if kind not in WRAPPERS or not any(folder.glob("*.safetensors")):
    return config
  ties = raw.get("tie_word_embeddings", kind in TIE)
  ties = bool(ties) or (config.tied and kind in ASK_INSIDE)
  stored = OUTER["lm_head"] in checkpoint(folder).shapes
  if ties == stored:  # the matrix is stored all the same, or is nowhere
    return config
  return dataclasses.replace(config, tied=ties)


def _of_text(rope: dict[str, Any]) -> dict[str, Any]:
  """A rope of positions in several axes, which text has all alike."""
  names = ("rope_type", "type")
  return {
    name: "default" if name in names and value == "mrope" else value
    for name, value in rope.items()
  }


def checkpoint(folder: Path) -> Any:
  """The tensors of a directory's language model; headers are read, no more.

  Raises:
    UserError: as `files.Checkpoint`; or quantized weights of other kinds than
      are read, or without their scales.
  """
  raw = _wrapper(read_object(folder / CONFIG), CONFIG)
  # Some indices list a tied matrix that is not there.
  heads = {family.outer["lm_head"] for family in FAMILIES.values()}
  names = heads | {f"language_model.{OUTER['lm_head']}"}
  found = Checkpoint(folder, names)
  found = _without_unread(found, raw)
  quantization = raw.get("quantization_config")
  found = mxfp4.unpacked(fp8.dequantized(found, quantization), quantization)
  if raw.get("model_type") not in WRAPPERS:
    return readable(found)
  if raw["model_type"] == "qwen3_vl_moe":
    found = turned.either_way(found, config_of(raw, CONFIG)["hidden_size"])
  return readable(Part(found))


def _without_unread(checkpoint: Checkpoint, raw: Raw) -> Any:
  """Without the tensors that the classes of this model_type pass over."""
  kind = str(raw.get("model_type"))
  unread = UNREAD + (FAMILIES[kind].unread if kind in FAMILIES else ())
  unread += carried.unread(raw)
  names = {
    tensor: tensor
    for tensor in checkpoint.shapes
    if not any(fnmatch.fnmatchcase(tensor, name) for name in unread)
  }
  same = len(names) == len(checkpoint.shapes)
  return checkpoint if same else Renamed(checkpoint, names)


def with_head(checkpoint: Any, config: ModelConfig) -> Any:
  """The checkpoint with its output matrix under the name that is looked for."""
  wanted = tensors.outer_tensor(config, "lm_head")
  others = {OUTER["lm_head"], FAMILIES[config.family].outer["lm_head"]}
  there = others & {*checkpoint.shapes}
  if wanted in there or len(there) != 1:
    return checkpoint
  names = {name: name for name in checkpoint.shapes if name not in there}
  return Renamed(checkpoint, names | {wanted: there.pop()})


class Renamed:
  """Tensors of a checkpoint under other names.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(self, inner: Any, names: dict[str, str]):
    """Takes a checkpoint, and of each new name the one that it has there."""
    self.folder, self._inner, self._names = inner.folder, inner, names
    self.shapes = {new: inner.shapes[old] for new, old in names.items()}
    self.dtypes = {new: inner.dtypes[old] for new, old in names.items()}

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor of this name."""
    return self._inner.array(self._names[tensor], rows)


class Part(Renamed):
  """The tensors of the language model under the names of a plain one.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
    dropped: names of the tensors that are left out.
  """

  def __init__(self, inner: Any):
    """Takes the checkpoint of the whole."""
    plain = {_plain_name(name): name for name in inner.shapes}
    own = {p: name for p, name in plain.items() if p.startswith(PLAIN)}
    self.dropped = sorted({*inner.shapes} - {*own.values()})
    super().__init__(inner, own)

  def say(self) -> None:
    """Says what is left out."""
    roots = sorted({_root(name) for name in self.dropped})
    logging.warning(
      "%s: only the language model is read; %d tensors of other parts (%s) are "
      "left out",
      *(self.folder, len(self.dropped), ", ".join(roots)),
    )


def _plain_name(name: str) -> str:
  name = name.removeprefix("thinker.")
  for beginning, plain in BEGINNINGS.items():
    if name.startswith(beginning):
      return plain + name.removeprefix(beginning)
  return name


def _root(name: str) -> str:
  return name.removeprefix("model.").split(".")[0]
