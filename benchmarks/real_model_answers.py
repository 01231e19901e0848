"""Prompts made of a text, and what the dense model answers to them."""

import itertools
from pathlib import Path
from typing import Any

from real_model_texts import MARK, c4

from adapt_pruner_jax.data import sources
from adapt_pruner_jax.evaluation import answers

QUESTIONS = (
  "Summarize this text in a few sentences.",
  "What is this text about, and who would read it?",
  "Continue this text.",
  "Explain the main point of this text to a child.",
)
NUMBER = 400
QUOTED = 60  # words
ANSWER = 96  # tokens at most


def prompts(data: Path, end: int) -> list[dict]:
  """Questions about documents before a byte of the sample of C4."""
  documents = c4(data, 0, end).split(MARK)[:NUMBER]
  return [
    {"prompt": f"{question}\n\n{' '.join(document.split()[:QUOTED])}"}
    for document, question in zip(
      documents, itertools.cycle(QUESTIONS), strict=False
    )
  ]


def answered(
  file: Path, split: str, dense: Any, model: Path, tokenizer: Any
) -> Path:
  """Answers to a file's prompts, `train` or one of five `heldout`, beside it.

  Args:
    dense: the model of the directory `model`.
  """
  spec = f"self:{file},split={split},max_new_tokens={ANSWER}"
  (source,) = sources.parse_sources(spec, "data.source")
  asked = answers.request(
    source, dense[0], model, tokenizer, [str(model)], file.parent
  )
  if not answers.is_written(asked):
    answers.write(asked, *dense)
  return asked.file
