"""How good the model of a run is: perplexity, answers, tasks, latency."""

import math

from adapt_pruner_jax.config import task_names
from adapt_pruner_jax.evaluation import (
  answer_agreement,
  evaluate,
  latency,
  perplexity,
)
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.runs.inputs import Inputs, load_model, questions


def measure(config: ModelConfig, params: Params, inputs: Inputs) -> dict:
  """Perplexity per token, and the mean loss, on the evaluation text.

  Bits per byte compare models of different vocabularies.
  """
  recipe, begin = inputs.recipe.eval, inputs.tokenizer.begin_id
  found = perplexity.perplexity(
    config,
    params,
    inputs.eval_tokens,
    perplexity.window(inputs.full, recipe.seq_len),
    recipe.batch,
    inputs.mesh,
    begin,
  )
  tokens = len(inputs.eval_tokens)
  nats = perplexity.whole_loss(found[1], found[2], tokens, begin)
  return {
    "perplexity": found[0],
    "loss": found[1] / found[2],
    "bits_per_byte": nats / inputs.eval_bytes / math.log(2),
  }


def measure_original(
  config: ModelConfig, params: Params, inputs: Inputs
) -> dict:
  """Evaluates the original model, to compare with.

  Args:
    config, params: the model to prune; another than the original if its
      vocabulary is cut, and then its own result is in "vocab".
  """
  recipe, log, original = inputs.recipe, inputs.log, inputs.original
  found, cut = {}, (config, params)
  if inputs.whole and (recipe.eval.text or recipe.eval.tasks):
    config, params = load_model(original)
  if inputs.eval_tokens is not None:
    found = measure(config, params, original)
    log.say(
      f"{model_config.count_params(config):,} parameters, perplexity "
      f"{found['perplexity']:.3f}{windows_note(inputs)}"
    )
  if recipe.eval.tasks:
    log.say(f"original: {recipe.eval.tasks}")
    found["evaluation"] = measure_tasks(config, params, original)
  if inputs.whole and inputs.eval_tokens is not None:
    found["vocab"] = measure(*cut, inputs)
    bits = [x["bits_per_byte"] for x in (found, found["vocab"])]
    log.say(
      f"bits per byte: {bits[0]:.4f}, and {bits[1]:.4f} with the tokens that "
      "stay"
    )
  return found


def measure_answers(
  config: ModelConfig, params: Params, inputs: Inputs
) -> dict:
  """How like the dense model it answers, if `eval.answers` asks; else {}."""
  if inputs.answers is None:
    return {}
  return answer_agreement.answer_agreement(
    load_model(inputs),
    (config, params),
    inputs.answers,
    inputs.recipe.eval.batch,
    inputs.mesh,
  )


def answers_note(result: dict) -> str:
  """Says what `measure_answers` has found, behind a comma."""
  if "answer_kl" not in result:
    return ""
  return (
    f", {result['answer_agreement']:.1%} of the dense model's tokens alike "
    f"(KL {result['answer_kl']:.3f})"
  )


def windows_note(inputs: Inputs) -> str:
  """Says after a perplexity what its windows start with, in brackets."""
  found = perplexity.windows_start(inputs.tokenizer, "--config.data.bos")
  return f" ({found})" if found else ""


def measure_tasks(config: ModelConfig, params: Params, inputs: Inputs) -> dict:
  """Scores of `eval.tasks`, see `lm_eval_run.evaluate_tasks`."""
  recipe = inputs.recipe.eval
  harness = evaluate.import_harness()
  lm = harness.open_lm(
    *(config, params, inputs.tokenizer, recipe.batch, inputs.mesh),
    phase=inputs.log.phase,
  )
  return harness.evaluate_tasks(lm, task_names(recipe), questions(recipe))


def measure_latency(
  config: ModelConfig, params: Params, inputs: Inputs
) -> dict:
  """Times of the original and of this model, one after the other here."""
  how = evaluate.lengths(inputs.full) | {"mesh": inputs.mesh}
  before = latency.measure(*load_model(inputs.original), **how)
  after = latency.measure(config, params, **how)
  compared = latency.compare(before, after)
  return {"before": before, "after": after} | compared
