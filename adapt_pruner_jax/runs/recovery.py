"""A stage's training, which compiles as soon as the stage's sizes are known."""

import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.distributed.stopping import Stopping
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import flops, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.devices import peak_flops
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.reporting.progress import Pace
from adapt_pruner_jax.runs.deadline import Ending
from adapt_pruner_jax.runs.fingerprints import weights_fingerprint
from adapt_pruner_jax.runs.inputs import Inputs, weight_dtype
from adapt_pruner_jax.runs.stages import stage_end
from adapt_pruner_jax.runs.state import State, steps_to_save
from adapt_pruner_jax.storage import cache, digest
from adapt_pruner_jax.training import (
  loop,
  memory,
  optimizer,
  stacking,
  step,
)
from adapt_pruner_jax.training.teacher_cache import TeacherCache, fill


def stage_tokens(inputs: Inputs, stage: int) -> int:
  """Tokens that a stage trains on, whatever of them is done."""
  steps = stage_end(inputs, stage) - stage_end(inputs, stage - 1)
  return steps * inputs.recipe.data.step_tokens


def compile_ahead(
  config: ModelConfig, stage: int, inputs: Inputs
) -> loop.Ahead | None:
  """Starts to compile a stage's train step, while refits and saving go on.

  Args:
    config: of the model that will be trained.
    stage: its number, from 1.
    inputs: of the run.

  Returns:
    What `recover` waits for; None without training.
  """
  recipe, tokens = inputs.recipe, stage_tokens(inputs, stage)
  if not tokens:
    return None
  shape = recipe.data.batch, recipe.data.seq_len
  return loop.compile_ahead(
    config,
    recipe.train,
    inputs.mesh,
    shape,
    dtype=weight_dtype(inputs),
    teacher=abstract_teacher(inputs),
    tokens=tokens,
  )


def recover(
  state: State,
  inputs: Inputs,
  teacher: Callable[[], tuple[ModelConfig, Params] | None],
  save: Callable[[], None],
  stopping: Stopping | Ending,
  ahead: loop.Ahead | None = None,
) -> None:
  """Trains on the stage's share of the tokens, from `state.step` on.

  Args:
    teacher: gives the pair to distil from, if the recipe does and its answers
      are not cached.
    save: writes a checkpoint of `state`.
    stopping: from `stop_signals`, or with a deadline.
    ahead: the stage's step, if it has been compiling.
  """
  recipe, settings, log = inputs.recipe, inputs.recipe.train, inputs.log
  first = stage_end(inputs, state.stage - 1)
  last = stage_end(inputs, state.stage)
  training, batches = _begun(state, inputs, teacher, stopping, ahead)
  # Adapters are trained beside a copy, stacked or in eight bits, and merged
  # into the params that are there.
  base = training.step_fn.base
  copied = base is not None and base is not state.params
  aside = copied and jax.process_count() == 1
  if aside:
    state.params = jax.device_get(state.params)
  per_step = recipe.data.step_tokens
  title = f"stage {state.stage} of {recipe.prune.stages}: recovery"
  log.rewind("train", state.step)
  size = model_config.count_params(state.config)
  total = (last - first) * per_step
  cost, pace = _costs(state.config, inputs)
  with log.phase(title, total, "tokens", flops=cost) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      done, paced = (step + 1 - first) * per_step, pace.step()
      phase.update(done, loss=values["loss"], params=size, **paced)
      row = {"stage": state.stage, "total_tokens": (step + 1) * per_step}
      row |= paced
      log.metrics("train", step, values | row)

    seconds = None  # of a step
    while state.step < last and not stopping.now():
      begun, before = time.monotonic(), state.step
      training, state.step = loop.recover(
        training,
        log.profile.watch(batches(state.step), state.step),
        state.step,
        min(last, state.step + steps_to_save(recipe.checkpoint, seconds)),
        inputs.mesh,
        log=note,
        stop=lambda _: stopping.now(),
        skip_nonfinite=settings.skip_nonfinite,
      )
      state.opt_state = training.opt_state
      if settings.lora_rank:
        state.adapters = training.trained
      else:
        state.params = training.trained
      log.profile.close()
      save()
      pace.pause()
      seconds = (time.monotonic() - begun) / max(state.step - before, 1)
  if aside:
    where = sharding.param_shardings(state.params, inputs.mesh)
    state.params = jax.device_put(state.params, where)


def _costs(config: ModelConfig, inputs: Inputs) -> tuple[float, Pace]:
  """FLOPs of training on one token, the teacher's among them; and what times
  steps by them."""
  data, settings = inputs.recipe.data, inputs.recipe.train
  taught_by = inputs.full if settings.has_teacher_beside() else None
  given = data.seq_len, taught_by, bool(settings.lora_rank)
  cost = flops.training_flops(config, *given)
  tokens, peak = data.step_tokens, peak_flops(jax.devices()[0])
  return cost, Pace(tokens, cost * tokens, jax.device_count(), peak)


