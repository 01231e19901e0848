"""What a run has done so far: in memory, in checkpoints, and in two files.

A checkpoint is written after each prune, every `checkpoint.steps` train steps
or `checkpoint.minutes`, and at the end of a stage's training. Between two of
them pruning.json keeps the last decided step of a prune, and evaluated.json the
result of a stage whose training is in a checkpoint.
"""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.config import Checkpoint
from adapt_pruner_jax.distributed import agreement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import methods, surgery, task
from adapt_pruner_jax.runs.fingerprints import what_is_read
from adapt_pruner_jax.runs.inputs import Inputs, load_model, weight_dtype
from adapt_pruner_jax.storage import digest, json_files
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from adapt_pruner_jax.training import lora, optimizer

PRUNING = "pruning.json"
EVALUATED = "evaluated.json"
TIMED = 50  # train steps, at most, before it is known how long they take
# Fields of `State` that a checkpoint keeps as they are.
PLAIN = ("stage", "pruned", "step", "trace", "stages", "before", "seconds")


@dataclasses.dataclass
class State:
  """What a run changes: all that a checkpoint holds."""

  config: ModelConfig
  params: Params
  kept: surgery.Kept
  stage: int = 1  # under way, from 1
  pruned: bool = False  # this stage's prune is done
  step: int = 0  # train steps done, over all stages
  opt_state: Any = None
  adapters: Any = None  # under LoRA
  trace: list[dict] = dataclasses.field(default_factory=list)
  stages: list[dict] = dataclasses.field(default_factory=list)  # their results
  before: dict = dataclasses.field(default_factory=dict)  # the original's
  seconds: float = 0.0  # of earlier processes
  saves: int = 0  # number of the newest checkpoint


def begin(inputs: Inputs) -> State:
  """The state before anything was done: the original model, whole."""
  config, params = load_model(inputs)
  return State(config, params, surgery.everything(config))


# ---- Checkpoints -------------------------------------------------------------


def save_checkpoint(
  checkpoints: Checkpoints, state: State, inputs: Inputs
) -> None:
  """Starts to write a checkpoint; the state may change when this returns."""
  state.saves += 1
  meta = {name: getattr(state, name) for name in PLAIN}
  meta |= {
    "version": package_version(),
    "model": model_config.to_json(state.config),
    "kept": _kept_to_json(state.kept),
    "data": inputs.rows.fingerprint if inputs.rows else None,
    "lora": state.adapters is not None,
    "optimizer": state.opt_state is not None,
  }
  arrays = {"params": state.params}
  if state.opt_state is not None:
    arrays["opt_state"] = state.opt_state
  if state.adapters is not None:
    arrays["adapters"] = state.adapters
  checkpoints.save(state.saves, meta, arrays)


def steps_to_save(settings: Checkpoint, seconds: float | None) -> int:
  """How many train steps until the next checkpoint, as process 0 has it.

  Args:
    seconds: that a step takes; None = nobody knows yet.
  """
  steps = settings.steps
  if settings.minutes and seconds is None:
    steps = min(steps, TIMED)
  elif settings.minutes:
    steps = min(steps, max(1, int(60 * settings.minutes / max(seconds, 1e-9))))
  return agreement.from_writer(steps)


def resume(inputs: Inputs, checkpoints: Checkpoints) -> State | None:
  """The state in the newest checkpoint that is whole; None if there is none.

  Raises:
    UserError: the checkpoint is of other training data, or of a version that
      keeps other things.
  """
  found = checkpoints.restore(lambda meta: _abstract_state(meta, inputs))
  if found is None:
    return None
  number, meta, arrays = found
  if meta["data"] != (inputs.rows.fingerprint if inputs.rows else None):
    raise UserError(
      f"--config.data.source={inputs.recipe.data.source} has other tokens "
      "than when this run began: give the old data or another --workdir"
    )
  state = State(
    model_config.from_json(meta["model"]),
    kept=_kept_from_json(meta["kept"]),
    saves=number,
    **arrays,
    **{name: meta[name] for name in PLAIN},
  )
  inputs.log.say(
    f"continuing at stage {state.stage} of {inputs.recipe.prune.stages}, "
    f"train step {state.step} of {inputs.total_steps}" + _of_version(meta)
  )
  return state


def _of_version(meta: dict) -> str:
  """Who wrote a checkpoint, if it was another version."""
  mine = package_version()
  if meta.get("version") == mine:
    return ""
  theirs = meta.get("version") or "an earlier version"  # it did not say so
  return f", from a checkpoint of {theirs} (this is {mine})"


def _abstract_state(meta: dict, inputs: Inputs) -> dict:
  """Shapes and shardings of the arrays of a checkpoint."""
  missing = {*PLAIN, "model", "kept", "data", "lora", "optimizer"} - {*meta}
  if missing:
    raise UserError(
      f"the checkpoints in {inputs.path} lack {', '.join(sorted(missing))}"
      f"{_of_version(meta)}: continue with the version that wrote them, or "
      "start anew with --overwrite"
    )
  config, settings = model_config.from_json(meta["model"]), inputs.recipe.train
  params = model_config.abstract_params(config, weight_dtype(inputs))
  trees = {"params": (params, sharding.param_shardings(params, inputs.mesh))}
  if meta["lora"]:
    trees["adapters"] = lora.abstract_adapters(
      config, settings.lora_rank, inputs.mesh
    )
  if meta["optimizer"]:
    transform = optimizer.of(settings)
    trained, where = trees["adapters"] if meta["lora"] else trees["params"]
    trees["opt_state"] = (
      jax.eval_shape(transform.init, trained),
      optimizer.state_shardings(transform, trained, where, inputs.mesh),
    )
  return {
    name: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      where,
    )
    for name, (tree, where) in trees.items()
  }


