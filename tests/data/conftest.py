"""The tokenizer of all tests of text."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from tests.data.words import BOS, SPECIALS, TEMPLATE, WORDS, V


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A directory with a tokenizer that has a token a word."""
  folder = tmp_path_factory.mktemp("tokenizer")
  vocab = {word: i for i, word in enumerate(SPECIALS + WORDS)}
  vocab |= {"user": V, "assistant": V + 1}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.add_special_tokens(SPECIALS)
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", BOS)]
  )
  backend.enable_truncation(8)  # as some published files have
  backend.enable_padding(length=16)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": TEMPLATE,
      }
    )
  )
  return folder


@pytest.fixture(scope="session")
def words(folder):
  """Adds <s> before a text, and so windows and rows start with it."""
  return load_tokenizer(folder)


@pytest.fixture(scope="session")
def unbegun(folder):
  """The same with data.bos=none."""
  return load_tokenizer(folder, "none")
