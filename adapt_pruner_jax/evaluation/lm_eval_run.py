"""lm-eval's tasks on the pair: presets, scores, how two models differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jinja2.exceptions import SecurityError
from lm_eval import evaluator
from lm_eval.api.model import LM

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import lm_eval_tasks, lm_eval_trust, presets
from adapt_pruner_jax.evaluation.lm_eval_model import JaxLM
from adapt_pruner_jax.evaluation.phases import Phases, silent
from adapt_pruner_jax.evaluation.questions import USUAL, Questions
from adapt_pruner_jax.formats.hf.generation_config import end_tokens
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import digest

RESAMPLES = 10_000


def open_lm(
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  batch: int = 8,
  mesh: Mesh | None = None,
  phase: Phases = silent,
) -> JaxLM:
  """Returns a model as lm-eval sees it, which ends where the model's files say.

  Args:
    batch: rows at a time.
    phase: shows how many requests are answered.
  """
  ends = end_tokens(tokenizer.path, config, tokenizer)
  return JaxLM(config, params, tokenizer, batch, mesh, ends, phase)


def evaluate_tasks(
  lm: JaxLM,
  names: Sequence[str],
  questions: Questions = USUAL,
  baseline: JaxLM | None = None,
) -> dict:
  """Scores of tasks and presets, as a dict that JSON can hold.

  Args:
    names: lm-eval's tasks, groups and tags, and `presets.PRESETS`.
    baseline: a model to compare with, question by question.

  Returns:
    "lm_eval" (its version), "prompts" (how questions were put), "tasks": {task:
    metrics, n, truncated (requests longer than the context, which lose their
    beginning), num_fewshot, source, prompt_hash}, "groups", "presets": {preset:
    mean, tasks, missing}, and with a baseline "baseline" with its scores, and
    "difference", that of "tasks" and "presets" with its 95% interval `low`,
    `high` (paired bootstrap).

  Raises:
    UserError: as `lm_eval_tasks.load` and `JaxLM`; nothing to ask, or chats for
      a model without a chat template.
  """
  wanted, missing = expand(names, questions)
  for name, absent in missing.items():
    if absent:
      logging.warning(
        "%s: no file for %s in %s; the mean is over the others",
        *(name, ", ".join(absent), questions.tasks_dir),
      )
  for model in filter(None, (lm, baseline)):
    _check_chat(model, questions)
  raw = run(wanted, lm, questions)
  found = summary(raw, names, missing) | {"prompts": _prompts(lm, questions)}
  if baseline is not None:
    other = run(wanted, baseline, questions)
    found["baseline"] = summary(other, names, missing)
    found["difference"] = differences(raw, other, names)
  return found


def check(names: Sequence[str], questions: Questions) -> None:
  """Raises a UserError for what cannot be asked; reads no questions."""
  questions.check()
  lm_eval_tasks.find(list(expand(names, questions)[0]), questions)


def expand(
  names: Sequence[str], questions: Questions
) -> tuple[dict[str, int | None], dict[str, list[str]]]:
  """Tasks with their number of examples, and what each preset lacks.

  Of a preset of several tasks, those without a file in the folder are left
  out, and named.

  Raises:
    UserError: the folder is missing, or has no task of a preset.
  """
  folder = questions.folder
  wanted: dict[str, int | None] = {}
  missing: dict[str, list[str]] = {}
  for name in names:
    if name not in presets.PRESETS:
      wanted.setdefault(name, None)
      continue
    preset = presets.PRESETS[name]
    present = list(preset.metrics)
    if folder and len(present) > 1:
      present = [t for t in present if lm_eval_tasks.local_files(t, folder)]
    missing[name] = [t for t in preset.metrics if t not in present]
    if not present:
      raise UserError(
        f"--tasks_dir={folder} has none of the tasks of {name}: "
        + ", ".join(f"{task}.jsonl" for task in preset.metrics)
      )
    wanted |= {task: wanted.get(task) or preset.num_fewshot for task in present}
  return wanted, missing


def run(
  wanted: Mapping[str, int | None],
  lm: LM,
  questions: Questions = USUAL,
) -> dict:
  """lm-eval's own results of any of its models, samples included.

  Args:
    wanted: tasks, with the number of examples that is usual; None = the task's.

  Raises:
    UserError: as `lm_eval_tasks.load`; too few examples, no questions, or a
      template that would run code.
  """
  loaded = lm_eval_tasks.load(list(wanted), questions)
  _set_fewshot(loaded, wanted, questions)
  if not any(len(task.eval_docs) for task in loaded["tasks"].values()):
    raise UserError(f"no questions in {', '.join(wanted)}")
  truncated = getattr(lm, "truncated", {})  # of this call, not of those before
  truncated.clear()
  try:
    raw = evaluator.evaluate(
      lm,
      loaded,
      limit=questions.limit or None,
      bootstrap_iters=1000,
      system_instruction=questions.system_instruction or None,
      apply_chat_template=questions.apply_chat_template,
      fewshot_as_multiturn=questions.multiturn,
      confirm_run_unsafe_code=questions.trust_tasks_dir,
    )
  except SecurityError as error:
    raise lm_eval_trust.unsafe(error, questions.folder) from error
  raw["truncated"] = dict(truncated)
  raw["sources"] = {
    name: getattr(task, "source", "lm-eval")
    for name, task in loaded["tasks"].items()
  }
  return raw


def _set_fewshot(
  loaded: dict, wanted: Mapping[str, int | None], questions: Questions
) -> None:
  """Sets how many examples each task shows, as lm-eval's command line does."""
  parents = {
    child: group
    for group, children in loaded["group_map"].items()
    for child in children
  }
  for name, task in loaded["tasks"].items():
    asked = name
    while asked not in wanted and asked in parents:
      asked = parents[asked]
    given = questions.num_fewshot
    shots = wanted.get(asked) if given is None else given
    fixed = task.get_config("num_fewshot")
    if fixed is None or (shots is not None and fixed != 0):
      task.set_config(key="num_fewshot", value=shots or 0)
    elif fixed == 0 and given:
      logging.warning(
        "task %s is defined without examples: --num_fewshot=%d is not for it",
        *(name, given),
      )
    lm_eval_tasks.check_fewshot(task, task.get_config("num_fewshot"))
    task.set_fewshot_seed(seed=1234)  # as lm-eval's command line


