"""`train.hours`: a time to end in, in place of a number of tokens.

`settle` times a few train steps of the model as it will be when it is pruned,
with random weights, takes what `memory` says of the device, and writes what it
chose: tokens, stages, microbatches, full training or adapters. `predict` does
the same with a device's peak in place of the timing, for `plan`.

Scoring is not timed: its FLOPs count at the speed of training, `SLOWER` times,
since its batches are small. A share of the hours is left for compiling,
evaluation and export; should the rest take longer all the same, training ends
early (`runs.deadline`).
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.config import Config, check, vocab_size
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.devices import USABLE
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import cost, memory, times
from adapt_pruner_jax.planning.hardware import (
  Hardware,
  compile_for,
  resolve,
)
from adapt_pruner_jax.pruning import targets
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.reporting.progress import duration
from adapt_pruner_jax.runs.recipe import RECIPE, changed
from adapt_pruner_jax.storage import json_files, lock
from adapt_pruner_jax.training import loop, optimizer
from adapt_pruner_jax.training.step import batch_of

FILE = "hours.json"  # in the work directory: what was chosen, and for what
PLANNED = 0.8  # share of the hours that pruning and training are to take
SLOWER = 2.0  # a FLOP of scoring, against one of training
TIMED = 3  # train steps
RANK = 16  # of adapters, where training all weights does not fit


@dataclasses.dataclass(frozen=True)
class Speed:
  """How fast a device trains.

  Attributes:
    step: seconds of a train step.
    compiling: seconds before the first.
  """

  step: float
  compiling: float


def settle(
  config: Config,
  path: Path,
  model: ModelConfig,
  log: Any,
  anew: bool = False,
  begun: float | None = None,
) -> Config:
  """The recipe with tokens in place of hours, once and for all of a run.

  Args:
    config: a recipe with `train.hours`.
    path: the work directory, which keeps the choice.
    model: the original's sizes.
    log: gets a line.
    anew: another recipe's choice may be replaced.
    begun: when the hours began, of `time.monotonic`; default now.

  Raises:
    UserError: too few hours, or a model that does not fit at all.
  """
  begun = time.monotonic() if begun is None else begun
  asked = dataclasses.asdict(config)
  file = path / FILE
  kept = json_files.read_object(file) if file.exists() else {}
  # Another recipe's choice stays: its run is there until this one claims it.
  choices = [kept, *kept.pop("earlier", [])]
  for choice in choices:
    before = choice.get("asked")
    if not isinstance(before, dict) or changed(before, asked):
      continue
    made = _chosen(config, choice["chosen"])
    if config.train.remat != before["train"]["remat"]:  # it may change
      made.train.remat = config.train.remat
    return made
  claimed = (path / RECIPE).exists()
  if claimed and not anew:  # the run will say that it is another recipe's
    return _with_tokens(config)
  if jax.process_count() > 1:
    raise UserError(
      "--config.train.hours times one process: give --config.train.tokens"
    )
  config = _with_tokens(config)
  check(config)
  full, student = _sizes(config, model)
  config = fitted(config, full, student, resolve(Hardware()))
  log.say("timing a few train steps, for --config.train.hours")
  speed = timed(config, full, student)
  flops = cost.training_flops(student, full, config) * config.data.step_tokens
  spent = time.monotonic() - begun
  chosen = choose(config, full, speed, flops / speed.step, spent, model)
  path.mkdir(parents=True, exist_ok=True)
  kept = {"asked": asked, "chosen": chosen, "speed": dataclasses.asdict(speed)}
  earlier = [choice for choice in choices if "asked" in choice]
  json_files.write_json(file, kept | {"earlier": earlier})
  log.say(said(config, chosen, speed))
  return _chosen(config, chosen)


def of_run(config: Config, path: Path, overwrite: bool, begun: float) -> Config:
  """`settle` for the command line.

  Args:
    config: a recipe with `train.hours`.
    path, overwrite, begun: as of `runs.run`.

  Raises:
    UserError: as `settle`'s; or tokens are given too, or no target.
  """
  checked(config)
  from adapt_pruner_jax.planning.plan import original

  full = original(config)[0]
  with lock.lock(path):  # of two at once one chooses
    return settle(config, path, full, Log(None), overwrite, begun)


def checked(config: Config) -> None:
  """Raises a UserError unless hours can be turned into tokens."""
  check(config)
  if config.train.tokens:
    raise UserError(
      f"--config.train.hours={config.train.hours} and "
      f"--config.train.tokens={config.train.tokens} are both given: give one "
      "of them"
    )
  if not config.prune.has_target() or config.prune.budget == "quality":
    raise UserError(
      "--config.train.hours needs to know what is left to train: give "
      "--config.prune.ratio or .target_params"
    )
  if config.prune.counts("latency") and not config.prune.budget_table:
    raise UserError(
      "--config.train.hours beside a latency needs its table before: "
      "adapt-pruner profile --model=DIR --out=table.json, then "
      "--config.prune.budget_table=table.json"
    )


def predict(
  config: Config, model: ModelConfig, hardware: Hardware
) -> tuple[Config, str]:
  """What `settle` would choose on a device of which only the peak is known.

  Returns:
    The recipe with tokens, and what was chosen, for people.

  Raises:
    UserError: as `settle`'s, or the peak is not known.
  """
  if not hardware.peak:
    raise UserError(
      "--config.train.hours on a device of unknown speed: give --device or "
      "--tflops"
    )
  config = _with_tokens(config)
  full, student = _sizes(config, model)
  config = fitted(config, full, student, hardware)
  rate = hardware.peak * hardware.mfu * hardware.devices
  flops = cost.training_flops(student, full, config) * config.data.step_tokens
  speed = Speed(flops / rate, times.STEP)
  chosen = choose(config, full, speed, rate, whole=model)
  return _chosen(config, chosen), said(config, chosen, speed)


def choose(
  config: Config,
  full: ModelConfig,
  speed: Speed,
  rate: float,
  spent: float = 0.0,
  whole: ModelConfig | None = None,
) -> dict[str, int]:
  """Tokens and stages that fill the hours.

  Stages are as the recipe says, or fewer where pruning and compiling them would
  take more than half of the time.

  Args:
    config: with any number of tokens.
    full: the model to prune.
    rate: FLOP/s of training.
    spent: seconds of the hours until now.
    whole: the model before its vocabulary was cut; None = `full`.

  Raises:
    UserError: too few hours for a train step behind one stage.
  """
  seconds = config.train.hours * 3600 * PLANNED - spent
  target = targets.resolve_target(full, config.prune, whole)
  for stages in range(config.prune.stages, 0, -1):
    prune = dataclasses.replace(config.prune, stages=stages)
    rows = cost.stage_table(
      dataclasses.replace(config, prune=prune), full, target
    )
    before = sum(r["prune_flops"] for r in rows) * SLOWER / rate
    before += stages * speed.compiling
    if before <= seconds / 2 or stages == 1:
      break
  steps = int((seconds - before) / speed.step)
  if steps < stages:
    least = (before + stages * speed.step + spent) / PLANNED / 3600
    raise UserError(
      f"--config.train.hours={config.train.hours} are too few: one stage and a "
      f"train step need about {least:.2g}; give more, or less to prune by "
      "(--config.calibration.samples, a larger --config.prune.step_size)"
    )
  return {
    "tokens": steps * config.data.step_tokens,
    "stages": stages,
    "lora_rank": config.train.lora_rank,
    "remat": config.train.remat,
    "accumulation": config.train.accumulation,
    "prune_seconds": round(before),
    "train_seconds": round(steps * speed.step),
  }


def fitted(
  config: Config, full: ModelConfig, student: ModelConfig, hardware: Hardware
) -> Config:
  """The recipe changed until training fits the device's memory.

  First activations are recomputed, then the batch is split, then adapters are
  trained in place of all weights.

  Raises:
    UserError: not even adapters fit.
  """
  usable, devices = hardware.memory * USABLE, compile_for(hardware)
  if isinstance(devices, str):  # of which too many ways would be compiled
    devices = hardware.devices
  if not usable:
    return config
  # Only training is asked for: a method whose scoring is not compiled.
  prune = dataclasses.replace(config.prune, method="flap", refit="none")
  prune = dataclasses.replace(prune, group_importance="")
  ways = [{}, {"remat": "full"}]
  split, rows = config.train.accumulation, config.data.batch
  number = devices if isinstance(devices, int) else len(devices)
  shards = max(number // max(config.mesh.tensor, 1), 1)
  splits = [
    n for n in (2, 4, 8, 16, 32, 64) if n > split and not rows % (n * shards)
  ]
  ways += [{"remat": "full", "accumulation": n} for n in splits]
  ways += [way | {"lora_rank": RANK} for way in ways]
  for way in ways:
    train = dataclasses.replace(config.train, **way)
    made = dataclasses.replace(config, train=train, prune=prune)
    found = memory.measure(
      *(made, full, student, devices, hardware.memory, hardware.device)
    )
    if sum(found["training"].values()) <= usable:
      return dataclasses.replace(config, train=train)
  raise UserError(
    "training does not fit the device's memory, not even of adapters: give "
    "more devices, or a shorter --config.data.seq_len"
  )


def timed(config: Config, full: ModelConfig, student: ModelConfig) -> Speed:
  """Times train steps on this machine's devices, with random weights."""
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  # With a cache, time that the teacher takes as often as it is cached.
  settings = dataclasses.replace(config.train, teacher_cache=0)
  data = config.data
  pair = student, loop.random_params(student, mesh)
  teacher = None
  if settings.distill_alpha:
    teacher = full, loop.random_params(full, mesh)
  schedule = optimizer.schedule(settings, TIMED + 1)
  training = loop.start(pair, settings, schedule, mesh, teacher=teacher)
  step_fn, (trained, state) = training.step_fn, loop.stacked(training, mesh)
  rows_BT = np.zeros((data.batch, data.seq_len), np.int32)
  batch = batch_of(rows_BT)
  seconds = []
  for number in range(TIMED + 1):
    begun = time.perf_counter()
    placed = loop.place(batch, mesh)
    trained, state, metrics = step_fn(trained, state, placed, number)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - begun)
  step = statistics.median(seconds[1:])
  return Speed(step, max(seconds[0] - step, 0.0))


