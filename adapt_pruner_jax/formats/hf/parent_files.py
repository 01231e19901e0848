"""What an export takes over from its parent: tokenizer, licence, settings.

Files are copied as they are. Which fixes Transformers applies to a tokenizer
depends on fields of config.json as well, so these are taken over too, and the
ids of a text are compared.
"""

import shutil
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import first_line
from adapt_pruner_jax.formats.hf.files import (
  CONFIG,
  LICENCES,
  MANIFEST,
  read_object,
)
from adapt_pruner_jax.storage.confinement import confined

TOKENIZER = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "spiece.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  "additional_chat_templates/*.jinja",  # by name, such as tool_use
)
# Fields of config.json by which Transformers chooses a tokenizer's class and
# whether the mistakes of older versions are put right.
TOKENIZER_FIELDS = ("tokenizer_class", "transformers_version")
TEXT = (
  "In 2024, 1234567 cats  ate 3.14 pies\n\n\tand don't\r\n   say "
  "“Straße, 日本語, 🙂” <b>x</b>1 2"
)


def copy_all(source: Path | None, folder: Path) -> list[str]:
  """Copies what goes along with the weights; says what is missing."""
  if source is None:
    return ["no tokenizer is written: the model came without a directory"]
  _copy(source, folder, ("generation_config.json", *LICENCES))
  if not copy_tokenizer(source, folder):
    return [f"no tokenizer is written: {source} has none"]
  return []


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
  """Copies the tokenizer's files; returns their names.

  Raises:
    UserError: one of them is a link to another place.
  """
  return _copy(source, folder, TOKENIZER)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
  return [f for p in patterns for f in folder.glob(p) if f.is_file()]


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> list[str]:
  found = _files(source, patterns)
  for file in found:
    copy = folder / file.relative_to(source)
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(confined(file, source), copy)
  return [file.name for file in found]


def tokenizer_fields(source: Path | None) -> dict[str, Any]:
  """The fields of the parent's config.json that its tokenizer depends on."""
  raw = _description(source)
  raw = raw.get("tokenizer", raw)  # where an orbax directory keeps them
  return {n: raw[n] for n in TOKENIZER_FIELDS if isinstance(raw.get(n), str)}


def _description(source: Path | None) -> dict[str, Any]:
  """What a model directory's config.json, or model.json, holds."""
  for name in (CONFIG, MANIFEST):
    if source is not None and (source / name).is_file():
      return read_object(source / name)
  return {}


def compare_tokenizers(source: Path | None, folder: Path) -> list[str]:
  """Compares the ids that Transformers gives for a text in both directories.

  Nothing is compared where Transformers cannot open the parent's tokenizer, or
  makes an empty one of no files (of Idefics 2).

  Returns:
    A line if they differ because the model is of another type now.

  Raises:
    RuntimeError: they differ though it is not.
  """
  parent = _description(source).get("model_type")
  if source is None or parent is None or not _files(source, TOKENIZER):
    return []
  tokenizer, _ = _opened(source)
  if tokenizer is None:
    return []
  special = tokenizer.all_special_tokens
  texts = [TEXT, *(f"a{t} b{t}{t}\n{t}c" for t in special)]
  again, why = _opened(folder)
  if again is None:
    raise RuntimeError(f"the tokenizer of {folder} cannot be opened: {why}")
  if all(tokenizer(t).input_ids == again(t).input_ids for t in texts):
    return []
  kind = _description(folder)["model_type"]
  if kind == parent:
    raise RuntimeError(
      f"Transformers reads other tokens from {folder} than from {source}"
    )
  return [
    f"Transformers reads this tokenizer in another way than in {source}, where "
    f"it belongs to a model of type {parent}, here to {kind}: compare both on "
    "your texts"
  ]


def _opened(folder: Path) -> tuple[Any, str]:
  """The tokenizer as Transformers opens it, or None and why not."""
  import transformers

  verbosity = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  try:
    return transformers.AutoTokenizer.from_pretrained(
      str(folder), trust_remote_code=False, local_files_only=True
    ), ""
  except Exception as error:  # it raises a dozen kinds
    return None, first_line(error)
  finally:
    transformers.logging.set_verbosity(verbosity)
