"""What a run works with: the recipe, opened and checked before any work."""

from adapt_pruner_jax.config import task_names
from adapt_pruner_jax.evaluation import evaluate, latency, perplexity
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.runs.inputs import Setting, load_model


def measure(config: ModelConfig, params: Params, setting: Setting) -> dict:
  """Perplexity per token, and the mean loss, on the evaluation text."""
  recipe = setting.config.eval
  found = perplexity.perplexity(
    config,
    params,
    setting.eval_tokens,
    perplexity.window(setting.full, recipe.seq_len),
    recipe.batch,
    setting.mesh,
    setting.tokenizer.begin_id,
  )
  return {"perplexity": found[0], "loss": found[1] / found[2]}


def windows_note(setting: Setting) -> str:
  """Said after a perplexity: what its windows start with, in brackets."""
  found = perplexity.windows_start(setting.tokenizer, "--config.data.bos")
  return f" ({found})" if found else ""


def measure_tasks(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Scores of `eval.tasks`, see `harness.evaluate_tasks`."""
  recipe = setting.config.eval
  return evaluate.import_harness().evaluate_tasks(
    config,
    params,
    setting.tokenizer,
    task_names(recipe),
    tasks_dir=recipe.tasks_dir or None,
    batch=recipe.batch,
    mesh=setting.mesh,
  )


def measure_latency(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Times of the original and of this model, one after the other here."""
  how = evaluate.lengths(setting.full) | {"mesh": setting.mesh}
  before = latency.measure(*load_model(setting), **how)
  after = latency.measure(config, params, **how)
  compared = latency.compare(before, after)
  return {"before": before, "after": after} | compared