def _check_chat(lm: JaxLM, questions: Questions) -> None:
  if questions.apply_chat_template and lm.words.chat_template is None:
    raise UserError(
      f"--apply_chat_template: {lm.words.path} has no chat template "
      "(chat_template.jinja, or chat_template in tokenizer_config.json): leave "
      "the flag out, or add the template that the model was trained with"
    )


def _prompts(lm: JaxLM, questions: Questions) -> dict:
  """How questions were put: what two scores must have alike to compare."""
  template = lm.chat_template(questions.apply_chat_template)
  return {
    "apply_chat_template": questions.apply_chat_template,
    "chat_template": template and digest.of_bytes(template.encode()),
    "system_instruction": questions.system_instruction,
    "fewshot_as_multiturn": questions.multiturn,
  }


def summary(
  raw: dict, names: Sequence[str], missing: Mapping[str, list[str]]
) -> dict:
  """Keeps what is kept of lm-eval's results; see `evaluate_tasks`.

  Raises:
    UserError: a task without questions.
  """
  found = {"lm_eval": lm_eval.__version__, "tasks": {}, "groups": {}}
  for name, samples in raw["samples"].items():
    if not samples:
      raise UserError(f"task {name} has no questions")
    hashes = [sample["prompt_hash"] for sample in samples]
    found["tasks"][name] = _metrics(raw["results"][name]) | {
      "n": len({sample["doc_id"] for sample in samples}),
      "truncated": raw["truncated"].get(name, 0),
      "num_fewshot": raw["n-shot"][name],
      "source": raw["sources"][name],
      "prompt_hash": digest.of_bytes("".join(hashes).encode()),
    }
  for name, values in raw.get("groups", {}).items():
    found["groups"][name] = _metrics(values)
  everything = found["tasks"] | found["groups"]
  found["presets"] = {}
  for name in names:
    if name in presets.PRESETS:
      scores = {
        task: everything[task][metric]
        for task, metric in presets.PRESETS[name].metrics.items()
        if task in everything
      }
      found["presets"][name] = {
        "mean": sum(scores.values()) / len(scores),
        "tasks": scores,
        "missing": missing[name],
      }
  return found


