"""The evaluation tasks: presets, and questions from local files.

Prompts and metrics are always lm-eval's own. Where `--tasks_dir` has a file for
a task, the questions come from it instead of from the network: DIR/TASK.jsonl,
or DIR/TASK_test.jsonl and DIR/TASK_dev.jsonl (few-shot examples), with the 57
MMLU subjects all in `mmlu_*.jsonl`. A row has either the fields of the official
dataset (what `datasets` writes with `to_json`) or the plain ones of `PLAIN`.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from jinja2.exceptions import SecurityError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from adapt_pruner_jax.errors import UserError, first_line, nearest
from adapt_pruner_jax.evaluation import lm_eval_private, lm_eval_trust
from adapt_pruner_jax.evaluation.presets import PRESETS
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.storage import digest

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# Reading all of lm-eval's task files takes ten seconds, these no time.
COMMON = ("arc", "hellaswag", "openbookqa", "piqa", "winogrande", "siqa")
COMMON += ("mmlu/default", "wikitext", "truthfulqa", "agieval", "super_glue")


def _arc(row: dict) -> dict:
  labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
  return {
    "question": row["question"],
    "choices": {"text": row["choices"], "label": labels},
    "answerKey": labels[row["answer"]],
  }


def _openbookqa(row: dict) -> dict:
  official = _arc(row)
  return official | {"question_stem": official.pop("question")}


def _hellaswag(row: dict) -> dict:
  activity, _, text = row["context"].partition(": ")
  # lm-eval capitalises the unfinished last sentence, `ctx_b`.
  before, stop, last = text.rpartition(". ")
  if not (stop and last[:1].islower()):
    before, stop, last = text, "", ""
  return {
    "activity_label": activity,
    "ctx_a": before + stop.strip(),
    "ctx_b": last,
    "endings": row["choices"],
    "label": str(row["answer"]),
  }


def _piqa(row: dict) -> dict:
  sol1, sol2 = row["choices"]
  return {
    "goal": row["question"],
    "sol1": sol1,
    "sol2": sol2,
    "label": row["answer"],
  }


def _winogrande(row: dict) -> dict:
  option1, option2 = row["choices"]
  return {
    "sentence": row["sentence"],
    "option1": option1,
    "option2": option2,
    "answer": str(row["answer"] + 1),
  }


def _social_iqa(row: dict) -> dict:
  a, b, c = row["choices"]
  return {
    "context": row["context"],
    "question": row["question"],
    "answerA": a,
    "answerB": b,
    "answerC": c,
    "label": str(row["answer"] + 1),
  }


def _boolq(row: dict) -> dict:
  return {
    "passage": row["passage"],
    "question": row["question"],
    "label": row["answer"],
  }


def _mmlu(row: dict) -> dict:
  return {k: row[k] for k in ("question", "choices", "answer", "subject")}


# Row with `choices` (texts) and `answer` (index from 0) -> official row.
PLAIN: dict[str, Callable[[dict], dict]] = {
  "arc_easy": _arc,
  "arc_challenge": _arc,
  "openbookqa": _openbookqa,
  "hellaswag": _hellaswag,
  "piqa": _piqa,
  "winogrande": _winogrande,
  "social_iqa": _social_iqa,
  "boolq": _boolq,
  "mmlu": _mmlu,
}


def find(names: Sequence[str], questions: Questions) -> TaskManager:
  """lm-eval's index of tasks, with all of `names` in it; reads no questions.

  Raises:
    UserError: an unknown name, no such directory, or YAML of it that runs code
      without being trusted.
  """
  folder = questions.folder
  manager = _manager(folder, everything=False)
  if not all(name in manager.task_index for name in names):
    manager = _manager(folder, everything=True)
  index = manager.task_index
  for name in names:
    if name not in index:
      known = sorted({*index, *PRESETS, "perplexity", "latency"})
      raise UserError(
        f"unknown task {name!r}{nearest(name, known)}; allowed are perplexity, "
        f"latency, the presets {', '.join(PRESETS)}, and lm-eval's tasks "
        "(lm-eval ls tasks)"
      )
  if folder is not None and not questions.trust_tasks_dir:
    lm_eval_trust.check(names, index, folder)
  return manager


def load(names: Sequence[str], questions: Questions) -> dict:
  """Opens tasks; what `lm_eval.evaluator.evaluate` takes: {"tasks", ...}.

  Args:
    names: tasks, groups or tags of lm-eval, or of YAML files in the folder.

  Raises:
    UserError: as `find`; a file that cannot be read, or a dataset that can be
      had neither locally nor from the network.
  """
  manager = find(names, questions)
  task_class = _task_class(questions.folder)
  built = []
  try:
    for name in names:
      built += lm_eval_private.build(name, manager.task_index, task_class)
  except SecurityError as error:
    raise lm_eval_trust.unsafe(error, questions.folder) from error
  return manager.load(built)


def local_files(name: str, tasks_dir: str | Path) -> list[Path]:
  """The files of `tasks_dir` with questions of this task."""
  folder = Path(tasks_dir)
  stem = _stem(name, folder)
  files = [folder / f"{stem}.jsonl", *sorted(folder.glob(f"{stem}_*.jsonl"))]
  parts = [
    f"{stem}_{split}" for split in ("test", "validation", "dev", "train")
  ]
  return [f for f in files if f.is_file() and f.stem in (stem, *parts)]


def read_rows(path: Path, name: str) -> list[dict]:
  """Official rows of a local file; `name` is the task or `mmlu`.

  Raises:
    UserError: a line that is no JSON object or lacks a field.
  """
  rows = []
  try:
    lines = path.read_text("utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      plain = name in PLAIN and {"choices", "answer"} <= row.keys()
      rows.append(PLAIN[name](row) if plain else row)
    except KeyError as error:
      raise UserError(
        f"{path} line {number}: no field {error} of the plain form of {name}"
      ) from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
      raise UserError(
        f"{path} line {number} is not a question of {name}: {error}"
      ) from error
  if not rows:
    raise UserError(f"{path} has no questions")
  return rows


class LocalTask(ConfigurableTask):
  """An lm-eval task whose dataset may come from files of `folder`."""

  folder: Path | None = None
  source: str  # where the questions came from

  def __init__(self, config: dict) -> None:
    super().__init__(config={k: v for k, v in config.items() if k != "class"})

  def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
    """Sets `dataset`, {split: rows}.

    Raises:
      UserError: it is neither in the folder nor to be had from the network.
    """
    files = local_files(self.config.task, self.folder) if self.folder else []
    if files and self._read(files):
      return
    try:
      super().download(dataset_kwargs, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(self._how_to_get(error)) from error
    self.source = " ".join(filter(None, (self.DATASET_PATH, self.DATASET_NAME)))

  def _read(self, files: Sequence[Path]) -> bool:
    """Takes the dataset from `files`; False if they lack what is asked."""
    c, name = self.config, self.config.task
    stem = _stem(name, self.folder)
    asked = c.test_split or c.validation_split
    found = {}
    for file in files:
      split = file.stem.removeprefix(stem).lstrip("_") or asked
      rows = read_rows(file, stem)
      if stem != name:
        rows = [r for r in rows if r["subject"] == self.DATASET_NAME]
      # A file called _test serves a task that is asked on `validation`.
      split = asked if split in ("test", "validation") else split
      found[split] = rows
    if not found.get(asked):
      return False
    splits = {c.training_split, c.validation_split, c.test_split, asked}
    splits |= {self.fewshot_cfg.split} - {None}
    self.dataset = {
      split: _dataset(found.get(split, []), found[asked], name)
      for split in splits - {None}
    }
    self.source = ", ".join(
      f"{f.name} sha256:{digest.of_file(f)[:16]}" for f in files
    )
    return True

  def _how_to_get(self, error: Exception) -> str:
    c, name = self.config, self.config.task
    path = ", ".join(
      repr(part) for part in (self.DATASET_PATH, self.DATASET_NAME) if part
    )
    split = c.test_split or c.validation_split
    reason = first_line(error)
    return (
      f"task {name} needs the dataset {path}, which cannot be had here "
      f'({reason}); where there is network, run python -c "import datasets; '
      f"datasets.load_dataset({path}, split='{split}').to_json("
      f"'{name}.jsonl')\", and pass --tasks_dir=FOLDER_OF_THAT_FILE"
    )


def check_fewshot(task: Any, num_fewshot: int) -> None:
  """Raises a UserError unless a task has that many examples to show."""
  if not num_fewshot or not isinstance(task.dataset, dict):
    return
  shots = task.fewshot_docs()
  if shots is not None and len(shots) < num_fewshot:
    name = task.config.task
    raise UserError(
      f"task {name}: {num_fewshot} examples are to be shown, but the local "
      f"files have {len(shots)}; put them into "
      f"{_stem(name, task.folder)}_dev.jsonl"
    )


@cache
def _manager(folder: Path | None, everything: bool) -> TaskManager:
  paths = [LM_EVAL_TASKS] if everything else [LM_EVAL_TASKS / f for f in COMMON]
  if folder is not None and any(folder.rglob("*.yaml")):
    paths.append(folder)
  return TaskManager(include_path=paths, include_defaults=False)


@cache
def _task_class(folder: Path | None) -> type[LocalTask]:
  return type("LocalTask", (LocalTask,), {"folder": folder})


def _stem(name: str, folder: Path) -> str:
  """How the files of a task are called: MMLU's subjects share theirs."""
  if name.startswith("mmlu_") and not (folder / f"{name}.jsonl").is_file():
    return "mmlu"
  return name


def _dataset(rows: list[dict], like: list[dict], name: str) -> datasets.Dataset:
  """A dataset of `rows`, maybe none, with the fields of `like`."""
  try:
    return datasets.Dataset.from_list(rows or like).select(range(len(rows)))
  except (ValueError, TypeError) as error:  # pyarrow's errors are these
    raise UserError(f"task {name}: rows of different kinds: {error}") from error
