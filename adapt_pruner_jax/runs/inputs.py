"""What a run works with: the recipe, opened and checked before any work."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config, Eval, task_names
from adapt_pruner_jax.data import packing, sources
from adapt_pruner_jax.data.calibration import pruning_data
from adapt_pruner_jax.data.tokenizer import Tokenizer, load_tokenizer
from adapt_pruner_jax.distributed import agreement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import evaluate, perplexity
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import targets
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import tiny_model
from adapt_pruner_jax.training.step import check_rows


@dataclasses.dataclass
class Setting:
  """What a run works with and does not change."""

  config: Config
  path: Path  # the work directory
  source: Path  # the original model's directory
  full: ModelConfig  # of the original model
  target: int | None
  mesh: Mesh
  tokenizer: Tokenizer | None
  calibration: Any  # .batch(step) of pruning steps, counted over all stages
  refit_data: Any  # the same for refits
  rows: packing.TrainData | None
  eval_tokens: np.ndarray | None
  total_steps: int  # train steps over all stages
  log: Log


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
  target = targets.resolve_target(full, config.prune)
  targets.prunable_modules(full, config.prune)
  _check_lengths(config, full)
  cache = path / "cache"
  tokenizer = None
  if not config.calibration.source.startswith("npy:") or config.train.tokens:
    tokenizer = load_tokenizer(source)
  calibration, refit_data = pruning_data(
    config.calibration,
    config.prune.refit != "none",
    tokenizer,
    full.vocab_size,
    config.seed,
    cache,
  )
  rows, total_steps = None, 0
  if config.train.tokens:
    check_rows(config.data.batch, config.train.accumulation, mesh)
    rows = packing.train_data(
      config.data, tokenizer, full.vocab_size, config.seed, cache
    )
    per_step = config.data.step_tokens
    total_steps = -(-config.train.tokens // per_step)
  eval_tokens = None
  if config.eval.text:
    tokenizer = tokenizer or load_tokenizer(source)
    eval_tokens = read_eval_text(config.eval.text, tokenizer, full.vocab_size)
  if config.eval.tasks:
    tokenizer = tokenizer or load_tokenizer(source)
    names = task_names(config.eval)
    evaluate.import_harness().check(names, questions(config.eval))
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


def questions(recipe: Eval) -> Questions:
  """How a recipe asks its tasks."""
  return Questions(recipe.tasks_dir, recipe.trust_tasks_dir)


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
      perplexity.check_length(full, length, f"config.{section}.seq_len")


def model_path(name: str, log: Log) -> Path:
  """The directory of `model.path`; the tiny model is made if it is missing."""
  if name != "tiny":
    return load.resolve(name)
  agreement.on_writer(lambda: tiny_model.base_model(progress=log.say))
  return tiny_model.base_model(progress=log.say)


def read_eval_text(
  text: str, tokenizer: Tokenizer, vocab_size: int
) -> np.ndarray:
  if text == "embedded":
    content = sources.embedded_text("heldout")
  else:
    content = sources.read_text(text)
  return packing.heldout_tokens(content, tokenizer, vocab_size)


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
