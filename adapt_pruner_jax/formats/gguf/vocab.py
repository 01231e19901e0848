"""The tokenizer of a GGUF file: byte-level BPE and SentencePiece."""

import json
from pathlib import Path
from typing import Any

from absl import logging

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.model_config import ModelConfig

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# llama.cpp's name of a pre-tokenizer, by a piece of its regular expression that
# no other has; first match first. Without the name texts are split wrongly.
PRE_TOKENIZERS = (
  (r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*", "llama-bpe"),
  (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*", "qwen2"),
)


def write(writer: Any, config: ModelConfig, source: Path | None) -> None:
  """Writes the tokenizer of a directory, or that there is none.

  Raises:
    UserError: a kind of tokenizer that llama.cpp is not known to read alike.
  """
  file = None if source is None else source / "tokenizer.json"
  if file is None or not file.is_file():
    logging.warning(
      "no tokenizer.json in %s: the file works with token ids only", source
    )
    writer.add_tokenizer_model("none")
    return
  content = json.loads(file.read_text(encoding="utf-8"))
  inner = content["model"]
  if inner["type"] != "BPE":
    raise UserError(
      f"{file} is a {inner['type']} tokenizer; gguf files can hold BPE: use "
      "--format=hf_uniform and llama.cpp's own converter"
    )
  tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
  types = [UNUSED] * config.vocab_size
  if max(inner["vocab"].values(), default=0) >= config.vocab_size:
    raise UserError(
      f"{file} has more tokens than the model's {config.vocab_size}: it is not "
      "this model's"
    )
  for token, number in inner["vocab"].items():
    tokens[number], types[number] = token, NORMAL
  for added in content["added_tokens"]:
    if added["id"] >= config.vocab_size:
      logging.warning(
        "%s: the model has no embedding of %s, which is left out",
        file,
        added["content"],
      )
      continue
    tokens[added["id"]] = added["content"]
    types[added["id"]] = CONTROL if added["special"] else USER
  if inner.get("byte_fallback"):
    _write_sentencepiece(writer, inner, tokens, types)
  else:
    _write_byte_level(writer, content, file, tokens, types)
  _write_special(writer, config, content, source)


def _write_sentencepiece(
  writer: Any, inner: dict, tokens: list[str], types: list[int]
) -> None:
  """llama.cpp merges the pair with the best score: the earliest merge."""
  merges = [m if isinstance(m, list) else m.split(" ") for m in inner["merges"]]
  scores = [0.0] * len(tokens)
  number = {token: i for i, token in enumerate(tokens)}
  for rank, (left, right) in reversed(list(enumerate(merges))):
    scores[number[left + right]] = -1.0 - rank
  for i, token in enumerate(tokens):
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
      types[i] = BYTE
    elif token == inner["unk_token"]:
      types[i] = UNKNOWN
      writer.add_unk_token_id(i)
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  writer.add_token_list(tokens)
  writer.add_token_scores(scores)
  writer.add_token_types(types)


def _write_byte_level(
  writer: Any, content: dict, file: Path, tokens: list[str], types: list[int]
) -> None:
  merges = [
    m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]
  ]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre_tokenizer(content["pre_tokenizer"], file))
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(merges)


def pre_tokenizer(settings: dict | None, file: Path) -> str:
  """llama.cpp's name for how a byte-level tokenizer splits a text.

  Raises:
    UserError: none is known to do the same.
  """
  steps = _steps(settings, "pretokenizers")
  patterns = [
    s["pattern"]["Regex"] for s in steps if "Regex" in s.get("pattern", {})
  ]
  kinds = [step.get("type") for step in steps]
  if not patterns and kinds == ["ByteLevel"]:
    return "gpt-2"
  if not patterns and kinds == ["Digits", "ByteLevel"]:
    return "smollm"
  for piece, name in PRE_TOKENIZERS:
    if any(piece in pattern for pattern in patterns):
      return name
  raise UserError(
    f"{file}: no pre-tokenizer of llama.cpp is known to split texts like this "
    f"one ({', '.join(map(str, kinds))}); use --format=hf_uniform and "
    "llama.cpp's own converter"
  )


def begins_with_special(content: dict) -> bool:
  """Whether tokenizer.json puts a special token in front of a text."""
  steps = _steps(content.get("post_processor"), "processors")
  templates = [step["single"] for step in steps if step.get("single")]
  return any("SpecialToken" in template[0] for template in templates)


def begins_with_space(content: dict) -> bool:
  """Whether tokenizer.json puts a space in front of a text."""
  normal = _steps(content.get("normalizer"), "normalizers")
  split = _steps(content.get("pre_tokenizer"), "pretokenizers")
  return any(step.get("type") == "Prepend" for step in normal) or any(
    step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
    for step in split
  )


def _steps(part: dict | None, name: str) -> list[dict]:
  """What a part of tokenizer.json does: its steps `name`, or itself alone."""
  part = part or {}
  return part.get(name, [part])


def _write_special(
  writer: Any, config: ModelConfig, content: dict, source: Path
) -> None:
  if config.bos_id is not None:
    writer.add_bos_token_id(config.bos_id)
  if config.eos_ids:
    writer.add_eos_token_id(config.eos_ids[0])
  if config.pad_id is not None:
    writer.add_pad_token_id(config.pad_id)
  writer.add_add_bos_token(begins_with_special(content))
  if content["model"].get("byte_fallback"):
    writer.add_add_space_prefix(begins_with_space(content))
  settings = source / "tokenizer_config.json"
  chat = source / "chat_template.jinja"
  if chat.is_file():
    writer.add_chat_template(chat.read_text(encoding="utf-8"))
  elif settings.is_file():
    template = json.loads(settings.read_text(encoding="utf-8")).get(
      "chat_template"
    )
    if isinstance(template, str):
      writer.add_chat_template(template)
