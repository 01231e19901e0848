"""lm-eval's tasks on the pair: presets, scores, how two models differ."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lm_eval
import numpy as np
from absl import logging
from jax.sharding import Mesh
from lm_eval import evaluator
from lm_eval.api.model import LM

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import lm_eval_tasks
from adapt_pruner_jax.evaluation.lm_eval_model import JaxLM
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import digest

Pair = tuple[ModelConfig, Params]

RESAMPLES = 10_000


def evaluate_tasks(
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  names: Sequence[str],
  tasks_dir: str | None = None,
  limit: int | None = None,
  batch: int = 8,
  num_fewshot: int | None = None,
  baseline: Pair | None = None,
  mesh: Mesh | None = None,
  baseline_tokenizer: Tokenizer | None = None,
) -> dict:
  """Scores of tasks and presets, as a dict that JSON can hold.

  Args:
    names: lm-eval's tasks, groups and tags, and `tasks.PRESETS`.
    tasks_dir: local questions, see `tasks`.
    limit: questions a task; None = all.
    batch: rows at a time.
    num_fewshot: examples shown; None = as the preset or the task says.
    baseline: a pair to compare with, question by question.
    baseline_tokenizer: default the same.

  Returns:
    "lm_eval" (its version), "tasks": {task: metrics, n, truncated (requests
    longer than the context, which lose their beginning), num_fewshot, source,
    prompt_hash}, "groups", "presets": {preset: mean, tasks, missing}, and with
    a baseline "baseline" with its scores, and "difference", that of "tasks" and
    "presets" with its 95% interval `low`, `high` (paired bootstrap).

  Raises:
    UserError: as `tasks.load` and `JaxLM`; or nothing to ask.
  """
  wanted, missing = expand(names, tasks_dir)
  for name, absent in missing.items():
    if absent:
      logging.warning(
        "%s: no file for %s in %s; the mean is over the others",
        *(name, ", ".join(absent), tasks_dir),
      )
  ask = partial(run, wanted, tasks_dir, limit, num_fewshot)
  raw = ask(JaxLM(config, params, tokenizer, batch, mesh))
  found = summary(raw, names, missing)
  if baseline is not None:
    other = ask(JaxLM(*baseline, baseline_tokenizer or tokenizer, batch, mesh))
    found["baseline"] = summary(other, names, missing)
    found["difference"] = differences(raw, other, names)
  return found


def check(names: Sequence[str], tasks_dir: str | None) -> None:
  """Raises a UserError for a name that nothing goes by; reads no questions."""
  lm_eval_tasks.find(list(expand(names, tasks_dir)[0]), tasks_dir)


def expand(
  names: Sequence[str], tasks_dir: str | None
) -> tuple[dict[str, int | None], dict[str, list[str]]]:
  """Tasks with their number of examples, and what each preset lacks.

  Of a preset of several tasks, those without a file in `tasks_dir` are left
  out, and named.
  """
  folder = lm_eval_tasks.folder_of(tasks_dir)
  wanted: dict[str, int | None] = {}
  missing: dict[str, list[str]] = {}
  for name in names:
    if name not in lm_eval_tasks.PRESETS:
      wanted.setdefault(name, None)
      continue
    preset = lm_eval_tasks.PRESETS[name]
    present = list(preset.metrics)
    if folder and len(present) > 1:
      present = [t for t in present if lm_eval_tasks.local_files(t, folder)]
    missing[name] = [t for t in preset.metrics if t not in present]
    if not present:
      raise UserError(
        f"--tasks_dir={tasks_dir} has none of the tasks of {name}: "
        + ", ".join(f"{task}.jsonl" for task in preset.metrics)
      )
    wanted |= {task: wanted.get(task) or preset.num_fewshot for task in present}
  return wanted, missing


def run(
  wanted: Mapping[str, int | None],
  tasks_dir: str | None,
  limit: int | None,
  num_fewshot: int | None,
  lm: LM,
) -> dict:
  """lm-eval's own results of any of its models, samples included."""
  loaded = lm_eval_tasks.load(list(wanted), tasks_dir)
  parents = {
    child: group
    for group, children in loaded["group_map"].items()
    for child in children
  }
  for name, task in loaded["tasks"].items():
    asked = name
    while asked not in wanted and asked in parents:
      asked = parents[asked]
    shots = wanted.get(asked) if num_fewshot is None else num_fewshot
    fixed = task.get_config("num_fewshot")
    if fixed is None or (shots is not None and fixed != 0):
      task.set_config(key="num_fewshot", value=shots or 0)
    lm_eval_tasks.check_fewshot(task, task.get_config("num_fewshot"))
    task.set_fewshot_seed(seed=1234)  # as lm-eval's command line
  if not any(len(task.eval_docs) for task in loaded["tasks"].values()):
    raise UserError(f"no questions in {', '.join(wanted)}")
  raw = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=1000)
  raw["truncated"] = getattr(lm, "truncated", {})
  raw["sources"] = {
    name: getattr(task, "source", "lm-eval")
    for name, task in loaded["tasks"].items()
  }
  return raw


def summary(
  raw: dict, names: Sequence[str], missing: Mapping[str, list[str]]
) -> dict:
  """The part of lm-eval's results that is kept; see `evaluate_tasks`."""
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
    if name in lm_eval_tasks.PRESETS:
      scores = {
        task: everything[task][metric]
        for task, metric in lm_eval_tasks.PRESETS[name].metrics.items()
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
    others = {s["doc_id"]: s for s in other["samples"][name]}
    for metric in samples[0]["metrics"]:
      pairs = [(s[metric], others[s["doc_id"]][metric]) for s in samples]
      if not all(isinstance(v, (int, float)) for pair in pairs for v in pair):
        continue
      gains = np.array([float(a) - float(b) for a, b in pairs])
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


def _preset_metrics(name: str) -> list[tuple[str, str]]:
  preset = lm_eval_tasks.PRESETS.get(name)
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
