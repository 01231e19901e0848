"""Recovery training: how it starts, and its loop over train steps (`step`)."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import optimizer, stacking
from adapt_pruner_jax.training.lora import in_int8, init_lora
from adapt_pruner_jax.training.step import (
  Batch,
  Metrics,
  Step,
  abstract_batch,
  abstract_state,
  init_optimizer,
  likeliest,
  make_step,
)


class Training(NamedTuple):
  """A model in training: what a step changes, not stacked, and the step."""

  step_fn: Step  # holds the compiled program of these shapes
  trained: Any  # the params, or the adapters under LoRA
  opt_state: Any


class Ahead(NamedTuple):
  """A train step that compiles in a thread, and what it is of."""

  config: ModelConfig
  runs: stacking.Runs
  program: Future


def random_params(config: ModelConfig, mesh: Mesh, seed: int = 0) -> Params:
  """`decoder.init_params` in float32, each where it belongs on the mesh."""
  abstract = model_config.abstract_params(config, jnp.float32)
  placed = sharding.param_shardings(abstract, mesh)
  init = jax.jit(partial(decoder.init_params, config), out_shardings=placed)
  return init(jax.random.key(seed))


def compile_ahead(
  config: ModelConfig,
  settings: Train,
  mesh: Mesh,
  shape: tuple[int, int],
  *,
  dtype: jnp.dtype = jnp.float32,
  teacher: tuple[ModelConfig, Params] | None = None,
  tokens: int = 0,
) -> Ahead:
  """Starts to compile a train step in a thread.

  Args:
    config: of the model.
    settings, mesh, tokens: as they will be given to `start`.
    shape: of the batches, (rows, tokens of a row).
    dtype: of the params, where adapters are trained beside them.
    teacher: as it will be given to `start`; shapes with shardings will do.
  """
  rank = settings.lora_rank
  runs = stacking.choose(config, settings, mesh, tokens)
  trained, state = abstract_state(config, settings, mesh, rank, runs)
  base = None
  if rank:
    base = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
      abstract_state(config, settings, mesh, 0)[0],
    )
    if settings.lora_base == "int8":
      base = in_int8(base, mesh)
    base = stacking.abstract(runs, base, mesh)
  given = config, settings, lambda step: 0.0, mesh
  step_fn = make_step(*given, base=base, teacher=teacher, runs=runs)

  def compiled() -> Any:
    batch = abstract_batch(*shape, mesh, likeliest(settings, config))
    return step_fn.lower(trained, state, batch).compile()

  pool = ThreadPoolExecutor(1)
  program = pool.submit(compiled)
  pool.shutdown(wait=False)
  return Ahead(config, runs, program)


def start(
  model: tuple[ModelConfig, Params],
  settings: Train,
  schedule: optimizer.Schedule,
  mesh: Mesh,
  *,
  adapters: Any = None,
  opt_state: Any = None,
  teacher: tuple[ModelConfig, Params] | None = None,
  seed: int = 0,
  step_fn: Step | None = None,
  tokens: int = 0,
  ahead: Ahead | None = None,
) -> Training:
  """Makes what training needs: the step, the optimizer state, and adapters.

  Args:
    model: config and params. The first step donates the params, unless
      `settings.lora_rank` says that adapters are trained beside them.
    settings: how to train.
    schedule: the learning rate of each global step.
    mesh: devices that batches are cut over.
    adapters: those to go on with; None = new ones, drawn from `seed`.
    opt_state: the state to go on with; None = a fresh one.
    teacher: the pair to distil from, if `settings.distill_alpha` > 0 and no
      cache of it is in the batches.
    seed: of new adapters.
    step_fn: of an earlier start with the same shapes, settings and teacher;
      None = a new one, which compiles at its first call.
    tokens: to train on; what is worth compiling depends on it.
    ahead: from `compile_ahead`; waited for if it is of this model.
  """
  config, params = model
  base, trained = None, params
  if settings.lora_rank:
    base, trained = params, adapters
    if settings.lora_base == "int8" and step_fn is None:
      base = in_int8(base, mesh)
    if adapters is None:
      key = jax.random.key(seed)
      trained = init_lora(config, settings.lora_rank, key, mesh)
      opt_state = None
  if opt_state is None:
    opt_state = init_optimizer(trained, settings, mesh)
  if step_fn is None:
    runs = stacking.choose(config, settings, mesh, tokens)
    base = stacking.stack(runs, base, mesh)
    if settings.distill_alpha and teacher is not None:
      teacher = stacking.teacher(teacher, settings, mesh)
    given = config, settings, schedule, mesh
    step_fn = make_step(*given, base=base, teacher=teacher, runs=runs)
    if ahead is not None and (ahead.config, ahead.runs) == (config, runs):
      step_fn = dataclasses.replace(step_fn, program=ahead.program.result())
  return Training(step_fn, trained, opt_state)


def recover(
  training: Training,
  batches: Iterator[Batch],
  first_step: int,
  last_step: int,
  mesh: Mesh,
  log: Callable[[int, dict[str, float]], None] | None = None,
  stop: Callable[[int], bool] | None = None,
  skip_nonfinite: bool = False,
) -> tuple[Training, int]:
  """Trains through global steps first_step ... last_step - 1.

  Args:
    training: from `start`; its arrays are donated.
    batches: one a step, the same in every process; the position in the data is
      already at `first_step`.
    log: called with each step's number and metrics, one step late, so that the
      device never waits for the host.
    stop: asked before each step but the first; True ends the loop early.
    skip_nonfinite: go on after a non-finite loss; that step changed nothing.

  Returns:
    The training as it now is, and the next global step. By then every step has
    been checked, so the state is fit to be saved.

  Raises:
    UserError: a non-finite loss, or the data ended.
  """
  step_fn = training.step_fn
  trained, opt_state = stacked(training, mesh)
  running = None
  step = first_step
  while step < last_step:
    if step > first_step and stop is not None and stop(step):
      break
    batch = next(batches, None)
    if batch is None:
      raise UserError(
        f"the training data ended before step {step}, {last_step - step} "
        "step(s) early: lower --config.train.tokens or give more text"
      )
    placed = place(batch, mesh)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      trained, opt_state, metrics = step_fn(trained, opt_state, placed, step)
    if running is not None:
      _report(*running, log, skip_nonfinite)
    running = step, metrics
    step += 1
  if running is not None:
    _report(*running, log, skip_nonfinite)
  trained, opt_state = (
    stacking.unstack(step_fn.runs, step_fn.config, tree, mesh, donate=True)
    for tree in (trained, opt_state)
  )
  return Training(step_fn, trained, opt_state), step


def stacked(training: Training, mesh: Mesh) -> tuple[Any, Any]:
  """What is trained, and its state, as the step takes them.

  The arrays of `training` are donated, so that no more than a run of layers is
  there twice.
  """
  runs = training.step_fn.runs
  trained, opt_state = (
    stacking.stack(runs, tree, mesh, donate=True) for tree in training[1:]
  )
  return trained, opt_state


def _report(
  step: int,
  metrics: Metrics,
  log: Callable[[int, dict[str, float]], None] | None,
  skip_nonfinite: bool,
) -> None:
  values = {name: float(value) for name, value in metrics.items()}
  bad = [n for n in ("loss", "grad_norm") if not math.isfinite(values[n])]
  if bad and not skip_nonfinite:
    raise UserError(
      f"{bad[0]} is {values[bad[0]]} at train step {step} (batch {step} of "
      "the data order); nothing was saved after the last checkpoint: try a "
      "lower --config.train.learning_rate in another --workdir, or go on "
      "here without such batches: --config.train.skip_nonfinite=True"
    )
  if log is not None:
    log(step, values)


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """A batch on the devices, each with its rows."""
  return {
    name: placement.place_rows(array, mesh) for name, array in batch.items()
  }
