"""Questions with choices, by which a quality to keep is measured.

A line of the file is {"question": TEXT, "choices": [TEXT, TEXT, ...],
"answer": 0}, `answer` the index of the right choice; "context" in place of
"question" is a text that the choices continue. A model answers with the choice
of which the log-probability behind the question, by byte, is the highest
(lm-eval's acc_norm).
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner_jax.data import files
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.errors import UserError

PREFIX = "questions:"  # of a source
STEMS = ("question", "context")
LONGEST = 1024  # tokens of a question and a choice; more lose their beginning
MULTIPLE = 8  # of tokens that rows are padded to


@dataclasses.dataclass(frozen=True, eq=False)
class TuningQuestions:
  """Choices as rows of tokens, those of a question behind one another.

  Attributes:
    tokens_NT: each behind its question; 0 at the end.
    weights_NT: of the log-probabilities of tokens_NT[:, 1:] in a choice's
      score: one over its bytes where it is, else 0.
    question_N: which question a row is of.
    answers_Q: the row that is right.
  """

  tokens_NT: np.ndarray
  weights_NT: np.ndarray
  question_N: np.ndarray
  answers_Q: np.ndarray

  def accuracy(self, log_probs_NT: np.ndarray) -> float:
    """The share of the questions whose right choice has the highest score.

    Args:
      log_probs_NT: of tokens_NT[:, 1:].
    """
    score_N = (np.float64(log_probs_NT) * self.weights_NT).sum(1)
    right = 0
    for number, answer in enumerate(self.answers_Q):
      rows = np.flatnonzero(self.question_N == number)
      right += int(rows[score_N[rows].argmax()] == answer)
    return right / len(self.answers_Q)


def read(source: str, tokenizer: Tokenizer, vocab_size: int) -> TuningQuestions:
  """Reads and encodes the questions of a source, `questions:FILE`.

  Args:
    source: of the recipe.
    tokenizer: its begin token is in front of each row, if it has one.
    vocab_size: of the model; larger ids are an error.

  Raises:
    UserError: the file cannot be read, or a line is no question.
  """
  path = source.removeprefix(PREFIX)
  rows, question_N, answers = [], [], []
  begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
  for stem, choices, answer in _questions(path):
    answers.append(len(rows) + answer)
    asked = len(tokenizer.encode_plain(stem))
    for choice in choices:
      ids = tokenizer.encode_plain(f"{stem} {choice}")
      rows.append((begin + ids, len(ids) - asked, len(choice.encode())))
      question_N.append(len(answers) - 1)
  if not rows:
    raise UserError(f"{source} has no questions")
  longest = min(max(len(ids) for ids, _, _ in rows), LONGEST)
  tokens_NT = np.zeros(
    (len(rows), -(-longest // MULTIPLE) * MULTIPLE), np.int32
  )
  weights_NT = np.zeros(tokens_NT[:, 1:].shape)
  for n, (ids, said, size) in enumerate(rows):
    ids = ids[-longest:]
    tokens_NT[n, : len(ids)] = ids
    first = max(len(ids) - said - 1, 0)
    weights_NT[n, first : len(ids) - 1] = 1 / size
  check_ids(tokens_NT, vocab_size, source)
  return TuningQuestions(
    tokens_NT, weights_NT, np.array(question_N), np.array(answers)
  )


def shared(source: str, folder: Path) -> str:
  """The first question of a source that a folder's files have too; "" = none.

  Args:
    folder: of jsonl files, as `eval.tasks_dir`.
  """
  stems = {stem for stem, _, _ in _questions(source.removeprefix(PREFIX))}
  for file in sorted(folder.glob("*.jsonl")):
    for line in files.lines(file):
      try:
        row = json.loads(line)
      except ValueError:
        continue  # who reads it says so
      if isinstance(row, dict) and (found := stems & {*_stems(row)}):
        return f"{file}: {found.pop()}"
  return ""


def _questions(path: str) -> Iterator[tuple[str, list[str], int]]:
  """(question, choices, index of the right one) of each line."""
  for where, row in files.json_rows(path):
    row = row if isinstance(row, dict) else {}
    stems = _stems(row)
    choices, answer = row.get("choices"), row.get("answer")
    if (
      len(stems) != 1
      or not isinstance(choices, list)
      or len(choices) < 2
      or not all(isinstance(c, str) and c for c in choices)
      or type(answer) is not int
      or not 0 <= answer < len(choices)
    ):
      raise UserError(
        f"{where} is no question: it must have question (or context), a text, "
        "choices, a list of two texts or more, and answer, the index of the "
        "right one from 0"
      )
    yield stems[0], choices, answer


def _stems(row: dict[str, Any]) -> list[str]:
  return [row[n] for n in STEMS if isinstance(row.get(n), str) and row[n]]
