"""What a run works with: the recipe, opened and checked before any work."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax import (
  data,
  evaluate,
  latency,
  prune,
  sharding,
  sources,
  tiny,
  tokens,
  train,
  workdir,
)
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.config import Config, difference, task_names
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.hf import load
from adapt_pruner_jax.log import Log
from adapt_pruner_jax.model import ModelConfig

RECIPE = "config.json"
# What of the recipe may change between the parts of one run.
FREE = ("mesh.", "checkpoint.", "log.", "train.skip_nonfinite")


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


def check_recipe(config: Config, path: Path) -> None:
  """Compares the recipe with the one of the work directory, if it has one.

  Raises:
    UserError: the directory is of a run with another recipe.
  """
  file = path / RECIPE
  changed = []
  if workdir.is_writer() and file.exists():
    old, mine = workdir.read_json(file), dataclasses.asdict(config)
    changed = [
      line for line in difference(old, mine) if not line.startswith(FREE)
    ]
  if not workdir.all_agree(not changed):
    raise UserError(
      f"--workdir={path} belongs to a run with another recipe: "
      f"{'; '.join(changed) or 'process 0 has said which'}; give the old "
      "recipe or another --workdir"
    )


def claim(config: Config, path: Path) -> None:
  """Writes the recipe into a new work directory, once its inputs are good."""
  if workdir.is_writer() and not (path / RECIPE).exists():
    workdir.write_json(path / RECIPE, dataclasses.asdict(config))


def prepare(config: Config, path: Path, log: Log) -> Setting:
  """Opens everything a run reads, so that bad input shows before any work."""
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  if config.prune.method == "slicegpt" and jax.process_count() > 1:
    raise UserError(
      "--config.prune.method=slicegpt: its model is written as orbax, which "
      "one process alone can do; run it without --distributed"
    )
  source = model_path(config.model.path, log)
  full = load.read_config(str(source), config.model.ignore_fields)
  target = prune.resolve_target(full, config.prune)
  prune.prunable_modules(full, config.prune)
  _check_lengths(config, full)
  cache = path / "cache"
  tokenizer = None
  if not config.calibration.source.startswith("npy:") or config.train.tokens:
    tokenizer = tokens.load_tokenizer(source)
  calibration, refit_data = data.pruning_data(
    config.calibration,
    config.prune.refit != "none",
    tokenizer,
    full.V,
    config.seed,
    cache,
  )
  rows, total_steps = None, 0
  if config.train.tokens:
    train.check_rows(config.data.batch, config.train.accumulation, mesh)
    rows = data.train_data(config.data, tokenizer, full.V, config.seed, cache)
    per_step = config.data.step_tokens
    total_steps = -(-config.train.tokens // per_step)
  eval_tokens = None
  if config.eval.text:
    tokenizer = tokenizer or tokens.load_tokenizer(source)
    eval_tokens = read_eval_text(config.eval.text, tokenizer, full.V)
  if config.eval.tasks:
    tokenizer = tokenizer or tokens.load_tokenizer(source)
    names = task_names(config.eval)
    evaluate.import_harness().check(names, config.eval.tasks_dir)
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


def _check_lengths(config: Config, full: ModelConfig) -> None:
  """Raises a UserError for windows of text that the model cannot hold."""
  used = {
    "calibration": not config.calibration.source.startswith("npy:"),
    "data": config.train.tokens,
    "eval": config.eval.text,
  }
  for section, wanted in used.items():
    if wanted:
      length = getattr(config, section).seq_len
      evaluate.check_length(full, length, f"config.{section}.seq_len")


def model_path(name: str, log: Log) -> Path:
  """The directory of `model.path`; the tiny model is made if it is missing."""
  if name != "tiny":
    return load.resolve(name)
  workdir.on_writer(lambda: tiny.base_model(progress=log.say))
  return tiny.base_model(progress=log.say)


def read_eval_text(
  text: str, tokenizer: tokens.Tokenizer, vocab_size: int
) -> np.ndarray:
  if text == "embedded":
    content = sources.embedded_text("heldout")
  else:
    content = sources.read_text(text)
  return data.heldout_tokens(content, tokenizer, vocab_size)


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


def teacher_of(setting: Setting) -> tuple[ModelConfig, Params] | None:
  """The original model, where training distils from it."""
  if not (setting.config.train.distill_alpha and setting.total_steps):
    return None
  return load_model(setting)


def measure(config: ModelConfig, params: Params, setting: Setting) -> dict:
  """Perplexity per token, and the mean loss, on the evaluation text."""
  recipe = setting.config.eval
  found = evaluate.perplexity(
    config,
    params,
    setting.eval_tokens,
    evaluate.window(setting.full, recipe.seq_len),
    recipe.batch,
    setting.mesh,
  )
  return {"perplexity": found[0], "loss": found[1] / found[2]}


def measure_tasks(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Scores of `eval.tasks`, see `harness.evaluate_tasks`."""
  recipe = setting.config.eval
  return evaluate.import_harness().evaluate_tasks(
    config,
    params,
    setting.tokenizer,
    task_names(recipe),
    tasks_dir=recipe.tasks_dir or None,
    batch=recipe.batch,
    mesh=setting.mesh,
  )


def measure_latency(
  config: ModelConfig, params: Params, setting: Setting
) -> dict:
  """Times of the original and of this model, one after the other here."""
  how = evaluate.lengths(setting.full) | {"mesh": setting.mesh}
  before = latency.measure(*load_model(setting), **how)
  after = latency.measure(config, params, **how)
  compared = latency.compare(before, after)
  return {"before": before, "after": after} | compared
