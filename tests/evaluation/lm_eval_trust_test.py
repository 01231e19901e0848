"""YAML out of somebody's folder: no code of it runs unless it is trusted."""

import json

import pytest

pytest.importorskip("lm_eval")
from jinja2 import Environment
from lm_eval import utils

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import (
  evaluate,
  lm_eval_private,
  lm_eval_run,
  lm_eval_tasks,
)
from adapt_pruner_jax.evaluation.questions import Questions

ROW = {"question": "What falls?", "choices": ["rain", "sky"], "answer": 0}
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_target: answer
doc_to_choice: choices
"""
# Python that leaves a file where it ran.
CODE = """import pathlib
pathlib.Path('FOLDER/ran').touch()

def process(dataset):
  return dataset
"""
FUNCTION = "process_docs: !function code.process\n"


@pytest.fixture
def folder(tmp_path):
  """`mine` as plain YAML, arc_easy's questions, and Python beside them."""
  write(tmp_path, "mine.yaml", TASK)
  write(tmp_path, "code.py", CODE)
  for name in ("rows", "arc_easy"):
    write(tmp_path, f"{name}.jsonl", json.dumps(ROW))
  lm_eval_tasks._manager.cache_clear()
  return tmp_path


def write(folder, name, text):
  (folder / name).write_text(text.replace("FOLDER", str(folder)))


def load(folder, *names, trust=False):
  return lm_eval_tasks.load(names, Questions(str(folder), trust))["tasks"]


REFUSED = {
  "a function": (TASK + FUNCTION, "mine.yaml", "line 9 has !function"),
  "a class": (TASK + "class: code.Task\n", "mine.yaml", "a Python class"),
  "a metric of the hub": (
    TASK + "metric_list: [{metric: bleurt, hf_evaluate: true}]\n",
    "mine.yaml",
    "Python from elsewhere",
  ),
  "a metric in a file": (
    TASK + "metric_list: [{metric: ./code.py}]\n",
    "mine.yaml",
    "'./code.py' is Python",
  ),
  "outside": (TASK + "include: ../x.yaml\n", "mine.yaml", "outside of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_the_file(folder, case):
  text, file, why = REFUSED[case]
  write(folder, "mine.yaml", text)
  write(folder.parent, "x.yaml", "repeats: 1\n")
  with pytest.raises(UserError) as caught:
    load(folder, "mine")
  (line,) = str(caught.value).splitlines()
  for word in (str(folder / file), why, "--trust_tasks_dir"):
    assert word in line
  assert not (folder / "ran").exists()


def test_what_is_included_grouped_or_tagged_is_asked_too(folder):
  write(folder, "mine.yaml", TASK + "include: base\ntag: few\n")
  write(folder, "base", FUNCTION)
  write(folder, "all.yaml", "group: all_of_mine\ntask: [mine]\n")
  for name in ("mine", "all_of_mine", "few"):
    with pytest.raises(UserError, match=r"/base would run code \(line 1 has"):
      load(folder, name)
  with pytest.raises(UserError, match="/base would run code"):
    lm_eval_run.check(["mine"], Questions(str(folder)))
  assert not (folder / "ran").exists()


def test_refused_before_the_model_is_opened(folder):
  write(folder, "mine.yaml", TASK + FUNCTION)
  with pytest.raises(UserError, match=r"mine.yaml would run code"):
    evaluate.evaluate("nowhere", ["mine"], tasks_dir=str(folder))
  with pytest.raises(UserError, match=r"nowhere"):  # the next thing to fail
    evaluate.evaluate(
      str(folder / "nowhere"),
      ["mine"],
      tasks_dir=str(folder),
      trust_tasks_dir=True,
    )


def test_trusted(folder):
  write(folder, "mine.yaml", TASK + FUNCTION)
  task = load(folder, "mine", trust=True)["mine"]
  assert len(task.eval_docs) == 1
  assert (folder / "ran").exists()


def test_plain_yaml_and_what_is_not_asked_need_no_trust(folder):
  write(folder, "other.yaml", TASK.replace("mine", "other") + FUNCTION)
  assert load(folder, "mine", "arc_easy").keys() == {"mine", "arc_easy"}
  assert not (folder / "ran").exists()


HOLE = "cycler.__init__.__globals__.os.makedirs('FOLDER/ran', 511, 1)"
ESCAPE = TASK.replace("'{{question}}'", f'"{{{{ {HOLE} }}}}"')


@pytest.fixture
def plain_templates(monkeypatch):
  """lm-eval's own templates: a process that has the sandbox keeps it."""
  plain = Environment(undefined=utils.env.undefined)
  plain.filters |= utils.env.filters
  monkeypatch.setattr(utils, "env", plain)


def test_templates_are_in_a_sandbox(folder, plain_templates):
  """With the peer: lm-eval itself runs what this template says."""
  write(folder, "mine.yaml", ESCAPE)
  with pytest.raises(UserError, match=r"a template of the YAML in .*unsafe"):
    load(folder, "mine")
  assert not (folder / "ran").exists()


def test_what_the_sandbox_is_for(folder, plain_templates):
  write(folder, "mine.yaml", ESCAPE)
  load(folder, "mine", trust=True)
  assert (folder / "ran").exists()


# ---- lm-eval's inside --------------------------------------------------------


class Marked(lm_eval_tasks.LocalTask):
  pass


def test_what_another_lm_eval_would_break(folder):
  """Tasks, groups and tags are of our class: else each would ask the network
  for its data, and --tasks_dir would not be looked at. If this fails after an
  update of lm-eval, `lm_eval_private.build` is what needs another way."""
  write(folder, "mine.yaml", TASK + "tag: few\n")
  write(folder, "inner.yaml", "group: inner\ntask: [mine]\n")
  write(folder, "all.yaml", "group: all_of_mine\ntask: [inner]\n")
  index = lm_eval_tasks.find(["mine"], Questions(str(folder))).task_index
  Marked.folder = folder
  (task,) = lm_eval_private.build("mine", index, Marked)
  (tagged,) = lm_eval_private.build("few", index, Marked)
  (group,) = lm_eval_private.build("all_of_mine", index, Marked)
  (deep,) = group.get_all_tasks()
  (local,) = lm_eval_private.build("arc_easy", index, Marked)
  for built in (task, tagged, deep, local):
    assert type(built) is Marked
  assert local.source.startswith("arc_easy.jsonl sha256:")
