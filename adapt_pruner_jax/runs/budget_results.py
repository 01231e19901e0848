"""What a run's budget holds in the end: of bytes in its files, of milliseconds
by the clock."""

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.runs import export_size, latency_budget
from adapt_pruner_jax.runs.inputs import Inputs, load_model
from adapt_pruner_jax.runs.state import State


def measure(state: State, inputs: Inputs, weights: int) -> dict:
  """`budget_before`, `budget_after` and more of summary.json, of the export.

  Args:
    state: of the result, which has been exported.
    weights: bytes of its safetensors files.
  """
  settings, path, log = inputs.recipe.prune, inputs.path, inputs.log
  said = agreement.on_writer(lambda: export_size.write(settings, path))
  if said:
    log.say(said)
  found = export_size.amounts(
    settings, inputs.original.full, state.config, path, inputs.beside, weights
  )
  if settings.budget == "quality":
    return found | {"budget_before": 0.0, "budget_after": _rise(state)}
  if not settings.counts("latency"):
    return found
  log.say("timing the original and the result in turns")
  timed = latency_budget.compare(
    settings,
    load_model(inputs.original),
    (state.config, state.params),
    (inputs.original.source, path / "model"),
  )
  log.say(latency_budget.text(timed))
  found["latency_budget"] = timed
  if settings.budget == "latency" and timed["measured_ms"] is not None:
    found["budget_before"] = timed["original_measured_ms"]
    found["budget_after"] = timed["measured_ms"]
  return found


def _rise(state: State) -> float:
  """Nats a token above the original, behind the last pruning step.

  0 where there was none: the model had no unit to lose.
  """
  return state.trace[-1]["rise"] if state.trace else 0.0
