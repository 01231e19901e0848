"""What llama.cpp's names of pre-tokenizers mean, as parts of tokenizer.json.

A name stands for the whole of normalizer, pre-tokenizer and whether a word that
is a token is taken without merging (llama.cpp, src/llama-vocab.cpp). A
tokenizer gets a name only if all of that is equal: a text that is split in
another way has other ids, and no program would say so.

llama.cpp itself never normalizes: the NFC of Qwen's tokenizers is part of what
is meant, and is missed only by texts with characters taken apart.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError

Step = Mapping[str, Any]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
  CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
)
QWEN2 = (
  CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
)
_UPPER, _LOWER = (
  r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}


def byte_level(words: bool) -> Step:
  """Bytes as characters; `words`: also split as GPT-2 does."""
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": words,
  }


def _split(pattern: str) -> list[Step]:
  step = {
    "type": "Split",
    "pattern": {"Regex": pattern},
    "behavior": "Isolated",
    "invert": False,
  }
  return [step, byte_level(False)]


@dataclasses.dataclass(frozen=True)
class Meaning:
  """Parts of tokenizer.json that a name stands for.

  Attributes:
    begins: whether a begin token comes first if the file does not say.
  """

  steps: list[Step]
  normalizer: Step | None = None
  ignore_merges: bool = False
  begins: bool = False


# Of names that mean the same the first is written; all are read.
MEANINGS = {
  "gpt-2": Meaning([byte_level(True)]),
  "mpt": Meaning([byte_level(True)], NFC),
  "smollm": Meaning([DIGITS, byte_level(True)]),
  "llama-bpe": Meaning(_split(LLAMA3), ignore_merges=True, begins=True),
  "dbrx": Meaning(_split(LLAMA3)),
  "qwen2": Meaning(_split(QWEN2), NFC),
  "stablelm2": Meaning(_split(QWEN2)),
  "tekken": Meaning(_split(TEKKEN), ignore_merges=True, begins=True),
}
SYNONYMS = {
  "starcoder": "smollm",
  "refact": "smollm",
  "command-r": "smollm",
  "codeshell": "smollm",
  "exaone": "smollm",
  "minerva-7b": "smollm",
  "gpt2": "gpt-2",
  "phi-2": "gpt-2",
  "jina-es": "gpt-2",
  "jina-de": "gpt-2",
  "olmo": "mpt",
  "smaug-bpe": "dbrx",
  "llama3": "llama-bpe",
  "llama-v3": "llama-bpe",
  "deepseek-r1-qwen": "qwen2",
}


def meaning(name: str | None, file: Path) -> Meaning:
  """What a name in a GGUF file stands for.

  Raises:
    UserError: it is not known here, or the file has none.
  """
  found = MEANINGS.get(SYNONYMS.get(name, name))
  if found is None:
    raise UserError(
      f"{file}: its pre-tokenizer {name or '(no name: an old file)'} "
      f"is not known; known: {', '.join(sorted({*MEANINGS, *SYNONYMS}))}. "
      "Use the model's HuggingFace directory"
    )
  return found


def name(content: Mapping[str, Any], file: Path) -> str:
  """llama.cpp's name for how a byte-level tokenizer.json treats a text.

  Raises:
    UserError: none means the same; says what differs and what to do.
  """
  steps = [_plain(s) for s in parts(content, "pre_tokenizer", "pretokenizers")]
  normalizer = parts(content, "normalizer", "normalizers")
  ignore = bool(content["model"].get("ignore_merges"))
  for known, means in MEANINGS.items():
    wanted = [means.normalizer] if means.normalizer else []
    same_words = steps == [_plain(step) for step in means.steps]
    if same_words and normalizer == wanted and ignore == means.ignore_merges:
      return known
  does = [_short(step) for step in [*normalizer, *steps]]
  does += ["ignore_merges"] * ignore
  raise UserError(
    f"{file}: no pre-tokenizer of llama.cpp is known to split texts like this "
    f"one ({', '.join(does) or 'none'}); use --format=hf_uniform and "
    "llama.cpp's own converter, or leave the tokenizer out of the folder and "
    "give llama.cpp token ids"
  )


def parts(content: Mapping[str, Any], part: str, inner: str) -> list[Step]:
  """The steps of a part of tokenizer.json, also of sequences in sequences."""
  found: list[Step] = []

  def add(step: Step | None) -> None:
    if step and inner in step:
      for each in step[inner]:
        add(each)
    elif step:
      found.append(step)

  add(content.get(part))
  return found


def _plain(step: Step) -> dict[str, Any]:
  """A step with its defaults, without what only concerns offsets."""
  defaults = {
    "ByteLevel": {"use_regex": True, "add_prefix_space": True},
    "Split": {"invert": False},
    "Digits": {"individual_digits": False},
  }
  full = {**defaults.get(str(step.get("type")), {}), **step}
  full.pop("trim_offsets", None)
  return full


def _short(step: Step) -> str:
  """A step in a few words, for a message."""
  told = {k: v for k, v in _plain(step).items() if k not in ("type", "pattern")}
  pattern = str(next(iter(step.get("pattern", {"": ""}).values())))
  words = [f"{k}={v}" for k, v in told.items()]
  words += [pattern if len(pattern) < 40 else f"{pattern[:37]}..."] * bool(
    pattern
  )
  return f"{step.get('type')}({' '.join(words)})"
