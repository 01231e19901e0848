"""All that `adapt-pruner evaluate` is asked about a model.

lm-eval is only imported when a task of its is asked for.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from adapt_pruner_jax.data.tokenizer import Tokenizer, load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import latency
from adapt_pruner_jax.evaluation.perplexity import text_perplexity
from adapt_pruner_jax.evaluation.phases import Phases, silent
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats import opening
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Asked(Questions):
  """All that is asked about a model: the flags of `adapt-pruner evaluate`."""

  text: str = ""  # file whose perplexity is asked for
  seq_len: int = 0  # tokens a window of it; 0 = the context, at most 2048
  batch: int = 8  # rows at a time; latency is of one row

  def check(self) -> None:
    super().check()
    if self.batch < 1:
      raise UserError(f"--batch={self.batch} must be at least 1")


FIELDS = tuple(field.name for field in dataclasses.fields(Asked))


def evaluate(
  model_dir: str,
  names: Sequence[str],
  *,
  baseline: str = "",
  dtype: str = "float32",
  ignore_fields: str = "",
  bos: str = "auto",
  mesh: Mesh | None = None,
  phase: Phases = silent,
  **asked: Any,
) -> dict:
  """Finds all that was asked about a model, as a dict that JSON can hold.

  Args:
    model_dir: a HuggingFace directory or hub id, as `baseline`.
    names: `perplexity`, `latency`, presets, and tasks of lm-eval.
    baseline: a second model to compare with.
    ignore_fields: fields of config.json to ignore, separated by commas.
    bos: as `data.bos`, for the windows of the perplexity.
    phase: shows how far perplexity and tasks are, `reporting.log.Log.phase`.
    asked: fields of `Asked`.

  Returns:
    {"model", "params", "dtype"} and, as asked, "perplexity", "latency", and
    what `lm_eval_run.evaluate_tasks` gives; of a baseline also "baseline" and
    "difference".

  Raises:
    UserError: nothing asked, a name that nothing goes by, a bad input, or a
      result that is not finite.
  """
  how = Asked(**asked)
  names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
  tasks = [n for n in names if n not in ("perplexity", "latency")]
  _check(names, tasks, how)
  mesh = sharding.make_mesh() if mesh is None else mesh
  open_one = lambda d: opening.open_model(d, dtype, ignore_fields, mesh)
  opened = [open_one(d) for d in (model_dir, baseline) if d]
  words: list = [None] * len(opened)
  if tasks or "perplexity" in names:
    words = [load_tokenizer(folder, bos) for _, _, folder in opened]
  found = []
  for (config, params, folder), own in zip(opened, words, strict=True):
    number = model_config.count_params(config)
    entry = {"model": str(folder), "params": number, "dtype": dtype}
    if "perplexity" in names:
      entry |= _perplexity(config, params, own, how, mesh, phase)
    if "latency" in names:
      entry["latency"] = _latency(config, params, dtype, mesh)
    found.append(entry)
  result = found[0] | ({"baseline": found[1]} if baseline else {})
  if baseline and "latency" in names:
    before, after = found[1]["latency"], found[0]["latency"]
    result["speedup"] = latency.compare(before, after)
  if tasks:
    pairs = [(config, params) for config, params, _ in opened]
    scores = _scores(pairs, words, tasks, how, mesh, phase)
    if baseline:
      result["baseline"] |= scores.pop("baseline")
    result |= scores
  return result


def _scores(
  pairs: Sequence[tuple[ModelConfig, Params]],
  words: Sequence[Tokenizer],
  tasks: Sequence[str],
  how: Asked,
  mesh: Mesh,
  phase: Phases,
) -> dict:
  """Scores of lm-eval's tasks, of a model and perhaps a second one."""
  harness = import_harness()
  lms = [
    harness.open_lm(*pair, own, how.batch, mesh, phase)
    for pair, own in zip(pairs, words, strict=True)
  ]
  return harness.evaluate_tasks(lms[0], tasks, how, *lms[1:])


def _check(names: Sequence[str], tasks: Sequence[str], how: Asked) -> None:
  """Raises a UserError for bad input before anything is computed."""
  how.check()
  if not names:
    raise UserError(
      "nothing to evaluate: --tasks=perplexity,latency,commonsense or names of "
      "lm-eval's tasks"
    )
  if "perplexity" in names and not how.text:
    raise UserError("the task perplexity needs --text=FILE")
  if tasks:  # a misspelt name is told before anything is computed
    import_harness().check(tasks, how)
    return
  given = [
    name
    for name in ("num_fewshot", "apply_chat_template", "system_instruction")
    if getattr(how, name) not in (None, False, "")
  ]
  if given:
    raise UserError(
      f"--{given[0]} is about tasks of lm-eval, and none is in "
      f"--tasks={','.join(names)}"
    )


def _perplexity(
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  how: Asked,
  mesh: Mesh,
  phase: Phases,
) -> dict[str, Any]:
  """`text_perplexity`, which must be a number."""
  found = text_perplexity(
    *(config, params, tokenizer, how.text, how.seq_len, how.batch, mesh),
    phase=phase,
  )
  if not math.isfinite(found["perplexity"]):
    mean = found["nll"] / found["tokens"]
    raise UserError(
      f"the perplexity of {how.text} is no number any more: the mean loss is "
      f"{mean:.0f} nats a token, by chance it would be about 10; the model or "
      "its tokenizer is damaged"
    )
  return found


def _latency(
  config: ModelConfig, params: Params, dtype: str, mesh: Mesh
) -> dict[str, Any]:
  found = latency.measure(config, params, **lengths(config), mesh=mesh)
  return found | {"round_ffn_to": latency.ffn_advice(config, dtype=dtype)}


def lengths(config: ModelConfig) -> dict[str, int]:
  """Returns the prompt and new tokens that latency is measured with."""
  return {
    "prompt_len": min(128, config.context // 2),
    "new_tokens": min(64, config.context // 2),
  }


def scores(found: dict) -> dict[str, float]:
  """Picks a number a task or preset: acc_norm, else acc, else the first.

  Args:
    found: of `lm_eval_run.evaluate_tasks`.
  """
  chosen = {
    name: next(values[m] for m in ("acc_norm", "acc", *values) if m in values)
    for name, values in found["tasks"].items()
  }
  for name, preset in found["presets"].items():
    # A preset says which metric of a task it means.
    chosen |= preset["tasks"] | {f"{name}, mean": preset["mean"]}
  return chosen


def import_harness():
  """Returns the module that needs lm-eval, `lm_eval_run`.

  Raises:
    UserError: lm-eval is not installed.
  """
  try:
    from adapt_pruner_jax.evaluation import lm_eval_run
  except ImportError as error:
    raise UserError(
      f"tasks need lm-eval ({error}): pip install 'adapt-pruner-jax[eval]'"
    ) from error
  return lm_eval_run
