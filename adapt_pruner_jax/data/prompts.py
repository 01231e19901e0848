"""Prompts that a dense model answers: of a file, or the short list of ours."""

import itertools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

from adapt_pruner_jax.data import files
from adapt_pruner_jax.data.rows import to_prompt
from adapt_pruner_jax.data.sources import Source
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError

OURS = Path(__file__).with_name("prompts.jsonl")
HELDOUT = 5  # one of so many prompts is held out


class Prompt(NamedTuple):
  """Holds what is asked, and how the model reads it."""

  messages: list[dict]
  tokens: list[int]


def read_prompts(source: Source, tokenizer: Tokenizer) -> list[Prompt]:
  """Reads and encodes the prompts of a `self` source, each once.

  They are laid out by the model's chat template, up to where the assistant
  speaks, and begin with the tokenizer's begin token as training rows do.

  Raises:
    UserError: there are none, a row is no prompt, or the model has no chat
      template.
  """
  if tokenizer.chat_template is None:
    raise UserError(
      f"{source}: {tokenizer.path} has no chat template, so nothing can be "
      "asked of it; put its chat_template.jinja there, or learn from texts "
      "(text:FILE, jsonl:FILE)"
    )
  if source.name:
    paths = files.files_of("jsonl", source.name)
  else:
    paths = [OURS]
  found: dict[str, Prompt] = {}
  number = 0
  for where, row in itertools.chain(*map(files.json_rows, paths)):
    messages, tools = to_prompt(where, row)
    number += 1
    if not _in_split(messages, source.split):
      continue
    try:
      text = tokenizer.render_chat(messages, tools, prompt=True)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    ids, begin = tokenizer.encode_plain(text), tokenizer.begin_id
    if begin is not None and ids[:1] != [begin]:
      ids = [begin, *ids]
    found.setdefault(text, Prompt(messages, ids))
    if len(found) == source.limit:
      break
  if not found:
    hint = f"; all are with split=all, not {source.split}" if number else ""
    raise UserError(f"{source} has no prompts: {number} rows{hint}")
  return list(found.values())


def _in_split(messages: list[dict], split: str) -> bool:
  """Whether a prompt is of a split; by its words, wherever it stands."""
  if split == "all":
    return True
  words = json.dumps(messages, sort_keys=True)
  return (zlib.crc32(words.encode()) % HELDOUT == 0) == (split == "heldout")