def differences(raw: dict, other: dict, names: Sequence[str]) -> dict:
  """This model's scores minus the other's, with 95% intervals.

  Questions are drawn again with replacement, both models' answers together; for
  a preset within each task. Only for metrics that are a mean over questions.
  """
  rng = np.random.default_rng(0)
  found = {"tasks": {}, "presets": {}}
  draws = {}  # (task, metric) -> number of questions, mean, means drawn
  for name, samples in raw["samples"].items():
    others = {
      (_filter(s), s["doc_id"], metric): s[metric]
      for s in other["samples"][name]
      for metric in s["metrics"]
    }
    pairs = {}  # of both models' scores, by the metric's name
    for s in samples:
      for metric in s["metrics"]:
        both = s[metric], others[_filter(s), s["doc_id"], metric]
        pairs.setdefault(_named(metric, _filter(s)), []).append(both)
    for metric, scores in pairs.items():
      if not all(isinstance(v, (int, float)) for pair in scores for v in pair):
        continue
      gains = np.array([float(a) - float(b) for a, b in scores])
      drawn = _resample(gains, rng)
      draws[name, metric] = len(gains), gains.mean(), drawn
      entry = found["tasks"].setdefault(name, {})
      entry[metric] = _interval(gains.mean(), drawn)
  for name in names:
    parts = []
    for task, metric in _preset_metrics(name):
      leaves = [(leaf, metric) for leaf in _leaves(raw, task)]
      leaves = [draws[leaf] for leaf in leaves if leaf in draws]
      if leaves:
        sizes, means, drawn = zip(*leaves, strict=True)
        parts.append([np.average(x, 0, sizes) for x in (means, drawn)])
    if parts:
      found["presets"][name] = _interval(
        *(np.mean(x, 0) for x in zip(*parts, strict=True))
      )
  return found


def _filter(sample: dict) -> str:
  """How its answer was found in what the model said; a task may have several
  ways, and then as many samples of a question."""
  return sample.get("filter", "none")


def _named(metric: str, filter_: str) -> str:
  """A metric's name in the result, as of `_metrics`."""
  return metric if filter_ == "none" else f"{metric}_{filter_}"


def _preset_metrics(name: str) -> list[tuple[str, str]]:
  preset = presets.PRESETS.get(name)
  return list(preset.metrics.items()) if preset else []


def _leaves(raw: dict, name: str) -> list[str]:
  """The tasks in a group, or the task itself."""
  if name in raw["samples"]:
    return [name]
  children = raw["group_subtasks"].get(name, [])
  return [leaf for child in children for leaf in _leaves(raw, child)]


def _resample(gains: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Means of `RESAMPLES` draws with replacement of all `gains`."""
  # How often each value is drawn is multinomial; values are few.
  values, counts = np.unique(gains, return_counts=True)
  drawn = rng.multinomial(len(gains), counts / len(gains), RESAMPLES)
  return drawn @ values / len(gains)


def _interval(difference: float, drawn: np.ndarray) -> dict[str, float]:
  low, high = np.percentile(drawn, [2.5, 97.5])
  return {
    "difference": float(difference),
    "low": float(low),
    "high": float(high),
  }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
  """{"acc": ..., "acc_stderr": ...} out of lm-eval's "acc,none", ...."""
  return {
    key.removesuffix(",none").replace(",", "_"): float(value)
    for key, value in values.items()
    if isinstance(value, float)
  }
