"""What a run changes: its state, in memory and in checkpoints."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax import (
  checkpoint,
  methods,
  model,
  optim,
  prune,
  sharding,
  surgery,
  train,
  workdir,
)
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig
from adapt_pruner_jax.setting import (
  Setting,
  load_model,
  measure,
  measure_tasks,
)

PRUNING = "pruning.json"  # the decided steps of a prune under way
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
  checkpoints: checkpoint.Checkpoints, state: State, setting: Setting
) -> None:
  state.saves += 1
  meta = {name: getattr(state, name) for name in PLAIN}
  meta |= {
    "model": model.to_json(state.config),
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


def resume(setting: Setting, checkpoints: checkpoint.Checkpoints) -> State:
  """The state to go on from: the newest checkpoint, else the original model."""
  found = checkpoints.restore(lambda meta: abstract_state(meta, setting))
  if found is None:
    config, params = load_model(setting)
    state = State(config, params, surgery.everything(config))
    if setting.eval_tokens is not None:
      state.before = measure(config, params, setting)
      perplexity = state.before["perplexity"]
      size = model.count_params(config)
      setting.log.say(f"{size:,} parameters, perplexity {perplexity:.3f}")
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
      model.from_json(meta["model"]),
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


def _kept_to_json(kept: surgery.Kept) -> dict[str, list]:
  return {u: [k.tolist() for k in v] for u, v in kept.items()}


def _kept_from_json(kept: dict[str, list]) -> surgery.Kept:
  return {u: tuple(np.array(k, int) for k in v) for u, v in kept.items()}


def write_pruning(
  step: prune.Step, steps: list[dict], state: State, setting: Setting
) -> None:
  """Keeps a decided step, so that a killed stage need not score again."""
  if not workdir.is_writer() or not methods.resumes(setting.config.prune):
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
    "trace": workdir.plain(steps),
  }
  record = {"sha256": workdir.digest(content), "content": content}
  workdir.write_json(setting.path / PRUNING, record)


def read_pruning(
  state: State, setting: Setting
) -> tuple[list[dict], prune.Step | None]:
  """The records of the stage's finished steps, and the last of them.

  None of them if the file is damaged: the stage then scores again.
  """
  saved = _read_pruning(setting)
  mine = {"stage": state.stage, "train_step": state.step}
  if not workdir.all_agree(saved is not None and mine.items() <= saved.items()):
    return [], None

  def masks_of(kept: dict[str, list]) -> surgery.Masks:
    return surgery.to_masks(_kept_from_json(kept), setting.full)

  step = prune.Step(
    saved["number"],
    masks_of(saved["kept"]),
    {u: np.array(s) for u, s in saved["sparsity"].items()},
    saved["params"],
    {number: masks_of(kept) for number, kept in saved["refitted"]},
  )
  if workdir.is_writer():
    workdir.rewrite_lines(
      setting.path / "trace.jsonl", state.trace + saved["trace"]
    )
  return saved["trace"], step


def _read_pruning(setting: Setting) -> dict | None:
  """What `write_pruning` has kept, if it is there and whole."""
  file = setting.path / PRUNING
  if not file.exists():
    return None
  try:
    record = json.loads(file.read_bytes())
    if record["sha256"] == workdir.digest(record["content"]):
      return record["content"]
  except (ValueError, KeyError, TypeError):
    pass
  setting.log.say(f"{file} is damaged: this stage's pruning begins anew")
  return None
