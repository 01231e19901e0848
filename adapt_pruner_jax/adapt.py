"""The run: stages of prune -> refit -> recover -> checkpoint -> evaluate.

Adapt-Pruner (one stage, no training) and Adapt-Accel (many, with training) are
two recipes of this loop. It can be killed anywhere; the same command goes on.
Where it goes on from, first match first:

  1. summary.json: the run is done, there is nothing to do.
  2. the newest checkpoint that is whole: taken after each prune, every
     `checkpoint.steps` train steps, and at the end of each stage.
  3. the original model.

and within a prune from `pruning.json`, the last step that was decided.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax import (
  checkpoint,
  data,
  evaluate,
  methods,
  model,
  optim,
  prune,
  report,
  sharding,
  sources,
  sparsity,
  tiny,
  tokens,
  train,
  workdir,
)
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.config import Config, check, difference
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.hf import load, save
from adapt_pruner_jax.log import Log
from adapt_pruner_jax.model import ModelConfig

# Sections of the recipe that may change between the parts of one run.
FREE_SECTIONS = ("mesh", "checkpoint", "log")


class StoppedError(Exception):
  """The run was asked to stop; what it did is saved."""


@dataclasses.dataclass
class Setting:
  """What a run works with and does not change."""

  config: Config
  path: Path  # the work directory
  source: Path  # the original model's directory
  full: ModelConfig  # of the original model
  target: int | None
  mesh: Mesh
  tokenizer: tokens.Tokenizer | None
  calibration: Any  # .batch(step) of pruning steps, counted over all stages
  refit_data: Any  # the same for refits
  rows: data.TrainData | None
  eval_tokens: np.ndarray | None
  total_steps: int  # train steps over all stages
  log: Log


@dataclasses.dataclass
class State:
  """What a run changes: all that a checkpoint holds."""

  config: ModelConfig
  params: Params
  kept: prune.Kept
  stage: int = 1  # under way, from 1
  pruned: bool = False  # this stage's prune is done
  step: int = 0  # train steps done, over all stages
  opt_state: Any = None
  adapters: Any = None  # under LoRA
  trace: list[dict] = dataclasses.field(default_factory=list)
  stages: list[dict] = dataclasses.field(default_factory=list)  # their results
  before: dict = dataclasses.field(default_factory=dict)  # perplexity
  seconds: float = 0.0  # of earlier processes
  saves: int = 0  # number of the newest checkpoint


def run(config: Config, path: Path) -> dict:
  """Runs or continues a recipe in a work directory; returns summary.json.

  Raises:
    UserError: bad input, or the directory belongs to another recipe.
    StoppedError: asked to stop by SIGTERM or SIGINT; the work is saved.
  """
  check(config)
  with workdir.lock(path), Log(path, **dataclasses.asdict(config.log)) as log:
    claim(config, path)
    if (path / "summary.json").exists():
      summary = workdir.read_json(path / "summary.json")
      log.say(f"{path} is finished; its model is in {path / 'model'}")
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
  with checkpoint.Checkpoints(
    path / "checkpoints", config.checkpoint.keep, log.say
  ) as checkpoints:
    state = resume(setting, checkpoints)
    earlier = state.seconds

    def save_state() -> None:
      state.seconds = earlier + time.monotonic() - begun
      save_checkpoint(checkpoints, state, setting)

    def stop_if_asked() -> None:
      if not workdir.all_agree(not stopping["asked"]):
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


# ---- Before the stages -------------------------------------------------------


def claim(config: Config, path: Path) -> None:
  """Writes the recipe into a new work directory, or compares it.

  Raises:
    UserError: the directory is of a run with another recipe.
  """
  mine = dataclasses.asdict(config)
  file = path / "config.json"
  problem = None
  if workdir.is_writer():
    if not file.exists():
      workdir.write_json(file, mine)
    old = workdir.read_json(file)
    changed = [
      line
      for line in difference(old, mine)
      if line.split(".")[0] not in FREE_SECTIONS
    ]
    if changed:
      problem = (
        f"--workdir={path} belongs to a run with another recipe: "
        f"{'; '.join(changed)}; give the old recipe or another --workdir"
      )
  if not workdir.all_agree(problem is None):
    raise UserError(problem or "process 0 refused the work directory")


def prepare(config: Config, path: Path, log: Log) -> Setting:
  """Opens everything a run reads, so that bad input shows before any work."""
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  source = model_path(config.model.path, log)
  full = load.read_config(str(source), config.model.ignore_fields)
  target = prune.resolve_target(full, config.prune)
  prune.prunable_modules(full, config.prune)
  cache = path / "cache"
  tokenizer = None
  if not config.calibration.source.startswith("npy:") or config.train.tokens:
    tokenizer = tokens.load_tokenizer(source)
  calibration = data.calibration_data(
    config.calibration, tokenizer, full.V, config.seed, cache
  )
  refit_data = calibration
  if config.prune.refit != "none":
    more = dataclasses.replace(
      config.calibration, samples=config.calibration.refit_samples
    )
    refit_data = data.calibration_data(
      more, tokenizer, full.V, config.seed + 1, cache
    )
  rows, total_steps = None, 0
  if config.train.tokens:
    rows = data.train_data(
      config.data,
      tokenizer,
      full.V,
      config.seed,
      jax.process_index(),
      jax.process_count(),
      cache,
    )
    per_step = config.data.batch * config.data.seq_len
    total_steps = -(-config.train.tokens // per_step)
  eval_tokens = None
  if config.eval.text:
    tokenizer = tokenizer or tokens.load_tokenizer(source)
    eval_tokens = read_eval_text(config.eval.text, tokenizer, full.V)
  return Setting(
    config,
    path,
    source,
    full,
    target,
    mesh,
    tokenizer,
    calibration,
    refit_data,
    rows,
    eval_tokens,
    total_steps,
    log,
  )


def model_path(name: str, log: Log) -> Path:
  """The directory of `model.path`; the tiny model is made if it is missing."""
  if name != "tiny":
    return load.resolve(name)
  if workdir.is_writer():
    tiny.base_model(progress=log.say)
  workdir.all_agree(True)  # the others wait for it
  return tiny.base_model(progress=log.say)


def read_eval_text(
  text: str, tokenizer: tokens.Tokenizer, vocab_size: int
) -> np.ndarray:
  if text == "embedded":
    content = sources.embedded_text("heldout")
  else:
    content = sources.read_text(text)
  return data.heldout_tokens(content, tokenizer, vocab_size)


def teacher_of(setting: Setting) -> tuple[ModelConfig, Params] | None:
  """The original model, where training distils from it."""
  if not (setting.config.train.distill_alpha and setting.total_steps):
    return None
  return load_model(setting)


def load_model(setting: Setting) -> tuple[ModelConfig, Params]:
  """The original model."""
  # Master weights are float32 whatever the arithmetic.
  dtype = setting.config.model.dtype
  return load.load(
    str(setting.source),
    "float32" if setting.total_steps else dtype,
    setting.mesh,
    setting.config.model.ignore_fields,
  )


# ---- A stage -----------------------------------------------------------------


def prune_stage(state: State, setting: Setting, stop_if_asked: Any) -> None:
  """Prunes to the stage's target; `state` then holds the smaller model."""
  config, settings = setting.config, setting.config.prune
  target = _stage_target(setting, state.stage)
  first = len(state.trace)
  steps, after = _read_pruning(state, setting)
  title = f"stage {state.stage} of {settings.stages}: pruning"
  size = model.count_params(state.config)
  aim = f" to {target:,}" if target else ""
  setting.log.say(f"{title} {size:,} parameters{aim} ({settings.method})")
  total = size - target if target else settings.max_steps

  with setting.log.phase(
    title, total, "parameters" if target else "steps"
  ) as p:

    def note(record: dict, step: prune.Step | None = None) -> None:
      record = {"stage": state.stage} | record
      steps.append(record)
      workdir.append_line(setting.path / "trace.jsonl", record)
      if step is not None:
        _write_pruning(step, steps, state, setting)
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
  keep = prune.relative_to(state.kept, pruned.kept)
  if settings.refit != "none":
    setting.log.say("refitting what is left")
  params, refits = methods.refit_after(
    old,
    pruned,
    keep,
    settings,
    setting.refit_data.batch(first + len(steps)),
    config.calibration.batch,
    setting.mesh,
  )
  for number, row in enumerate(refits):
    setting.log.metrics("refit", number, {"stage": state.stage} | row)
  if state.opt_state is not None and config.train.carry_moments:
    _, state.opt_state = prune.gather(
      state.config, state.opt_state, keep, setting.mesh
    )
  else:
    state.opt_state = None
  state.config, state.params, state.kept = pruned.config, params, pruned.kept
  state.trace += steps
  state.pruned = True


