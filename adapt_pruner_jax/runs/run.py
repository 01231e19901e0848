"""The run: stages of prune -> refit -> recover -> checkpoint -> evaluate.

Adapt-Pruner (one stage, no training) and Adapt-Accel (many, with training) are
two recipes of this loop. It can be killed anywhere; the same command goes on.
Where it goes on from, first match first:

  1. summary.json: the run is done, there is nothing to do.
  2. the newest checkpoint that is whole: taken after each prune, every
     `checkpoint.steps` train steps, at the end of a stage's training and of the
     stage.
  3. the original model.

and within a prune from `pruning.json`, the last step that was decided.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from adapt_pruner_jax.config import Config, check
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.distributed.stopping import (
  StoppedError,
  asked_to_stop,
  stop_signals,
)
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.models import flops, layer, model_config
from adapt_pruner_jax.pruning import methods, surgery, task
from adapt_pruner_jax.pruning.schedule import stage_ends, stage_targets
from adapt_pruner_jax.reporting.html import report
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs.inputs import Setting, prepare, teacher_of
from adapt_pruner_jax.runs.measure import (
  measure,
  measure_latency,
  measure_tasks,
)
from adapt_pruner_jax.runs.pruning_log import (
  PRUNING,
  read_pruning,
  write_pruning,
)
from adapt_pruner_jax.runs.recipe import check_recipe, claim
from adapt_pruner_jax.runs.state import State, resume, save_checkpoint
from adapt_pruner_jax.runs.summary import shown, summarise, tell
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from adapt_pruner_jax.training import loop, optimizer
from adapt_pruner_jax.training.lora import init_lora, merge_lora
from adapt_pruner_jax.training.step import init_optimizer, make_step

# Of a layer: the most that a refit has records of.
MATRICES = sum(1 + len(readers) for readers in layer.HALVES.values())


def run(config: Config, path: Path) -> dict:
  """Runs or continues a recipe in a work directory; returns summary.json.

  Raises:
    UserError: bad input, or the directory belongs to another recipe.
    StoppedError: asked to stop by SIGTERM or SIGINT; the work is saved.
  """
  check(config)
  with lock.lock(path), Log(path, **dataclasses.asdict(config.log)) as log:
    check_recipe(config, path)
    if (path / "summary.json").exists():
      summary = json_files.read_json(path / "summary.json")
      log.say(f"{path} is finished; its model is in {path / 'model'}")
      if agreement.is_writer() and not (path / report.HTML).exists():
        report.write(path)  # the run was killed just before
    else:
      with stop_signals() as stopping:
        summary = _run(config, path, log, stopping)
    tell(summary, path, log)
  if config.oneshot_control and config.prune.stages > 1:
    summary = _control(config, path, summary)
  return summary


def _run(config: Config, path: Path, log: Log, stopping: dict) -> dict:
  begun = time.monotonic()
  setting = prepare(config, path, log)
  methods.check(setting.full, config.prune)
  claim(config, path)
  with Checkpoints(
    path / "checkpoints", config.checkpoint.keep, log.say
  ) as checkpoints:
    state = resume(setting, checkpoints)
    earlier = state.seconds

    def save_state() -> None:
      state.seconds = earlier + time.monotonic() - begun
      save_checkpoint(checkpoints, state, setting)

    def stop_if_asked() -> None:
      if not agreement.all_agree(not stopping["asked"]):
        checkpoints.wait()
        raise StoppedError(f"stopped; the same command continues {path}")

    teacher = teacher_of(setting)
    while state.stage <= config.prune.stages:
      stop_if_asked()
      if not state.pruned:
        prune_stage(state, setting, stop_if_asked)
        save_state()
      recover_stage(state, setting, teacher, save_state, stopping)
      stop_if_asked()
      finish_stage(state, setting)
      save_state()
    checkpoints.wait()
    stop_if_asked()
    return finish(state, setting, earlier + time.monotonic() - begun)


# ---- A stage -----------------------------------------------------------------


def prune_stage(state: State, setting: Setting, stop_if_asked: Any) -> None:
  """Prunes to the stage's target; `state` then holds the smaller model."""
  config, settings = setting.config, setting.config.prune
  target = _stage_target(setting, state.stage)
  first = len(state.trace)
  steps, after = read_pruning(state, setting)
  setting.log.rewind("prune", first + len(steps) + 1)
  refits_before = (state.stage - 1) * MATRICES * setting.full.num_layers
  setting.log.rewind("refit", refits_before)
  title = f"stage {state.stage} of {settings.stages}: pruning"
  size = model_config.count_params(state.config)
  aim = f" to {target:,}" if target else ""
  setting.log.say(f"{title} {size:,} parameters{aim} ({settings.method})")
  total = size - target if target else settings.max_steps

  with setting.log.phase(
    title, total, "parameters" if target else "steps"
  ) as p:

    def note(record: dict, step: task.Step) -> None:
      record = {"stage": state.stage} | record
      steps.append(record)
      if agreement.is_writer():
        json_files.append_line(setting.path / "trace.jsonl", record)
      write_pruning(step, steps, state, setting)
      done = size - record["params"] if target else record["step"]
      p.update(
        done, params=record["params"], target=target, loss=record["loss"]
      )
      values = {k: record[k] for k in ("stage", "loss", "params")}
      setting.log.metrics("prune", first + len(steps), values)
      stop_if_asked()

    old = (state.config, state.params)
    pruned = methods.METHODS[settings.method](
      *old,
      settings,
      lambda step: setting.calibration.batch(first + step),
      target=target,
      batch=config.calibration.batch,
      mesh=setting.mesh,
      full=setting.full,
      kept=state.kept,
      seed=config.seed,
      after=after,
      log=note,
    )
  keep = surgery.relative_to(state.kept, pruned.kept)
  if settings.refit != "none":
    setting.log.say("refitting what is left")
  params, refits = methods.refit_after(
    old,
    pruned,
    keep,
    settings,
    lambda: setting.refit_data.batch(first + len(steps)),
    config.calibration.batch,
    setting.mesh,
  )
  for number, row in enumerate(refits):
    row = {"stage": state.stage} | row
    setting.log.metrics("refit", refits_before + number, row)
  opt_state, state.opt_state = state.opt_state, None
  if opt_state is not None and config.train.carry_moments:
    cut, opt_state = surgery.gather(state.config, opt_state, keep, setting.mesh)
    # FLAP and SliceGPT leave other parameters than those that were trained.
    if model_config.param_shapes(cut) == model_config.param_shapes(
      pruned.config
    ):
      state.opt_state = opt_state
  state.config, state.params, state.kept = pruned.config, params, pruned.kept
  state.trace += steps
  state.pruned = True