# ---- The other processes -----------------------------------------------------


def require_same(inputs: Inputs, state: State | None = None) -> None:
  """Compares what this process works on with what the others do.

  Args:
    state: behind a stage's prune; None = before any work.

  Raises:
    UserError: on all processes, if one has something else.
  """
  if jax.process_count() == 1:
    return
  facts, moment = what_is_read(inputs), "at the start"
  if state is not None:
    moment = f"behind the prune of stage {state.stage}"
    facts |= {
      "masks": _kept_to_json(state.kept),
      "sizes": model_config.to_json(state.config),
      "position": [state.stage, state.step, state.saves, len(state.trace)],
    }
  agreement.require_same(facts, moment)


# ---- pruning.json: within a prune --------------------------------------------


def write_pruning(
  step: task.Step, steps: list[dict], state: State, inputs: Inputs
) -> None:
  """Keeps a decided step, so that a killed stage need not score again.

  Args:
    step: the last one.
    steps: records of all steps of the stage so far.
    state, inputs: of the run; the stage is `state.stage`.
  """
  if not agreement.is_writer() or not methods.resumes(inputs.recipe.prune):
    return
  content = {
    "stage": state.stage,
    "train_step": state.step,
    "number": step.number,
    "params": int(step.params),
    "kept": _kept_to_json(surgery.to_kept(step.masks)),
    "sparsity": {u: s.tolist() for u, s in step.sparsity.items()},
    "refitted": [
      [number, _kept_to_json(surgery.to_kept(masks))]
      for number, masks in step.refitted.items()
    ],
    "trace": steps,
  }
  _write_sealed(inputs.path / PRUNING, content, inputs)


def read_pruning(
  state: State, inputs: Inputs
) -> tuple[list[dict], task.Step | None]:
  """The records of the stage's finished steps, and the last of them.

  None of them if the file is damaged: the stage then scores again.
  """
  saved = _read_sealed(
    inputs.path / PRUNING,
    {"stage": state.stage, "train_step": state.step},
    inputs,
    "this stage's pruning begins anew",
  )
  if saved is None:
    return [], None

  def masks_of(kept: dict[str, list]) -> surgery.Masks:
    return surgery.to_masks(_kept_from_json(kept), inputs.full)

  step = task.Step(
    saved["number"],
    masks_of(saved["kept"]),
    {u: np.array(s) for u, s in saved["sparsity"].items()},
    saved["params"],
    {number: masks_of(kept) for number, kept in saved["refitted"]},
    rise=saved["trace"][-1].get("rise"),
    ended=saved["trace"][-1].get("ended", False),
  )
  return saved["trace"], step


# ---- evaluated.json: behind a stage's training -------------------------------


def write_evaluated(result: dict, state: State, inputs: Inputs) -> None:
  """Keeps a stage's result; its arrays are in the newest checkpoint."""
  if agreement.is_writer():
    content = {"checkpoint": state.saves, "result": result}
    _write_sealed(inputs.path / EVALUATED, content, inputs)
    inputs.log.outbox.flush()


def read_evaluated(state: State, inputs: Inputs) -> dict | None:
  """The result of this stage, if the state is just what was evaluated."""
  saved = _read_sealed(
    inputs.path / EVALUATED,
    {"checkpoint": state.saves},
    inputs,
    "this stage is evaluated again",
  )
  return saved and saved["result"]


def forget(name: str, inputs: Inputs) -> None:
  """Removes one of the two files, if it is there."""
  if agreement.is_writer():
    inputs.log.outbox.remove(inputs.path / name)


# ---- Files that say whether they are whole -----------------------------------


def _write_sealed(path: Path, content: dict, inputs: Inputs) -> None:
  content = json_files.plain(content)
  record = {"sha256": digest.of_json(content), "content": content}
  inputs.log.outbox.replace(path, record)


def _read_sealed(
  path: Path, expected: dict, inputs: Inputs, otherwise: str
) -> dict | None:
  """The content, if it is whole and of this moment; as process 0 reads it."""

  def read() -> dict | None:
    if not path.exists():
      return None
    try:
      record = json.loads(path.read_bytes())
      if record["sha256"] == digest.of_json(record["content"]):
        content = record["content"]
        return content if expected.items() <= content.items() else None
    except (ValueError, KeyError, TypeError, AttributeError):
      pass
    inputs.log.say(f"{path} is damaged: {otherwise}")
    return None

  return agreement.decided(read)


def package_version() -> str:
  """The version of this package."""
  return importlib.metadata.version("adapt-pruner-jax")


def _kept_to_json(kept: surgery.Kept) -> dict[str, list]:
  return {u: [k.tolist() for k in v] for u, v in kept.items()}


def _kept_from_json(kept: dict[str, list]) -> surgery.Kept:
  return {u: tuple(np.array(k, int) for k in v) for u, v in kept.items()}
