"""What a run works with: the recipe, opened and checked before any work."""

from adapt_pruner_jax.config import task_names
from adapt_pruner_jax.evaluation import evaluate, latency, perplexity
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.runs.inputs import Setting, load_model, questions


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
  )
  return {"perplexity": found[0], "loss": found[1] / found[2]}


def measure_tasks(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Scores of `eval.tasks`, see `lm_eval_run.evaluate_tasks`."""
  recipe = setting.config.eval
  harness = evaluate.import_harness()
  lm = harness.open_lm(
    *(config, params, setting.tokenizer, recipe.batch, setting.mesh),
    phase=setting.log.phase,
  )
  return harness.evaluate_tasks(lm, task_names(recipe), questions(recipe))


def measure_latency(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Times of the original and of this model, one after the other here."""
  how = evaluate.lengths(setting.full) | {"mesh": setting.mesh}
  before = latency.measure(*load_model(setting), **how)
  after = latency.measure(config, params, **how)
  compared = latency.compare(before, after)
  return {"before": before, "after": after} | compared