def _stage_target(setting: Setting, stage: int) -> int | None:
  if setting.target is None:
    return None
  size = model_config.count_params(setting.full)
  stages = setting.config.prune.stages
  return stage_targets(size, setting.target, stages)[stage - 1]


def recover_stage(
  state: State, setting: Setting, teacher: Any, save_state: Any, stopping: dict
) -> None:
  """Trains on the stage's share of the tokens, from `state.step` on."""
  config, settings = setting.config, setting.config.train
  last = stage_end(setting, state.stage)
  if state.step >= last:
    return
  schedule = optimizer.schedule(settings, setting.total_steps)
  if settings.lora_rank and state.adapters is None:
    key = jax.random.key(config.seed + state.stage)
    state.adapters = init_lora(
      state.config, settings.lora_rank, key, setting.mesh
    )
    state.opt_state = None
  lora = state.adapters is not None
  trained = state.adapters if lora else state.params
  if state.opt_state is None:
    state.opt_state = init_optimizer(trained, settings, setting.mesh)
  step_fn = make_step(
    state.config,
    settings,
    schedule,
    setting.mesh,
    base=state.params if lora else None,
    teacher=teacher,
  )
  per_step = config.data.step_tokens
  begin = stage_end(setting, state.stage - 1)
  title = f"stage {state.stage} of {config.prune.stages}: recovery"
  setting.log.rewind("train", state.step)
  size = model_config.count_params(state.config)
  total = (last - begin) * per_step
  cost = flops.training_flops(state.config, config.data.seq_len)
  with setting.log.phase(title, total, "tokens", flops=cost) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      done = (step + 1 - begin) * per_step
      phase.update(done, loss=values["loss"], params=size)
      row = values | {
        "stage": state.stage,
        "total_tokens": (step + 1) * per_step,
      }
      setting.log.metrics("train", step, row)

    while state.step < last and not asked_to_stop(stopping, state.step):
      until = min(last, state.step + config.checkpoint.steps)
      trained, state.opt_state, state.step = loop.recover(
        step_fn,
        trained,
        state.opt_state,
        setting.rows.batches(state.step),
        state.step,
        until,
        setting.mesh,
        log=note,
        stop=lambda step: asked_to_stop(stopping, step),
        skip_nonfinite=settings.skip_nonfinite,
      )
      if lora:
        state.adapters = trained
      else:
        state.params = trained
      save_state()