def _begun(state, inputs, teacher, stopping, ahead) -> tuple:
  """The training of a stage, and its batches from a step on; arguments as of
  `recover`."""
  recipe, settings = inputs.recipe, inputs.recipe.train
  batches, taught = inputs.rows.batches, None
  if step.likeliest(settings, inputs.full):
    batches = cached(state, inputs, stopping)
  else:
    taught = teacher()
  training = loop.start(
    (state.config, state.params),
    settings,
    optimizer.schedule(settings, inputs.total_steps),
    inputs.mesh,
    adapters=state.adapters,
    opt_state=state.opt_state,
    teacher=taught,
    seed=recipe.seed + state.stage,
    tokens=stage_tokens(inputs, state.stage),
    ahead=ahead,
  )
  remat = recomputed(state.config, taught, inputs)
  if settings.remat == "auto" and remat != "none":
    inputs.log.say(f"train.remat=auto: {remat}, by this device's memory")
  return training, batches


def cached(
  state: State, inputs: Inputs, stopping: Stopping | Ending
) -> Callable[[int], Iterator[step.Batch]]:
  """Batches from a step on, with the teacher's likeliest tokens of a cache.

  First the teacher answers what the cache lacks of the stage's rows; it is
  loaded for that, and given up behind it.

  Args:
    state, inputs, stopping: as `recover`'s.
  """
  recipe = inputs.recipe
  number = step.likeliest(recipe.train, inputs.full)
  who = digest.of_json(
    [
      weights_fingerprint(inputs.source),
      *(recipe.train.dtype, recipe.model.ignore_fields),
      recipe.train.distill_temperature,
    ]
  )
  name = f"teacher-{who}-{recipe.data.seq_len}-{number}.bin"
  told = TeacherCache(
    cache.beside(inputs.path) / name, recipe.data.seq_len, number
  )
  left = stage_end(inputs, state.stage) - state.step
  per_step = recipe.data.step_tokens
  rows = itertools.islice(inputs.rows.batches(state.step), left)
  answered = fill(
    told, rows, lambda: teacher_of(inputs), recipe.train, inputs.mesh
  )
  title = f"stage {state.stage} of {recipe.prune.stages}: teacher's tokens"
  with inputs.log.phase(title, left * per_step, "tokens") as phase:
    for done in answered:
      phase.update(done * per_step)
      if stopping.now():
        return inputs.rows.batches  # no step is taken any more
  return lambda first: told.with_taught(inputs.rows.batches(first))


def recomputed(
  config: ModelConfig,
  teacher: tuple[ModelConfig, Params] | None,
  inputs: Inputs,
) -> str:
  """What `train.remat` becomes for a model."""
  recipe = inputs.recipe
  shape = recipe.data.batch // recipe.train.accumulation, recipe.data.seq_len
  taught = teacher and teacher[0]
  return memory.with_remat(
    recipe.train, config, taught, shape, inputs.mesh
  ).remat


def teacher_of(inputs: Inputs) -> tuple[ModelConfig, Params] | None:
  """The model before any pruning, where training distils from it, as stored.

  Of a cut vocabulary it has the rows that stay: a softmax of its logits is the
  original's distribution over these tokens, renormalised.
  """
  if not _distils(inputs):
    return None
  pair = load.load(str(inputs.source), None, inputs.mesh, _ignored(inputs))
  return stacking.teacher(pair, inputs.recipe.train, inputs.mesh)


def abstract_teacher(inputs: Inputs) -> tuple[ModelConfig, Params] | None:
  """`teacher_of` as shapes with shardings; no weight is read."""
  if not inputs.total_steps or not inputs.recipe.train.has_teacher_beside():
    return None
  config, tree = load.stored(str(inputs.source), None, _ignored(inputs))
  settings, mesh = inputs.recipe.train, inputs.mesh
  shapes = model_config.abstract_params(config, jnp.float32)
  params = jax.tree.map(
    lambda x, s, p: jax.ShapeDtypeStruct(s.shape, x.dtype, sharding=p),
    tree,
    shapes,
    sharding.param_shardings(shapes, mesh),
  )
  return stacking.abstract_teacher((config, params), settings, mesh)


def _distils(inputs: Inputs) -> bool:
  return bool(inputs.recipe.train.distill_alpha and inputs.total_steps)


def _ignored(inputs: Inputs) -> str:
  return inputs.recipe.model.ignore_fields
