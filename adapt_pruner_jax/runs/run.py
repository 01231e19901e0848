"""A run, read from top to bottom: prune, refit, recover, evaluate, save.

Adapt-Pruner (one stage, no training) and Adapt-Accel (many, with training) are
two recipes of this loop. It can be killed anywhere; the same command goes on.
Where it goes on from, first match first:

  1. summary.json: the run is done, there is nothing to do.
  2. the newest checkpoint that is whole: taken after each prune, every
     `checkpoint.steps` train steps or `checkpoint.minutes`, and at the end of a
     stage's training.
  3. the original model.

and within a prune from pruning.json, the last step that was decided; behind a
stage's training from evaluated.json, what its evaluation gave. What a run reads
is opened in `inputs`, what it keeps is in `state`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax

from adapt_pruner_jax.config import Config, check
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.distributed.stopping import Stopping, stop_signals
from adapt_pruner_jax.errors import StoppedError
from adapt_pruner_jax.formats import convert, dtypes
from adapt_pruner_jax.models import layer, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, methods, surgery
from adapt_pruner_jax.pruning.task import Pruned, Step
from adapt_pruner_jax.reporting.html import report
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import (
  budget_results,
  deadline,
  export_size,
  latency_budget,
  prune_once,
  vocabulary,
)
from adapt_pruner_jax.runs.fingerprints import what_is_asked
from adapt_pruner_jax.runs.inputs import Inputs, open_inputs
from adapt_pruner_jax.runs.measure import (
  answers_note,
  measure,
  measure_answers,
  measure_latency,
  measure_original,
  measure_tasks,
  windows_note,
)
from adapt_pruner_jax.runs.recipe import claim, is_anew, remove_cut_off_exports
from adapt_pruner_jax.runs.recovery import compile_ahead, recover, teacher_of
from adapt_pruner_jax.runs.stages import (
  stage_end,
  stage_limits,
  stage_progress,
  stage_target,
)
from adapt_pruner_jax.runs.state import (
  EVALUATED,
  PRUNING,
  State,
  begin,
  forget,
  read_evaluated,
  read_pruning,
  require_same,
  resume,
  save_checkpoint,
  write_evaluated,
  write_pruning,
)
from adapt_pruner_jax.runs.summary import (
  add_control,
  disk_sizes,
  summarise,
  tell,
)
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from adapt_pruner_jax.training.loop import Ahead
from adapt_pruner_jax.training.lora import merge_lora

# Of a layer: the most that a refit has records of.
MATRICES = sum(1 + len(readers) for readers in layer.HALVES.values())


def run(
  recipe: Config,
  path: Path,
  overwrite: bool = False,
  begun: float | None = None,
) -> dict:
  """Runs or continues a recipe in a work directory; returns summary.json.

  Args:
    recipe: what to do.
    path: the work directory; made if it is not there.
    overwrite: replace what another run, or a finished one of this recipe, has
      left there. An unfinished one of this recipe is continued all the same.
    begun: when its time began, of `time.monotonic`; default now.

  Raises:
    UserError: bad input, or the directory belongs to another recipe.
    StoppedError: asked to stop by SIGTERM or SIGINT; the work is saved.
  """
  begun = time.monotonic() if begun is None else begun
  check(recipe)
  asked = what_is_asked(recipe, path, overwrite=overwrite)
  agreement.require_same(asked, "at the start")
  with lock.lock(path), Log(path, **dataclasses.asdict(recipe.log)) as log:
    finished = agreement.decided((path / "summary.json").exists)
    anew = is_anew(
      recipe, path, overwrite, finished and not lacks_control(recipe, path)
    )
    if finished and not anew:
      read = lambda: json_files.read_object(path / "summary.json")
      summary = agreement.decided(read)
      log.say(f"{path} is finished; its model is in {path / 'model'}")
      if agreement.is_writer() and not (path / report.HTML).exists():
        report.write(path)  # the run was killed just before
    else:
      with stop_signals() as stopping:
        inputs = open_inputs(recipe, path, log, stopping)
        summary = _run(inputs, stopping, anew, begun)
    tell(summary, path, log)
  if wants_control(recipe):
    at_once = dataclasses.replace(recipe.prune, stages=1)
    if at_once.counts("latency") and not at_once.budget_table:
      at_once.budget_table = str(path / latency_budget.TABLE)
    other = dataclasses.replace(recipe, oneshot_control=False, prune=at_once)
    summary = add_control(summary, run(other, path / "oneshot"), recipe, path)
  return summary


def wants_control(recipe: Config) -> bool:
  """Whether a run with one prune is to stand beside this one."""
  return recipe.oneshot_control and recipe.prune.stages > 1


def lacks_control(recipe: Config, path: Path) -> bool:
  """Whether a finished run still waits for the one beside it."""
  read = lambda: "control" not in json_files.read_object(path / "summary.json")
  return wants_control(recipe) and agreement.decided(read)


def _run(inputs: Inputs, stopping: Stopping, anew: bool, begun: float) -> dict:
  recipe, path = inputs.recipe, inputs.path
  methods.check(inputs.full, recipe.prune)
  require_same(inputs)
  claim(inputs, anew)
  with Checkpoints(
    path / "checkpoints", recipe.checkpoint.keep, inputs.log.say
  ) as checkpoints:
    state = resume(inputs, checkpoints)
    if state is None:
      state = begin(inputs)
      measured = time.monotonic()
      state.before = measure_original(state.config, state.params, inputs)
      state.before["seconds"] = time.monotonic() - measured
    tidy(state, inputs)
    earlier = state.seconds
    spent = earlier + time.monotonic() - begun
    later = state.before.get("seconds", 0.0)  # older checkpoints have none
    ending = deadline.stopping(recipe.train.hours, stopping, spent, later)

    def save() -> None:
      state.seconds = earlier + time.monotonic() - begun
      inputs.log.outbox.flush()  # what a checkpoint goes on behind
      save_checkpoint(checkpoints, state, inputs)

    def stop_if_asked() -> None:
      if stopping.now():
        checkpoints.wait()
        raise StoppedError(f"stopped; the same command continues {path}")

    # Loaded when it is first needed, which is behind the first prune.
    teacher = functools.cache(lambda: teacher_of(inputs))
    ahead = None
    while state.stage <= recipe.prune.stages:
      stop_if_asked()
      if not state.pruned:
        ahead = prune(state, inputs, stop_if_asked)
        require_same(inputs, state)
        save()
      if state.step < stage_end(inputs, state.stage):
        recover(state, inputs, teacher, save, ending, ahead)
        stop_if_asked()
      evaluate(state, inputs)
      inputs.log.outbox.merge()
      state.stage, state.pruned, ahead = state.stage + 1, False, None
    stop_if_asked()
    return finish(state, inputs, earlier + time.monotonic() - begun)


def tidy(state: State, inputs: Inputs) -> None:
  """Takes out of the work directory what is behind the state."""
  log = inputs.log
  if agreement.is_writer():
    log.outbox.rewrite(inputs.path / "trace.jsonl", state.trace)
  evaluated = state.saves > 0 and read_evaluated(state, inputs) is not None
  if not evaluated:
    forget(EVALUATED, inputs)  # it is of arrays that are gone
  if state.saves:
    log.rewind("eval", len(state.stages) + evaluated + 1)


# ---- Prune, refit ------------------------------------------------------------


def prune(
  state: State,
  inputs: Inputs,
  stop_if_asked: Callable[[], None],
) -> Ahead | None:
  """Prunes to the stage's target; `state` then holds the smaller model.

  Returns:
    The stage's train step, which compiles in a thread since the sizes of the
    layers are known; None without training.
  """
  settings, log = inputs.recipe.prune, inputs.log
  target = stage_target(inputs, state.stage)
  first = len(state.trace)
  ahead = None
  steps, after = read_pruning(state, inputs)
  if steps and agreement.is_writer():
    log.outbox.rewrite(inputs.path / "trace.jsonl", state.trace + steps)
  log.rewind("prune", first + len(steps) + 1)
  refits_before = (state.stage - 1) * MATRICES * inputs.full.num_layers
  log.rewind("refit", refits_before)
  title = f"stage {state.stage} of {settings.stages}: pruning"
  size = budgets.count(state.config, settings)
  aim = f" to {budgets.aim(target, settings)}" if target else ""
  log.say(f"{title} {budgets.shown(size, settings)}{aim} ({settings.method})")
  total, unit, done = stage_progress(inputs, state.config, target)
  with log.phase(title, total, unit) as phase:

    def note(record: dict, step: Step) -> None:
      record = {"stage": state.stage} | record
      steps.append(record)
      if agreement.is_writer():
        log.outbox.append(inputs.path / "trace.jsonl", record)
      write_pruning(step, steps, state, inputs)
      found = {k: record[k] for k in ("params", "loss")}
      phase.update(done(record, step), **found)
      values = {"stage": state.stage} | found
      log.metrics("prune", first + len(steps), values)
      stop_if_asked()

    def sized(config: ModelConfig) -> None:
      nonlocal ahead
      ahead = compile_ahead(config, state.stage, inputs)

    if settings.stream_layers:  # the device's copies are given up
      state.params = jax.device_get(state.params)
    pruned = prune_once.prune(
      (state.config, state.params),
      inputs,
      settings,
      target=target,
      limits=stage_limits(inputs, state.stage),
      kept=state.kept,
      first=first,
      passes=(state.stage - 1) * max(settings.refit_passes - 1, 0),
      after=after,
      log=note,
      sized=sized,
    )
  for number, row in enumerate(pruned.refits):
    log.metrics("refit", refits_before + number, {"stage": state.stage} | row)
  if state.opt_state is not None:
    state.opt_state = carried_moments(state, pruned, inputs)
  state.config, state.params = pruned.config, pruned.params
  state.kept, state.pruned = pruned.kept, True
  state.trace += steps
  return ahead


def carried_moments(state: State, pruned: Pruned, inputs: Inputs):
  """Adam's state of the parameters that are left; None = begin with a new one.

  Args:
    state: still of the model before.
  """
  if not inputs.recipe.train.carry_moments:
    return None
  keep = surgery.relative_to(state.kept, pruned.kept)
  cut, moments = surgery.gather(
    state.config, state.opt_state, keep, inputs.mesh
  )
  # FLAP and SliceGPT leave other parameters than those that were trained.
  same = model_config.param_shapes(cut) == model_config.param_shapes(
    pruned.config
  )
  return moments if same else None


# ---- Evaluate ----------------------------------------------------------------


def evaluate(state: State, inputs: Inputs) -> None:
  """Merges adapters and adds the stage's result, measured unless it is kept."""
  if state.adapters is not None:
    alpha = inputs.recipe.train.lora_alpha
    state.params = merge_lora(state.params, state.adapters, alpha)
    state.adapters = state.opt_state = None
  if state.stage == inputs.recipe.prune.stages:  # measured as it is exported
    state.params = dtypes.rounded(state.params, to_export(state, inputs))
  result = read_evaluated(state, inputs)
  if result is None:
    result = stage_result(state, inputs)
    # Of this stage's prune; where the result was kept, of the next one's.
    forget(PRUNING, inputs)
    write_evaluated(result, state, inputs)
  state.stages.append(result)


