"""What a run changes: its state, in memory and in checkpoints."""

import json

import numpy as np

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.pruning import methods, surgery, task
from adapt_pruner_jax.runs.inputs import Setting
from adapt_pruner_jax.runs.state import State, _kept_from_json, _kept_to_json
from adapt_pruner_jax.storage import digest, json_files

PRUNING = "pruning.json"  # the decided steps of a prune under way


def write_pruning(
  step: task.Step, steps: list[dict], state: State, setting: Setting
) -> None:
  """Keeps a decided step, so that a killed stage need not score again."""
  if not agreement.is_writer() or not methods.resumes(setting.config.prune):
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
    "trace": json_files.plain(steps),
  }
  record = {"sha256": digest.of_json(content), "content": content}
  json_files.write_json(setting.path / PRUNING, record)


def read_pruning(
  state: State, setting: Setting
) -> tuple[list[dict], task.Step | None]:
  """The records of the stage's finished steps, and the last of them.

  None of them if the file is damaged: the stage then scores again.
  """
  saved = _read_pruning(setting)
  mine = {"stage": state.stage, "train_step": state.step}
  if not agreement.all_agree(
    saved is not None and mine.items() <= saved.items()
  ):
    return [], None

  def masks_of(kept: dict[str, list]) -> surgery.Masks:
    return surgery.to_masks(_kept_from_json(kept), setting.full)

  step = task.Step(
    saved["number"],
    masks_of(saved["kept"]),
    {u: np.array(s) for u, s in saved["sparsity"].items()},
    saved["params"],
    {number: masks_of(kept) for number, kept in saved["refitted"]},
  )
  if agreement.is_writer():
    json_files.rewrite_lines(
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
    if record["sha256"] == digest.of_json(record["content"]):
      return record["content"]
  except (ValueError, KeyError, TypeError):
    pass
  setting.log.say(f"{file} is damaged: this stage's pruning begins anew")
  return None
