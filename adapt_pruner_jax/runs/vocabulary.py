"""The vocabulary of a run's model: cut before anything is pruned.

What is left is a directory in the work directory's cache that is opened like
the original's. It follows from the recipe, so that a run that goes on finds the
one that it began with; what it has of the original is in kept.json at the end.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adapt_pruner_jax.config import Config, vocab_size
from adapt_pruner_jax.data import vocabulary
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import cut_vocabulary
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import digest, json_files, publish
from adapt_pruner_jax.storage.cache import tokens


def cut(
  recipe: Config,
  source: Path,
  full: ModelConfig,
  tokenizer: Tokenizer,
  cache: Path,
  say: Callable[[str], None],
) -> Path:
  """Cuts the model's vocabulary as `recipe.vocab` says.

  Args:
    recipe: of the run.
    source, full, tokenizer: of the original model.
    cache: of the work directory.
    say: is told how many tokens go.

  Returns:
    The directory of the model with the tokens that are left.

  Raises:
    UserError: the tokenizer is of a kind that cannot be cut, the corpus cannot
      be read or does not fit it, or too few tokens would be left.
  """
  content = vocabulary.read(source)
  keep = vocab_size(recipe.vocab, full.vocab_size)
  corpus = parse_sources(*_corpus(recipe))
  if corpus[0].kind == "npy":
    raise UserError(
      f"--config.{_corpus(recipe)[1]}={corpus[0]}: a file of token ids says "
      "nothing of a vocabulary that is to be cut; give the text, such as "
      "text:FILE"
    )
  share_V = vocabulary.frequencies(
    corpus, tokenizer, full.vocab_size, tokens(cache.parent), say
  )
  always = vocabulary.necessary(
    content, tokenizer, cut_vocabulary.named_ids(source)
  )
  kept = vocabulary.choose(share_V, content, always, keep)
  key = json.dumps([str(source.resolve()), tokenizer.fingerprint])
  key += digest.of_bytes(kept)
  key += digest.of_parts(cut_vocabulary.read_from(source))
  folder = cache / f"vocabulary-{digest.of_bytes(key.encode())[:16]}"

  def write() -> None:
    if not folder.is_dir():
      cache.mkdir(parents=True, exist_ok=True)
      made = vocabulary.cut(content, kept)
      cut_vocabulary.write(source, folder, kept, made, full.tied)

  agreement.on_writer(write)
  publish.require_shared(folder)
  say(
    f"vocabulary: {keep:,} of {full.vocab_size:,} tokens stay, which are "
    f"{share_V[kept].sum():.2%} of those of {', '.join(map(str, corpus))}"
  )
  return folder


def _corpus(recipe: Config) -> tuple[str, str]:
  """What the vocabulary is for, and the field that says so."""
  if recipe.vocab.source:
    return recipe.vocab.source, "vocab.source"
  return recipe.calibration.source, "calibration.source"


def kept(folder: Path) -> list[int]:
  """The original's ids of the tokens in a directory that `cut` returned."""
  return json_files.read_json(folder / cut_vocabulary.KEPT)


def fingerprint(folder: Path) -> str:
  """A digest of them."""
  return digest.of_bytes(np.array(kept(folder), "<i4"))
