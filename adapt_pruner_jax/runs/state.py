"""What a run changes: its state, in memory and in checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import agreement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.runs.inputs import Setting, load_model
from adapt_pruner_jax.runs.measure import (
  measure,
  measure_tasks,
  windows_note,
)
from adapt_pruner_jax.storage import json_files
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from adapt_pruner_jax.training import lora, optimizer

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


def save_checkpoint(
  checkpoints: Checkpoints, state: State, setting: Setting
) -> None:
  state.saves += 1
  meta = {name: getattr(state, name) for name in PLAIN}
  meta |= {
    "model": model_config.to_json(state.config),
    "kept": _kept_to_json(state.kept),
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


def resume(setting: Setting, checkpoints: Checkpoints) -> State:
  """The state to go on from: the newest checkpoint, else the original model."""
  found = checkpoints.restore(lambda meta: abstract_state(meta, setting))
  if found is None:
    config, params = load_model(setting)
    state = State(config, params, surgery.everything(config))
    if setting.eval_tokens is not None:
      state.before = measure(config, params, setting)
      perplexity = state.before["perplexity"]
      size = model_config.count_params(config)
      note = windows_note(setting)
      setting.log.say(f"{size:,} parameters, perplexity {perplexity:.3f}{note}")
    if setting.config.eval.tasks:
      setting.log.say(f"original: {setting.config.eval.tasks}")
      state.before["evaluation"] = measure_tasks(config, params, setting)
  else:
    number, meta, arrays = found
    fingerprint = setting.rows.fingerprint if setting.rows else None
    if meta["data"] != fingerprint:
      raise UserError(
        f"--config.data.source={setting.config.data.source} has other tokens "
        "than when this run began: give the old data or another --workdir"
      )
    state = State(
      model_config.from_json(meta["model"]),
      kept=_kept_from_json(meta["kept"]),
      saves=number,
      **arrays,
      **{name: meta[name] for name in PLAIN},
    )
    setting.log.say(
      f"continuing at stage {state.stage} of {setting.config.prune.stages}, "
      f"train step {state.step} of {setting.total_steps}"
    )
    setting.log.rewind("eval", len(state.stages) + 1)
  if agreement.is_writer():
    json_files.rewrite_lines(setting.path / "trace.jsonl", state.trace)
  return state


def abstract_state(meta: dict, setting: Setting) -> dict:
  """Shapes and shardings of the arrays of a checkpoint."""
  config, settings, mesh = (
    model_config.from_json(meta["model"]),
    setting.config.train,
    setting.mesh,
  )
  dtype = jnp.dtype(
    "float32" if setting.total_steps else setting.config.model.dtype
  )
  params = model_config.abstract_params(config, dtype)
  placed = sharding.param_shardings(params, mesh)
  trees = {"params": (params, placed)}
  if meta["lora"]:
    trees["adapters"] = lora.abstract_adapters(config, settings.lora_rank, mesh)
  if meta["optimizer"]:
    transform = optimizer.optimizer(settings.weight_decay)
    trained, where = trees["adapters"] if meta["lora"] else trees["params"]
    trees["opt_state"] = (
      jax.eval_shape(transform.init, trained),
      optimizer.state_shardings(transform, trained, where, mesh),
    )
  return {
    name: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      where,
    )
    for name, (tree, where) in trees.items()
  }


def _kept_to_json(kept: surgery.Kept) -> dict[str, list]:
  return {u: [k.tolist() for k in v] for u, v in kept.items()}


def _kept_from_json(kept: dict[str, list]) -> surgery.Kept:
  return {u: tuple(np.array(k, int) for k in v) for u, v in kept.items()}