def said(config: Config, chosen: dict, speed: Speed) -> str:
  """What was chosen, in a line."""
  how = f"adapters of rank {chosen['lora_rank']}"
  if not chosen["lora_rank"]:
    how = "all weights"
  return (
    f"{config.train.hours} hours: {chosen['tokens']:,} tokens in "
    f"{chosen['stages']} stage(s), {how}, {chosen['accumulation']} "
    f"microbatch(es); a train step takes {speed.step:.3g} s; pruning about "
    f"{duration(chosen['prune_seconds'])}, training "
    f"{duration(chosen['train_seconds'])}"
  )


def _with_tokens(config: Config) -> Config:
  """One step of tokens, so that the recipe is one that trains."""
  train = dataclasses.replace(config.train, tokens=config.data.step_tokens)
  return dataclasses.replace(config, train=train)


def _chosen(config: Config, chosen: dict) -> Config:
  names = ("tokens", "lora_rank", "remat", "accumulation")
  train = {name: chosen[name] for name in names}
  return dataclasses.replace(
    config,
    prune=dataclasses.replace(config.prune, stages=chosen["stages"]),
    train=dataclasses.replace(config.train, **train),
  )


def _sizes(
  config: Config, whole: ModelConfig
) -> tuple[ModelConfig, ModelConfig]:
  """The model to prune, and the largest one that is trained."""
  tokens = vocab_size(config.vocab, whole.vocab_size)
  full = dataclasses.replace(whole, vocab_size=tokens)
  target = targets.resolve_target(full, config.prune, whole)
  return full, cost.stage_table(config, full, target)[0]["config"]