def stage_result(state: State, inputs: Inputs) -> dict:
  """Measures the model at the end of a stage."""
  recipe, log = inputs.recipe, inputs.log
  result = {
    "stage": state.stage,
    "params": model_config.count_params(state.config),
    "step": state.step,
  }
  if inputs.eval_tokens is not None:
    result |= measure(state.config, state.params, inputs)
  result |= measure_answers(state.config, state.params, inputs)
  # A row's step is the stage here; `step`, of training, would overwrite it.
  row = {k: v for k, v in result.items() if k != "step"}
  log.metrics("eval", state.stage, row | {"train_step": state.step})
  quality = ""
  if "perplexity" in result:
    quality = f", perplexity {result['perplexity']:.3f}{windows_note(inputs)}"
  quality += answers_note(result)
  log.say(
    f"stage {state.stage} of {recipe.prune.stages} done: "
    f"{result['params']:,} parameters{quality}"
  )
  if recipe.eval.tasks and state.stage == recipe.prune.stages:
    log.say(f"result: {recipe.eval.tasks}")
    result["evaluation"] = measure_tasks(state.config, state.params, inputs)
  return result


# ---- Save --------------------------------------------------------------------


def to_export(state: State, inputs: Inputs) -> Params:
  """The parameters as they are written: as the original, if not as asked."""
  return dtypes.for_export(
    state.config, state.params, inputs.source, export_size.dtype(inputs.recipe)
  )


