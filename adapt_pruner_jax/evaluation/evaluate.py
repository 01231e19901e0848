"""How good a model is: perplexity on a text, tasks, latency.

`evaluate` is what `adapt-pruner evaluate` does; lm-eval is only imported when a
task of its is asked for.
"""

from collections.abc import Sequence

from jax.sharding import Mesh

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import latency
from adapt_pruner_jax.evaluation.perplexity import text_perplexity
from adapt_pruner_jax.formats import opening
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig


def evaluate(
  model_dir: str,
  names: Sequence[str],
  *,
  text: str = "",
  tasks_dir: str = "",
  baseline: str = "",
  limit: int = 0,
  seq_len: int = 0,
  batch: int = 8,
  dtype: str = "float32",
  ignore_fields: str = "",
  bos: str = "auto",
  mesh: Mesh | None = None,
) -> dict:
  """All that was asked about a model, as a dict that JSON can hold.

  Args:
    model_dir: a HuggingFace directory or hub id, as `baseline`.
    names: `perplexity`, `latency`, presets, and tasks of lm-eval.
    text: file whose perplexity is asked for.
    tasks_dir: folder of local questions, see `tasks`.
    baseline: a second model to compare with.
    limit: questions a task; 0 = all.
    seq_len: window of the perplexity; 0 = the model's context, at most 2048.
    batch: rows at a time. Latency is of one row.
    ignore_fields: fields of config.json to ignore, separated by commas.
    bos: as `data.bos`, for the windows of the perplexity.

  Returns:
    {"model", "params", "dtype"} and, as asked, "perplexity", "latency", and
    those of `harness.evaluate_tasks`; with a baseline also "baseline" with the
    same of the other model, and "difference".

  Raises:
    UserError: nothing asked, a name that nothing goes by, or a bad input.
  """
  names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
  if not names:
    raise UserError(
      "nothing to evaluate: --tasks=perplexity,latency,commonsense or names of "
      "lm-eval's tasks"
    )
  if "perplexity" in names and not text:
    raise UserError("the task perplexity needs --text=FILE")
  if limit < 0 or batch < 1:
    raise UserError(f"limit={limit} must be at least 0, batch={batch} 1")
  others = [n for n in names if n not in ("perplexity", "latency")]
  directories = [d for d in (model_dir, baseline) if d]
  if others:  # a misspelt name is told before anything is computed
    harness = import_harness()
    harness.check(others, tasks_dir)
  if mesh is None:
    mesh = sharding.make_mesh()
  opened = [
    opening.open_model(d, dtype, ignore_fields, mesh) for d in directories
  ]
  pairs, dirs = [o[:2] for o in opened], [o[2] for o in opened]
  tokenizers = [
    load_tokenizer(d, bos) for d in dirs if "perplexity" in names or others
  ]
  found = [
    {
      "model": str(d),
      "params": model_config.count_params(pair[0]),
      "dtype": dtype,
    }
    for d, pair in zip(dirs, pairs, strict=True)
  ]
  if "perplexity" in names:
    for entry, pair, tokenizer in zip(found, pairs, tokenizers, strict=True):
      entry |= text_perplexity(*pair, tokenizer, text, seq_len, batch, mesh)
  if "latency" in names:
    for entry, pair in zip(found, pairs, strict=True):
      entry["latency"] = latency.measure(*pair, **lengths(pair[0]), mesh=mesh)
      advice = latency.ffn_advice(pair[0], dtype=dtype)
      entry["latency"]["round_ffn_to"] = advice
  result = found[0] | ({"baseline": found[1]} if baseline else {})
  if baseline and "latency" in names:
    before, after = found[1]["latency"], found[0]["latency"]
    result["speedup"] = latency.compare(before, after)
  if others:
    scores = harness.evaluate_tasks(
      *pairs[0],
      tokenizers[0],
      others,
      tasks_dir or None,
      limit or None,
      batch,
      baseline=pairs[1] if baseline else None,
      mesh=mesh,
      baseline_tokenizer=tokenizers[-1],
    )
    if baseline:
      result["baseline"] |= scores.pop("baseline")
    result |= scores
  return result


def lengths(config: ModelConfig) -> dict[str, int]:
  """Prompt and new tokens that latency is measured with."""
  return {
    "prompt_len": min(128, config.context // 2),
    "new_tokens": min(64, config.context // 2),
  }


def scores(found: dict) -> dict[str, float]:
  """One number a task or preset: acc_norm, else acc, else what comes first.

  Args:
    found: of `harness.evaluate_tasks`.
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
  """The module that needs lm-eval."""
  try:
    from adapt_pruner_jax.evaluation import lm_eval_run
  except ImportError as error:
    raise UserError(
      f"tasks need lm-eval ({error}): pip install 'adapt-pruner-jax[eval]'"
    ) from error
  return lm_eval_run