def _stage_target(setting: Setting, stage: int) -> int | None:
  if setting.target is None:
    return None
  size = model.count_params(setting.full)
  stages = setting.config.prune.stages
  return sparsity.stage_targets(size, setting.target, stages)[stage - 1]


def recover_stage(
  state: State, setting: Setting, teacher: Any, save_state: Any, stopping: dict
) -> None:
  """Trains on the stage's share of the tokens, from `state.step` on."""
  config, settings = setting.config, setting.config.train
  last = stage_end(setting, state.stage)
  if state.step >= last:
    return
  schedule = optim.schedule(
    settings.schedule,
    settings.learning_rate,
    settings.min_learning_rate,
    setting.total_steps,
  )
  if settings.lora_rank and state.adapters is None:
    key = jax.random.key(config.seed + state.stage)
    state.adapters = train.init_lora(
      state.config, settings.lora_rank, key, setting.mesh
    )
    state.opt_state = None
  lora = state.adapters is not None
  trained = state.adapters if lora else state.params
  if state.opt_state is None:
    state.opt_state = train.init_optimizer(trained, settings, setting.mesh)
  step_fn = train.make_step(
    state.config,
    settings,
    schedule,
    setting.mesh,
    base=state.params if lora else None,
    teacher=teacher,
  )
  per_step = config.data.batch * config.data.seq_len
  begin = stage_end(setting, state.stage - 1)
  title = f"stage {state.stage} of {config.prune.stages}: recovery"
  setting.log.rewind("train", state.step)
  size = model.count_params(state.config)
  total = (last - begin) * per_step
  with setting.log.phase(title, total, "tokens", flops=6.0 * size) as phase:

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
      trained, state.opt_state, state.step = train.recover(
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
      if state.step < last:
        save_state()


def stage_end(setting: Setting, stage: int) -> int:
  """The global train step at which a stage ends."""
  config = setting.config
  shares = sparsity.token_shares(config.prune.stages, config.train.data_share)
  if stage == config.prune.stages:
    return setting.total_steps
  return round(setting.total_steps * sum(shares[:stage]))


def finish_stage(state: State, setting: Setting) -> None:
  """Merges adapters, evaluates, and turns to the next stage."""
  if state.adapters is not None:
    alpha = setting.config.train.lora_alpha
    state.params = train.merge_lora(state.params, state.adapters, alpha)
    state.adapters = state.opt_state = None
  result = {
    "stage": state.stage,
    "params": model.count_params(state.config),
    "step": state.step,
  }
  if setting.eval_tokens is not None:
    result |= measure(state.config, state.params, setting)
  setting.log.metrics("eval", state.stage, result)
  shown = f", perplexity {result['perplexity']:.3f}" if len(result) > 3 else ""
  setting.log.say(
    f"stage {state.stage} of {setting.config.prune.stages} done: "
    f"{result['params']:,} parameters{shown}"
  )
  state.stages.append(result)
  state.stage, state.pruned = state.stage + 1, False
  if workdir.is_writer():
    (setting.path / "pruning.json").unlink(missing_ok=True)


def measure(config: ModelConfig, params: Params, setting: Setting) -> dict:
  """Perplexity per token, and the mean loss, on the evaluation text."""
  recipe = setting.config.eval
  found = evaluate.perplexity(
    config,
    params,
    setting.eval_tokens,
    recipe.seq_len or min(setting.full.context, 2048),
    recipe.batch,
    setting.mesh,
  )
  return {"perplexity": found[0], "loss": found[1] / found[2]}


# ---- After the stages --------------------------------------------------------


def finish(state: State, setting: Setting, seconds: float) -> dict:
  """Exports the model and writes what a run leaves; summary.json comes last."""
  path = setting.path
  summary = summarise(state, setting, seconds)
  setting.log.say(f"exporting to {path / 'model'}")
  save.save(
    state.config,
    state.params,
    path / "model",
    source=setting.source,
    overwrite=True,
    facts=summary,
  )
  if workdir.is_writer():
    layers = zip(state.kept["K"], state.kept["F"], strict=True)
    kept = [{"kv_groups": k.tolist(), "ffn": f.tolist()} for k, f in layers]
    workdir.write_json(path / "kept.json", {"layers": kept})
    workdir.rewrite_lines(path / "trace.jsonl", state.trace)
    workdir.write_json(path / "summary.json", summary)
    report.write(path)
  return summary


def summarise(state: State, setting: Setting, seconds: float) -> dict:
  full, new = setting.full, state.config
  after = state.stages[-1]
  per_step = setting.config.data.batch * setting.config.data.seq_len
  return {
    "method": setting.config.prune.method,
    "model": setting.config.model.path,
    "params_before": model.count_params(full),
    "params_after": model.count_params(new),
    "target_params": setting.target,
    "perplexity_before": state.before.get("perplexity"),
    "perplexity_after": after.get("perplexity"),
    "train_tokens": state.step * per_step,
    "seconds": round(seconds, 3),
    "heads_before": [k * full.G for k in full.K],
    "heads_after": [k * new.G for k in new.K],
    "kv_heads_before": list(full.K),
    "kv_heads_after": list(new.K),
    "ffn_before": list(full.F),
    "ffn_after": list(new.F),
    "stages": state.stages,
    "prune_steps": len(state.trace),
    "refit": setting.config.prune.refit,
    "versions": versions(),
    "hardware": hardware(),
  }


def tell(summary: dict, path: Path, log: Log) -> None:
  """The final table: what was removed per layer, what it cost, where it is."""
  rows = []
  columns = ("kv_heads_before", "kv_heads_after", "ffn_before", "ffn_after")
  layers = zip(*(summary[c] for c in columns), strict=True)
  for i, (k0, k1, f0, f1) in enumerate(layers):
    rows.append(
      (i, f"{k0} -> {k1}", f"{f0} -> {f1}", f"{1 - f1 / (f0 or 1):.0%}")
    )
  log.table(
    "Layers", ("layer", "KV groups", "MLP channels", "MLP removed"), rows
  )
  before, after = summary["params_before"], summary["params_after"]
  rows = [
    ("parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
  ]
  if summary["perplexity_after"] is not None:
    low, high = summary["perplexity_before"], summary["perplexity_after"]
    rows.append(
      ("perplexity", f"{low:.3f}", f"{high:.3f}", f"{high / low - 1:+.1%}")
    )
  log.table("Result", ("", "before", "after", "change"), rows)
  log.say(f"model: {path / 'model'}   report: {path / 'report.html'}")


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
  with workdir.lock(path), Log(path, **dataclasses.asdict(config.log)) as log:
    rows = [
      (name, f"{s['params_after']:,}", f"{s['train_tokens']:,}", _shown(s))
      for name, s in (
        (f"{config.prune.stages} stages", summary),
        ("one shot, then the same training", found),
      )
    ]
    columns = ("", "parameters", "tokens", "perplexity")
    log.table("Interleaved or in one go", columns, rows)
    if workdir.is_writer():
      workdir.write_json(path / "summary.json", summary)
      report.write(path)
  return summary


def _shown(summary: dict) -> str:
  value = summary["perplexity_after"]
  return "" if value is None else f"{value:.3f}"


def versions() -> dict[str, str]:
  names = ("adapt-pruner-jax", "jax", "flax", "optax", "orbax-checkpoint")
  return {"python": platform.python_version()} | {
    name: importlib.metadata.version(name) for name in names
  }


def hardware() -> str:
  device = jax.devices()[0]
  return f"{jax.device_count()} x {device.device_kind} ({device.platform})"


# ---- Stopping and going on ---------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[dict]:
  """SIGTERM and SIGINT set ["asked"]; a second SIGINT ends at once."""
  stopping = {"asked": False}

  def ask(number: int, _: Any) -> None:
    stopping["asked"] = True
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)

  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stopping
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def asked_to_stop(stopping: dict, step: int) -> bool:
  """Whether to stop; of several processes all say the same at one step."""
  if jax.process_count() == 1:
    return stopping["asked"]
  from jax.experimental import multihost_utils

  if multihost_utils.reached_preemption_sync_point(step):
    stopping["asked"] = True
  return stopping["asked"]


def save_checkpoint(
  checkpoints: checkpoint.Checkpoints, state: State, setting: Setting
) -> None:
  state.saves += 1
  names = ("stage", "pruned", "step", "trace", "stages", "before", "seconds")
  meta = {name: getattr(state, name) for name in names}
  meta |= {
    "model": model.to_json(state.config),
    "kept": {u: [k.tolist() for k in v] for u, v in state.kept.items()},
    "data": setting.rows.fingerprint if setting.rows else None,
    "lora": state.adapters is not None,
    "optimizer": state.opt_state is not None,
  }
  checkpoints.save(state.saves, meta, _arrays(state))


def _arrays(state: State) -> dict:
  arrays = {"params": state.params}
  if state.opt_state is not None:
    arrays["opt_state"] = state.opt_state
  if state.adapters is not None:
    arrays["adapters"] = state.adapters
  return arrays


def resume(setting: Setting, checkpoints: checkpoint.Checkpoints) -> State:
  """The state to go on from: the newest checkpoint, else the original model."""
  found = checkpoints.restore(lambda meta: abstract_state(meta, setting))
  if found is None:
    config, params = load_model(setting)
    state = State(config, params, prune.everything(config))
    if setting.eval_tokens is not None:
      state.before = measure(config, params, setting)
      perplexity = state.before["perplexity"]
      size = model.count_params(config)
      setting.log.say(f"{size:,} parameters, perplexity {perplexity:.3f}")
    if workdir.is_writer():
      (setting.path / "trace.jsonl").unlink(missing_ok=True)
    setting.log.rewind("prune", 0)
  else:
    number, meta, arrays = found
    fingerprint = setting.rows.fingerprint if setting.rows else None
    if meta["data"] != fingerprint:
      raise UserError(
        f"--config.data.source={setting.config.data.source} has other tokens "
        "than when this run began: give the old data or another --workdir"
      )
    kept = {
      u: tuple(np.array(k, int) for k in v) for u, v in meta["kept"].items()
    }
    state = State(
      model.from_json(meta["model"]), kept=kept, saves=number, **arrays
    )
    for name in (
      "stage",
      "pruned",
      "step",
      "trace",
      "stages",
      "before",
      "seconds",
    ):
      setattr(state, name, meta[name])
    setting.log.say(
      f"continuing at stage {state.stage} of {setting.config.prune.stages}, "
      f"train step {state.step} of {setting.total_steps}"
    )
    setting.log.rewind("prune", len(state.trace) + 1)
    setting.log.rewind("eval", len(state.stages) + 1)
  if workdir.is_writer():
    workdir.rewrite_lines(setting.path / "trace.jsonl", state.trace)
  return state


def abstract_state(meta: dict, setting: Setting) -> dict:
  """Shapes and shardings of the arrays of a checkpoint."""
  config, settings, mesh = (
    model.from_json(meta["model"]),
    setting.config.train,
    setting.mesh,
  )
  dtype = jnp.dtype(
    "float32" if setting.total_steps else setting.config.model.dtype
  )
  params = model.abstract_params(config, dtype)
  placed = sharding.param_shardings(params, mesh)
  trees = {"params": (params, placed)}
  if meta["lora"]:
    trees["adapters"] = train.abstract_adapters(
      config, settings.lora_rank, mesh
    )
  if meta["optimizer"]:
    transform = optim.optimizer(settings.weight_decay)
    trained, where = trees["adapters"] if meta["lora"] else trees["params"]
    trees["opt_state"] = (
      jax.eval_shape(transform.init, trained),
      optim.state_shardings(transform, trained, where, mesh),
    )
  return {
    name: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      where,
    )
    for name, (tree, where) in trees.items()
  }


