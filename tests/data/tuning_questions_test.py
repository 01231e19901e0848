"""Questions with choices as rows of tokens."""

import numpy as np
import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.data import tuning_questions
from adapt_pruner_jax.runs import text_checks
from tests.data.words import BOS, V, error, ids_of, write

GOOD = {"question": "w1 w2", "choices": ["w3 w4", "w5"], "answer": 1}
OTHER = {"context": "w6", "choices": ["w7", "w8", "w9"], "answer": 0, "id": 7}


def read(path, rows, tokenizer):
  write(path, rows)
  return tuning_questions.read(f"questions:{path}", tokenizer, V)


def test_rows_and_answers(tmp_path, words):
  found = read(tmp_path / "a.jsonl", [GOOD, OTHER], words)
  first = [BOS, *ids_of("w1", "w2", "w3", "w4")]
  assert found.tokens_NT.shape == (5, 8)
  assert found.tokens_NT[0].tolist() == [*first, 0, 0, 0]
  # The choice's tokens are predicted at the places before them.
  assert found.weights_NT[0].tolist() == [0, 0, 0.2, 0.2, 0, 0, 0]
  assert found.weights_NT[1].tolist() == [0, 0, 0.5, 0, 0, 0, 0]
  assert found.question_N.tolist() == [0, 0, 1, 1, 1]
  assert found.answers_Q.tolist() == [1, 2]
  log_probs = np.full((5, 7), -9.0)
  log_probs[0, 2:4], log_probs[1, 2] = -1.0, -0.9  # .4 and .45 a byte
  log_probs[4, 1] = -1.0
  assert found.accuracy(log_probs) == 0
  log_probs[1, 2] = -0.7
  assert found.accuracy(log_probs) == 0.5


def test_a_long_question_loses_its_beginning(tmp_path, words, monkeypatch):
  monkeypatch.setattr(tuning_questions, "LONGEST", 8)
  row = GOOD | {"question": " ".join(["w1"] * 20)}
  found = read(tmp_path / "a.jsonl", [row], words)
  assert found.tokens_NT[0].tolist() == ids_of(*["w1"] * 6, "w3", "w4")
  assert np.flatnonzero(found.weights_NT[0]).tolist() == [5, 6]


@pytest.mark.parametrize(
  "row",
  [
    ["w1"],
    {"question": "w1", "choices": ["w2", "w3"]},
    GOOD | {"answer": 2},
    GOOD | {"answer": True},
    GOOD | {"choices": ["w3"]},
    GOOD | {"choices": ["w3", ""]},
    GOOD | {"question": ""},
    GOOD | {"context": "w1"},
  ],
)
def test_what_is_no_question(row, tmp_path, words):
  with error("line 2 is no question"):
    read(tmp_path / "a.jsonl", [GOOD, row], words)


def test_none_and_no_file(tmp_path, words):
  with error("has no questions"):
    read(tmp_path / "a.jsonl", [], words)
  with error("b.jsonl"):
    tuning_questions.read(f"questions:{tmp_path}/b.jsonl", words, V)


def test_reported_questions_are_refused(tmp_path, monkeypatch):
  config = Config()
  config.calibration.tuning = f"questions:{tmp_path / 'a.jsonl'}"
  write(tmp_path / "a.jsonl", [GOOD, OTHER])
  config.eval.tasks_dir = str(tmp_path / "tasks")
  (tmp_path / "tasks").mkdir()
  write(tmp_path / "tasks" / "mine.jsonl", [GOOD | {"question": "w9"}])
  text_checks.check_questions(config)
  rows = "not json\n", '"w6"\n', '{"context": "w6", "label": 3}\n'
  write(tmp_path / "tasks" / "mine.jsonl", "".join(rows))
  with error("has a question of"):
    text_checks.check_questions(config)
  monkeypatch.setenv("HOME", str(tmp_path))
  config.eval.tasks_dir = "~/tasks"
  with error("has a question of"):
    text_checks.check_questions(config)
