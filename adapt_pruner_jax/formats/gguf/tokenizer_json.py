"""Makes the tokenizer of a HuggingFace directory of that of a GGUF file."""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import pre_tokenizers
from adapt_pruner_jax.formats.gguf.reader import File
from adapt_pruner_jax.formats.gguf.vocab import (
  BYTE,
  CONTROL,
  NORMAL,
  SPACE,
  UNKNOWN,
  UNUSED,
  USER,
)

KINDS = ("none", "gpt2", "llama")


def make(file: File) -> dict[str, Any] | None:
  """tokenizer.json of a file, None if it has no vocabulary.

  Raises:
    UserError: a kind of tokenizer or pre-tokenizer that is not known.
  """
  kind = file.get("tokenizer.ggml.model", "none")
  if kind not in KINDS:
    raise UserError(
      f"{file.path}: the tokenizer {kind} is not supported; {', '.join(KINDS)} "
      "are. Use the model's HuggingFace directory"
    )
  if kind == "none":
    return None
  tokens = file.get("tokenizer.ggml.tokens")
  types = file.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
  if not tokens or len(tokens) != len(types):
    raise UserError(f"{file.path}: its vocabulary is damaged: get it again")
  parts = _byte_level if kind == "gpt2" else _sentencepiece
  content = parts(file, tokens, types)
  special = (CONTROL, UNKNOWN)
  content["added_tokens"] = [
    _added(i, token, types[i] in special)
    for i, token in enumerate(tokens)
    if types[i] in (*special, USER)
  ]
  begins = content.pop("begins")
  content["post_processor"] = _template(file, tokens, begins)
  return {"version": "1.0", "truncation": None, "padding": None, **content}


def settings(file: File, context: int) -> dict[str, Any]:
  """tokenizer_config.json of a file that has a vocabulary."""
  tokens = file.get("tokenizer.ggml.tokens")
  found = {"tokenizer_class": "PreTrainedTokenizerFast"}
  roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  for role, name in roles.items():
    number = file.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and number < len(tokens):
      found[f"{role}_token"] = tokens[number]
  template = file.get("tokenizer.chat_template")
  if template:
    found["chat_template"] = template
  return {
    **found,
    "clean_up_tokenization_spaces": False,
    "model_max_length": context,
  }


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
  """Ids of tokens; rows that only fill the embedding have none."""
  return {
    token: i
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if not (kind == UNUSED and token == f"[PAD{i}]")
  }


def _byte_level(
  file: File, tokens: list[str], types: list[int]
) -> dict[str, Any]:
  name = file.get("tokenizer.ggml.pre")
  meaning = pre_tokenizers.meaning(name, file.path)
  merges = file.get("tokenizer.ggml.merges")
  if merges is None:
    raise UserError(f"{file.path}: its tokenizer has no merges: get it again")
  return {
    "normalizer": meaning.normalizer,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": meaning.steps},
    "decoder": {**pre_tokenizers.byte_level(True), "add_prefix_space": True},
    "model": {
      **_model(tokens, types),
      "merges": [merge.split(" ", 1) for merge in merges],
      "ignore_merges": meaning.ignore_merges,
    },
    "begins": meaning.begins,
  }


def _sentencepiece(
  file: File, tokens: list[str], types: list[int]
) -> dict[str, Any]:
  scores = file.get("tokenizer.ggml.scores")
  if scores is None or len(scores) != len(tokens):
    raise UserError(f"{file.path}: its tokenizer has no scores: get it again")
  space = file.get("tokenizer.ggml.add_space_prefix", True)
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
  steps = [{"type": "Prepend", "prepend": SPACE}] * bool(space) + [replace]
  back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
  decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
  decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * bool(
    space
  )
  unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
  return {
    "normalizer": {"type": "Sequence", "normalizers": steps},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": decoders},
    "model": {
      **_model(tokens, types),
      "merges": merges_of(tokens, types, scores),
      "unk_token": unknown,
      "fuse_unk": True,
      "byte_fallback": BYTE in types,
      "ignore_merges": False,
    },
    "begins": True,
  }


def merges_of(
  tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
  """Pairs of tokens in the order in which SentencePiece would merge them.

  It takes the pair whose token has the best score, whatever its halves are
  (Transformers' convert_slow_tokenizer, `generate_merges`).
  """
  normal = {t: i for i, t in enumerate(tokens) if types[i] == NORMAL}
  merges = []
  for token in sorted(normal, key=lambda t: (-scores[normal[t]], normal[t])):
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    made = [(a, b) for a, b in halves if a in normal and b in normal]
    merges += sorted(made, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
  return merges


def _model(tokens: list[str], types: list[int]) -> dict[str, Any]:
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "vocab": _vocabulary(tokens, types),
  }


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
  flags = ("single_word", "lstrip", "rstrip", "normalized")
  off = dict.fromkeys(flags, False)
  return {"id": number, "content": token, **off, "special": special}


def _template(
  file: File, tokens: list[str], begins: bool
) -> dict[str, Any] | None:
  """Special tokens around a text; `begins` is what is meant without a word."""
  around = {}
  for role, default in (("bos", begins), ("eos", False)):
    number = file.get(f"tokenizer.ggml.{role}_token_id")
    wanted = file.get(f"tokenizer.ggml.add_{role}_token", default)
    if wanted and number is not None:
      around[role] = tokens[number]
  if not around:
    return None

  def sequence(name: str, kind: int) -> list[dict]:
    special = {
      role: [{"SpecialToken": {"id": token, "type_id": kind}}]
      for role, token in around.items()
    }
    text = [{"Sequence": {"id": name, "type_id": kind}}]
    return special.get("bos", []) + text + special.get("eos", [])

  return {
    "type": "TemplateProcessing",
    "single": sequence("A", 0),
    "pair": sequence("A", 0) + sequence("B", 1),
    "special_tokens": {
      token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
      for token in around.values()
    },
  }