def stage_end(setting: Setting, stage: int) -> int:
  """The global train step at which a stage ends; 0 before the first."""
  config = setting.config
  ends = stage_ends(
    setting.total_steps, config.prune.stages, config.train.data_share
  )
  return [0, *ends][stage]


def finish_stage(state: State, setting: Setting) -> None:
  """Merges adapters, evaluates, and turns to the next stage."""
  if state.adapters is not None:
    alpha = setting.config.train.lora_alpha
    state.params = merge_lora(state.params, state.adapters, alpha)
    state.adapters = state.opt_state = None
  result = {
    "stage": state.stage,
    "params": model_config.count_params(state.config),
    "step": state.step,
  }
  if setting.eval_tokens is not None:
    result |= measure(state.config, state.params, setting)
  # A row's step is the stage here; `step`, of training, would overwrite it.
  row = {k: v for k, v in result.items() if k != "step"}
  setting.log.metrics("eval", state.stage, row | {"train_step": state.step})
  quality = ""
  if "perplexity" in result:
    quality = f", perplexity {result['perplexity']:.3f}"
  setting.log.say(
    f"stage {state.stage} of {setting.config.prune.stages} done: "
    f"{result['params']:,} parameters{quality}"
  )
  if setting.config.eval.tasks and state.stage == setting.config.prune.stages:
    setting.log.say(f"result: {setting.config.eval.tasks}")
    result["evaluation"] = measure_tasks(state.config, state.params, setting)
  state.stages.append(result)
  state.stage, state.pruned = state.stage + 1, False
  if agreement.is_writer():
    (setting.path / PRUNING).unlink(missing_ok=True)


# ---- After the stages --------------------------------------------------------


def finish(state: State, setting: Setting, seconds: float) -> dict:
  """Exports the model and writes what a run leaves; summary.json comes last."""
  path = setting.path
  latency = None
  if setting.config.eval.latency:
    setting.log.say("timing the original and the result")
    latency = measure_latency(state.config, state.params, setting)
  summary = summarise(state, setting, seconds, latency)
  setting.log.say(f"exporting to {path / 'model'}")
  if agreement.is_writer():
    for left in path.glob(".model-*"):  # by a process killed in the export
      shutil.rmtree(left, ignore_errors=True)
  convert.write(
    state.config,
    state.params,
    path / "model",
    "orbax" if state.config.residual else "hf",  # SliceGPT fits no other
    source=setting.source,
    overwrite=True,
    facts=summary,
  )
  if agreement.is_writer():
    layers = zip(state.kept["K"], state.kept["F"], strict=True)
    kept = [{"kv_groups": k.tolist(), "ffn": f.tolist()} for k, f in layers]
    json_files.write_json(path / "kept.json", {"layers": kept})
    json_files.rewrite_lines(path / "trace.jsonl", state.trace)
    json_files.write_json(path / "summary.json", summary)
    report.write(path)
  return summary


def _control(config: Config, path: Path, summary: dict) -> dict:
  """The same tokens after pruning in one go, for comparison."""
  other = dataclasses.replace(
    config,
    oneshot_control=False,
    prune=dataclasses.replace(config.prune, stages=1),
  )
  found = run(other, path / "oneshot")
  summary |= {
    "control": {
      name: found[name]
      for name in (
        "params_after",
        "perplexity_after",
        "train_tokens",
        "seconds",
      )
    }
  }
  with lock.lock(path), Log(path, **dataclasses.asdict(config.log)) as log:
    rows = [
      (name, f"{s['params_after']:,}", f"{s['train_tokens']:,}", shown(s))
      for name, s in (
        (f"{config.prune.stages} stages", summary),
        ("one shot, then the same training", found),
      )
    ]
    columns = ("", "parameters", "tokens", "perplexity")
    log.table("Interleaved or in one go", columns, rows)
    if agreement.is_writer():
      json_files.write_json(path / "summary.json", summary)
      report.write(path)
  return summary
