import json
from unittest import mock

import pytest

pytest.importorskip("lm_eval")
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import lm_eval_run, lm_eval_tasks, presets
from adapt_pruner_jax.evaluation.questions import Questions

ARC = {"question": "What falls?", "choices": ["rain", "sky"], "answer": 0}
HELLASWAG = {
  "context": "Jumping: A man runs [title] He stops. the man",
  "choices": ["jumps [step] up.", "flies."],
  "answer": 1,
}


def write(folder, name, *rows):
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / f"{name}.jsonl").write_text(lines, "utf-8-sig")
  return str(folder)


def load_one(name, folder):
  return lm_eval_tasks.load([name], Questions(str(folder)))["tasks"][name]


@pytest.mark.parametrize(
  "name, row, prompt, choices, target",
  [
    (
      "arc_easy",
      ARC,
      "Question: What falls?\nAnswer:",
      ["rain", "sky"],
      0,
    ),
    ("openbookqa", ARC, "What falls?", ["rain", "sky"], 0),
    (
      "hellaswag",
      HELLASWAG,
      "Jumping: A man runs. He stops. The man",
      ["jumps up.", "flies."],
      1,
    ),
    (
      "piqa",
      ARC | {"answer": 1},
      "Question: What falls?\nAnswer:",
      ["rain", "sky"],
      1,
    ),
    (
      "winogrande",
      {"sentence": "Al hit _ hard.", "choices": ["Bo", "Cy"], "answer": 1},
      1,
      ["Al hit Bo", "Al hit Cy"],
      "hard.",
    ),
    (
      "social_iqa",
      {
        "context": "Al fell.",
        "question": "Why?",
        "choices": ["a", "b", "c"],
        "answer": 2,
      },
      "Q: Al fell. Why?\nA:",
      ["a", "b", "c"],
      2,
    ),
    (
      "boolq",
      {"passage": "P.", "question": "q", "choices": ["no", "yes"], "answer": 1},
      "P.\nQuestion: q?\nAnswer:",
      ["no", "yes"],
      1,
    ),
  ],
)
def test_prompts_of_plain_rows(tmp_path, name, row, prompt, choices, target):
  """Written by hand after the papers' and lm-eval's published prompts."""
  task = load_one(name, write(tmp_path, name, row))
  (doc,) = task.eval_docs
  assert task.doc_to_text(doc) == prompt
  assert task.doc_to_choice(doc) == choices
  assert task.doc_to_target(doc) in (target, str(target))


def test_official_rows_are_taken_as_they_are(tmp_path):
  row = {
    "question": "What falls?",
    "choices": {"text": ["rain", "sky"], "label": ["1", "2"]},
    "answerKey": "2",
  }
  task = load_one("arc_easy", write(tmp_path, "arc_easy", row))
  assert task.doc_to_target(task.eval_docs[0]) in (1, "1")


def test_wikitext_from_a_file(tmp_path):
  row = {"page": "A dog @-@ house , it is ."}
  task = load_one("wikitext", write(tmp_path, "wikitext", row))
  assert task.doc_to_target(task.eval_docs[0]) == "A dog-house, it is ."


