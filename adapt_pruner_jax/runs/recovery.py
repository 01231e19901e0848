"""A stage's training, which compiles as soon as the stage's sizes are known."""

from collections.abc import Callable

from adapt_pruner_jax.distributed.stopping import asked_to_stop
from adapt_pruner_jax.models import flops, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.runs.inputs import Inputs, stage_end
from adapt_pruner_jax.runs.state import State
from adapt_pruner_jax.training import loop, optimizer


def stage_tokens(inputs: Inputs, stage: int) -> int:
  """Tokens that a stage trains on, whatever of them is done."""
  steps = stage_end(inputs, stage) - stage_end(inputs, stage - 1)
  return steps * inputs.recipe.data.step_tokens


def compile_ahead(
  config: ModelConfig,
  stage: int,
  inputs: Inputs,
  teacher: tuple[ModelConfig, Params] | None,
) -> loop.Ahead | None:
  """Starts to compile a stage's train step, while refits and saving go on.

  Args:
    config: of the model that will be trained.
    stage: its number, from 1.
    inputs: of the run.
    teacher: as `recover`'s.

  Returns:
    What `recover` waits for; None without training.
  """
  recipe, tokens = inputs.recipe, stage_tokens(inputs, stage)
  if not tokens:
    return None
  shape = recipe.data.batch, recipe.data.seq_len
  return loop.compile_ahead(
    config, recipe.train, inputs.mesh, shape, teacher=teacher, tokens=tokens
  )


def recover(
  state: State,
  inputs: Inputs,
  teacher: tuple[ModelConfig, Params] | None,
  save: Callable[[], None],
  stopping: dict,
  ahead: loop.Ahead | None = None,
) -> None:
  """Trains on the stage's share of the tokens, from `state.step` on.

  Args:
    teacher: the pair to distil from, if the recipe does.
    save: writes a checkpoint of `state`.
    stopping: from `stop_signals`.
    ahead: the stage's step, if it has been compiling.
  """
  recipe, settings, log = inputs.recipe, inputs.recipe.train, inputs.log
  first, last = (
    stage_end(inputs, state.stage - 1),
    stage_end(inputs, state.stage),
  )
  training = loop.start(
    (state.config, state.params),
    settings,
    optimizer.schedule(settings, inputs.total_steps),
    inputs.mesh,
    adapters=state.adapters,
    opt_state=state.opt_state,
    teacher=teacher,
    seed=recipe.seed + state.stage,
    tokens=stage_tokens(inputs, state.stage),
    ahead=ahead,
  )
  per_step = recipe.data.step_tokens
  title = f"stage {state.stage} of {recipe.prune.stages}: recovery"
  log.rewind("train", state.step)
  size = model_config.count_params(state.config)
  total = (last - first) * per_step
  cost = flops.training_flops(state.config, recipe.data.seq_len)
  with log.phase(title, total, "tokens", flops=cost) as phase:

    def note(step: int, values: dict[str, float]) -> None:
      done = (step + 1 - first) * per_step
      phase.update(done, loss=values["loss"], params=size)
      row = {"stage": state.stage, "total_tokens": (step + 1) * per_step}
      log.metrics("train", step, values | row)

    while state.step < last and not asked_to_stop(stopping, state.step):
      training, state.step = loop.recover(
        training,
        inputs.rows.batches(state.step),
        state.step,
        min(last, state.step + recipe.checkpoint.steps),
        inputs.mesh,
        log=note,
        stop=lambda step: asked_to_stop(stopping, step),
        skip_nonfinite=settings.skip_nonfinite,
      )
      state.opt_state = training.opt_state
      if settings.lora_rank:
        state.adapters = training.trained
      else:
        state.params = training.trained
      save()