def _write_pruning(
  step: prune.Step, steps: list[dict], state: State, setting: Setting
) -> None:
  """Keeps a decided step, so that a killed stage need not score again."""
  if jax.process_count() > 1 or not methods.resumes(setting.config.prune):
    return
  kept = prune.to_kept(step.masks)
  workdir.write_json(
    setting.path / "pruning.json",
    {
      "stage": state.stage,
      "train_step": state.step,
      "number": step.number,
      "params": int(step.params),
      "kept": {u: [k.tolist() for k in v] for u, v in kept.items()},
      "sparsity": {u: s.tolist() for u, s in step.sparsity.items()},
      "trace": steps,
    },
  )


def _read_pruning(
  state: State, setting: Setting
) -> tuple[list[dict], prune.Step | None]:
  """The records of the stage's finished steps, and the last of them."""
  file = setting.path / "pruning.json"
  if jax.process_count() > 1 or not file.exists():
    return [], None
  saved = workdir.read_json(file)
  if (saved["stage"], saved["train_step"]) != (state.stage, state.step):
    return [], None
  kept = {
    u: tuple(np.array(k, int) for k in v) for u, v in saved["kept"].items()
  }
  masks = prune.to_masks(kept, setting.full)
  width = {u: np.array(s) for u, s in saved["sparsity"].items()}
  step = prune.Step(saved["number"], masks, width, saved["params"])
  workdir.rewrite_lines(
    setting.path / "trace.jsonl", state.trace + saved["trace"]
  )
  return saved["trace"], step