def test_mmlu_subjects_share_files_and_show_examples(tmp_path):
  def row(subject, i):
    question = f"{subject} {i}?"
    choices = ["a", "b", "c", "d"]
    return {
      "subject": subject,
      "question": question,
      "choices": choices,
      "answer": i % 4,
    }

  write(tmp_path, "mmlu_test", row("anatomy", 0), row("virology", 1))
  write(tmp_path, "mmlu_dev", *(row("anatomy", i) for i in range(2, 7)))
  task = load_one("mmlu_anatomy", tmp_path)
  assert len(task.eval_docs) == 1
  task.set_config(key="num_fewshot", value=2)
  lm_eval_tasks.check_fewshot(task, 5)
  shown = task.fewshot_context(task.eval_docs[0], 2)
  assert shown.startswith(
    "The following are multiple choice questions (with answers) about anatomy."
    "\n\nanatomy 2?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\nanatomy 3?"
  )
  assert shown.endswith("anatomy 0?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
  with pytest.raises(
    UserError, match=r"6 examples .* have 5; .*mmlu_dev.jsonl"
  ):
    lm_eval_tasks.check_fewshot(task, 6)


def test_no_examples_to_show(tmp_path):
  task = load_one("arc_easy", write(tmp_path, "arc_easy", ARC))
  with pytest.raises(UserError, match=r"have 0; .*arc_easy_dev.jsonl"):
    lm_eval_tasks.check_fewshot(task, 1)


def test_own_task_file(tmp_path):
  write(tmp_path, "rows", ARC)
  (tmp_path / "mine.yaml").write_text(
    "task: mine\ndataset_path: json\noutput_type: multiple_choice\n"
    f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
    "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
    "doc_to_choice: choices\n"
  )
  task = load_one("mine", tmp_path)
  assert task.doc_to_text(task.eval_docs[0]) == "What falls?"


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_dataset_that_needs_the_network(tmp_path, monkeypatch, error):
  """The message names the dataset and a command that would write the file."""
  if error is RuntimeError:  # of datasets 4, where it is a script
    load = mock.Mock(side_effect=error("Dataset scripts are no longer ..."))
    monkeypatch.setattr("datasets.load_dataset", load)
  with pytest.raises(UserError, match="cannot be had here") as caught:
    lm_eval_tasks.load(["social_iqa"], Questions(str(tmp_path)))
  assert (
    "datasets.load_dataset('lighteval/siqa', split='validation')"
    ".to_json('social_iqa.jsonl')"
  ) in str(caught.value)


@pytest.mark.slow  # reads all of lm-eval's task files
def test_unknown_task():
  with pytest.raises(
    UserError, match=r"'arc_eazy' \(did you mean arc_easy\?\)"
  ):
    lm_eval_tasks.load(["arc_easy", "arc_eazy"], Questions())


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "questions").mkdir()
  assert Questions("~/questions").folder == tmp_path / "questions"


def test_no_such_directory(tmp_path):
  with pytest.raises(UserError, match="nowhere: no such directory"):
    lm_eval_tasks.load(["arc_easy"], Questions(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "has no questions"),
    ("\n\n", "has no questions"),
    ("{\n", "line 1 is not a question of arc_easy"),
    (json.dumps(ARC) + "\n[1]\n", "line 2 is not a question"),
    ('{"choices": ["a"], "answer": 0}', "line 1: no field 'question'"),
    ('{"question": "q", "choices": ["a"], "answer": 3}', "line 1 is not"),
  ],
)
def test_bad_file(tmp_path, text, message):
  (tmp_path / "arc_easy.jsonl").write_text(text)
  with pytest.raises(UserError, match=message):
    lm_eval_tasks.load(["arc_easy"], Questions(str(tmp_path)))


def test_preset_uses_the_files_there_are(tmp_path):
  write(tmp_path, "piqa", ARC)
  write(tmp_path, "winogrande", ARC)
  wanted, missing = lm_eval_run.expand(
    ["commonsense", "boolq"], Questions(str(tmp_path))
  )
  assert wanted == {"piqa": None, "winogrande": None, "boolq": None}
  assert missing["commonsense"] == [
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "openbookqa",
    "social_iqa",
  ]


def test_preset_without_any_file(tmp_path):
  with pytest.raises(UserError, match="none of the tasks of commonsense"):
    lm_eval_run.expand(["commonsense"], Questions(str(tmp_path)))


def test_presets():
  commonsense = presets.PRESETS["commonsense"].metrics
  assert len(commonsense) == 7
  assert commonsense["arc_easy"] == commonsense["piqa"] == "acc_norm"
  assert commonsense["winogrande"] == commonsense["social_iqa"] == "acc"
  assert lm_eval_run.expand(["mmlu"], Questions())[0] == {"mmlu": 5}
