"""Writes the tokenizer of a GGUF file: byte-level BPE and SentencePiece."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from adapt_pruner_jax.data.tokenizer import CONVERTIBLE, load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import pre_tokenizers
from adapt_pruner_jax.formats.gguf.pre_tokenizers import Step, parts
from adapt_pruner_jax.formats.hf import generation_config
from adapt_pruner_jax.formats.hf.files import read_object
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage.confinement import confined

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # SentencePiece's
FLAGS = ("lstrip", "rstrip", "single_word")  # of added tokens, like BERT's mask
Content = Mapping[str, Any]  # of a tokenizer.json


def write(writer: Any, config: ModelConfig, source: Path | None) -> None:
  """Writes the tokenizer of a directory, or that there is none.

  Args:
    writer: a gguf.GGUFWriter.
    source: the directory; what has no tokenizer.json but SentencePiece or
      vocabulary files is converted as for our own use.

  Raises:
    UserError: a kind of tokenizer that llama.cpp is not known to read alike.
  """
  content = None if source is None else _content(source)
  if content is None:
    logging.warning("no tokenizer in %s: the file works with ids only", source)
    writer.add_tokenizer_model("none")
    return
  file = source / "tokenizer.json"
  inner = content["model"]
  if inner["type"] != "BPE" or any(
    inner.get(name)
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
  ):
    raise UserError(
      f"{file} is a {inner['type']} tokenizer; gguf files can hold plain BPE "
      "without dropout and marks of words: use --format=hf_uniform and "
      "llama.cpp's own converter"
    )
  tokens, types = _tokens(content, config, file)
  if inner.get("byte_fallback"):
    space = _space_prefix(content, file)
    _write_sentencepiece(writer, inner, tokens, types)
    writer.add_add_space_prefix(space)
  else:
    merges = [m if isinstance(m, str) else " ".join(m) for m in inner["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizers.name(content, file))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
  _write_special(writer, config, content, source)


def _content(source: Path) -> Content | None:
  if (source / "tokenizer.json").is_file():
    return read_object(source / "tokenizer.json")
  if any((source / name).is_file() for name in CONVERTIBLE):
    return json.loads(load_tokenizer(source).backend.to_str())
  return None


def _tokens(
  content: Content, config: ModelConfig, file: Path
) -> tuple[list[str], list[int]]:
  """A token and its type for each row of the embedding."""
  vocabulary = content["model"]["vocab"]
  tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
  types = [UNUSED] * config.vocab_size
  if max(vocabulary.values(), default=0) >= config.vocab_size:
    raise UserError(
      f"{file} has more tokens than the model's {config.vocab_size}: it is not "
      "this model's"
    )
  for token, number in vocabulary.items():
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
    flags = [flag for flag in FLAGS if added.get(flag)]
    if flags:
      logging.warning(
        "%s: llama.cpp has no %s of a token: texts with %s next to spaces or "
        "letters get other ids",
        *(file, " and ".join(flags), added["content"]),
      )
  return tokens, types


def _write_sentencepiece(
  writer: Any, inner: Content, tokens: list[str], types: list[int]
) -> None:
  """llama.cpp merges the pair with the best score: the earliest merge."""
  merges = [m if isinstance(m, list) else m.split(" ") for m in inner["merges"]]
  scores = [-1.0 - len(merges)] * len(tokens)
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


def _space_prefix(content: Content, file: Path) -> bool:
  """Whether a space comes in front of a text.

  llama.cpp puts it there always, as SentencePiece does; Transformers' Metaspace
  leaves it out where the text begins with one.

  Raises:
    UserError: the text is changed or split in a way that llama.cpp does not.
  """
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
  prepend = {"type": "Prepend", "prepend": SPACE}
  normal = parts(content, "normalizer", "normalizers")
  split = parts(content, "pre_tokenizer", "pretokenizers")
  if normal in ([replace], [prepend, replace]) and not split:
    return begins_with_space(content)
  metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
  if not normal and len(split) == 1 and metaspace.items() <= split[0].items():
    return begins_with_space(content)
  kinds = [str(step.get("type")) for step in [*normal, *split]]
  raise UserError(
    f"{file}: llama.cpp is not known to split texts like this SentencePiece "
    f"tokenizer ({', '.join(kinds) or 'spaces are kept'}); use "
    "--format=hf_uniform and llama.cpp's own converter"
  )


def begins_with_special(content: Content) -> bool:
  """Whether tokenizer.json puts a special token in front of a text."""
  template = _template(content)
  return bool(template) and "SpecialToken" in template[0]


def begins_with_space(content: Content) -> bool:
  """Whether tokenizer.json puts a space in front of a text."""
  normal = parts(content, "normalizer", "normalizers")
  split = parts(content, "pre_tokenizer", "pretokenizers")
  return any(step.get("type") == "Prepend" for step in normal) or any(
    step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
    for step in split
  )


def _template(content: Content) -> list[Step]:
  """What tokenizer.json makes of a text: special tokens and the text."""
  steps = parts(content, "post_processor", "processors")
  return next((step["single"] for step in steps if step.get("single")), [])


def _write_special(
  writer: Any, config: ModelConfig, content: Content, source: Path
) -> None:
  settings = _optional(source / "tokenizer_config.json")
  begin = _id(content, settings.get("bos_token"))
  if config.bos_id is not None:
    begin = config.bos_id
  if begins_with_special(content):
    begin = _id(content, _template(content)[0]["SpecialToken"]["id"])
  ends = end_tokens(config, content, source)
  numbers = {"bos": begin, "pad": config.pad_id}
  numbers |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
  for role, number in numbers.items():
    if _has(config, number):
      getattr(writer, f"add_{role}_token_id")(number)
  if ends[3:]:
    logging.warning(
      "a gguf file names three end tokens; left out are %s",
      ", ".join(map(str, ends[3:])),
    )
  writer.add_add_bos_token(begins_with_special(content) and _has(config, begin))
  template = _template(content)
  if len(template) > 1 and "SpecialToken" in template[-1]:
    writer.add_add_eos_token(True)
  chat = source / "chat_template.jinja"
  if chat.is_file():
    template = confined(chat, source).read_text(encoding="utf-8")
    writer.add_chat_template(template)
  elif settings.get("chat_template"):  # one, or several with names
    writer.add_chat_template(settings["chat_template"])


def _has(config: ModelConfig, token: int | None) -> bool:
  """Whether the model has this token; some configs say -1 for none."""
  return token is not None and 0 <= token < config.vocab_size


def end_tokens(
  config: ModelConfig, content: Content, source: Path
) -> tuple[int, ...]:
  """The tokens that end a text, those of `generation_config.end_tokens`.

  The tokenizer's own comes first: it is what chat templates mean by eos_token.
  """
  settings = _optional(source / "tokenizer_config.json")
  own = _id(content, settings.get("eos_token"))
  ends = generation_config.end_tokens(source, config, None)
  ends = ends or ((own,) if own is not None else ())
  ends = tuple(end for end in ends if _has(config, end))
  return tuple(sorted(ends, key=lambda end: end != own))


def _id(content: Content, token: Any) -> int | None:
  if isinstance(token, dict):  # a serialised AddedToken
    token = token.get("content")
  added = {x["content"]: x["id"] for x in content["added_tokens"]}
  return added.get(token, content["model"]["vocab"].get(token))


def _optional(file: Path) -> dict[str, Any]:
  return read_object(file) if file.is_file() else {}