def finish(state: State, inputs: Inputs, seconds: float) -> dict:
  """Exports the model and writes what a run leaves; summary.json comes last."""
  path, log, latency = inputs.path, inputs.log, None
  if inputs.recipe.eval.latency:
    log.say("timing the original and the result")
    latency = measure_latency(state.config, state.params, inputs)
  summary = summarise(state, inputs, seconds, latency)
  log.say(f"exporting to {path / 'model'}")
  if agreement.is_writer():
    remove_cut_off_exports(path)
  convert.write(
    state.config,
    to_export(state, inputs),
    path / "model",
    "orbax" if state.config.residual else "hf",  # SliceGPT fits no other
    source=inputs.source,
    overwrite=True,
    facts=summary,
  )
  summary |= disk_sizes(inputs.original.source, path / "model")
  summary |= budget_results.measure(state, inputs, summary["bytes_after"])
  if agreement.is_writer():
    layers = zip(state.kept["K"], state.kept["F"], strict=True)
    kept = [{"kv_groups": k.tolist(), "ffn": f.tolist()} for k, f in layers]
    if "X" in state.kept:
      rows = zip(kept, state.kept["X"], strict=True)
      kept = [row | {"experts": x.tolist()} for row, x in rows]
    tokens = {"vocab": vocabulary.kept(inputs.source)} if inputs.whole else {}
    json_files.write_json(path / "kept.json", {"layers": kept} | tokens)
    log.outbox.rewrite(path / "trace.jsonl", state.trace)
    log.outbox.merge()
    json_files.write_json(path / "summary.json", summary)
    report.write(path)
  return summary
