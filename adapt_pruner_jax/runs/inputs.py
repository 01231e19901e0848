"""What a run reads: all of it is opened and checked before any work."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config, Eval, task_names
from adapt_pruner_jax.data import packing, sources
from adapt_pruner_jax.data.calibration import WindowData, pruning_data
from adapt_pruner_jax.data.tokenizer import Tokenizer, load_tokenizer
from adapt_pruner_jax.distributed import agreement, placement, sharding
from adapt_pruner_jax.distributed.stopping import Stopping
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.evaluation import evaluate, perplexity
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets, targets
from adapt_pruner_jax.pruning.baselines import reap
from adapt_pruner_jax.pruning.task import Limits
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import (
  answers,
  attention,
  export_size,
  latency_budget,
  room,
  text_checks,
  tiny_model,
  vocabulary,
)
from adapt_pruner_jax.runs.fingerprints import weights_fingerprint
from adapt_pruner_jax.runs.text_checks import TUNING
from adapt_pruner_jax.storage import cache
from adapt_pruner_jax.storage.places import in_bucket
from adapt_pruner_jax.training.step import check_rows

# Up to four epochs are nearly as good as new text (arXiv 2305.16264).
MANY_EPOCHS = 4


@dataclasses.dataclass
class Inputs:
  """What a run works with and does not change.

  Attributes:
    whole: the same with the model as it was before its vocabulary was cut; None
      = it is not.
  """

  recipe: Config
  path: Path  # the work directory
  source: Path  # the directory of the model to prune
  full: ModelConfig  # of that model
  target: int | None
  limits: Limits  # beside it
  beside: int  # bytes of the export that are not the model's weights
  mesh: Mesh
  tokenizer: Tokenizer | None
  calibration: Any  # .batch(step) of pruning steps, counted over all stages
  tuning: Any  # the same, or questions, of a quality to keep; else None
  refit_data: Any  # the same for refits
  search_data: Any  # the same for a search with a text of its own, or None
  rows: packing.TrainData | None
  eval_tokens: np.ndarray | None
  eval_bytes: int  # of their text
  answers: list[dict] | None  # of the dense model, held out
  total_steps: int  # train steps over all stages
  log: Log
  whole: "Inputs | None" = None

  @property
  def original(self) -> "Inputs":
    """Those of the model that the recipe names."""
    return self.whole or self


def open_inputs(
  recipe: Config, path: Path, log: Log, stopping: Stopping | None = None
) -> Inputs:
  """Opens everything that a run reads, so that bad input shows at once.

  What the dense model is to write itself is written when all else is checked.

  Args:
    path: the work directory.
    stopping: from `stop_signals`.

  Raises:
    UserError: something cannot be read, or does not fit the model.
    StoppedError: asked to stop while the dense model writes.
  """
  _check_possible(recipe)
  mesh = sharding.make_mesh(**dataclasses.asdict(recipe.mesh))
  source = model_path(recipe.model.path, log)
  whole = full = load.read_config(str(source), recipe.model.ignore_fields)
  sharding.require_experts(full, mesh)
  if not recipe.prune.counts("latency"):
    targets.prunable_modules(full, recipe.prune)
  _check_lengths(recipe, full)
  log.say(f"attention: {attention.taken(recipe, full, mesh)}")
  tokenizer = None
  if _reads_text(recipe):
    tokenizer = load_tokenizer(source, recipe.data.bos)
  text = read_eval_text(recipe.eval.text) if recipe.eval.text else ""
  if recipe.eval.tasks:
    names = task_names(recipe.eval)
    evaluate.import_harness().check(names, questions(recipe.eval))
  text_checks.check_questions(recipe)
  asked = _answered(recipe, full, source, tokenizer, mesh, path, log, stopping)
  before = source, full, tokenizer
  if recipe.vocab.asked():
    source = vocabulary.cut(recipe, *before, cache.beside(path), log.say)
    full = load.read_config(str(source), recipe.model.ignore_fields)
    tokenizer = load_tokenizer(source, recipe.data.bos)
  recipe = latency_budget.resolve(recipe, whole, full, path, log)
  beside = export_size.beside(recipe.prune, full, source)
  target = _target(recipe, whole, full, beside, mesh)
  room.check(recipe, full, target, mesh)
  text_checks.check_refit(recipe, mesh)
  written = asked.in_place(recipe)
  where = cache.tokens(path), log.say, lambda: _stop_here(stopping, path)
  calibration, refit_data, tuning, search_data = pruning_data(
    written.calibration,
    recipe.prune,
    tokenizer,
    full.vocab_size,
    recipe.seed,
    *where,
    steps=text_checks.many_steps(recipe.prune),
  )
  rows = open_training(written, tokenizer, full, mesh, path, log, stopping)
  inputs = Inputs(
    recipe=recipe,
    path=path,
    source=source,
    full=full,
    target=target,
    limits=targets.resolve_limits(full, recipe.prune, beside),
    beside=beside,
    mesh=mesh,
    tokenizer=tokenizer,
    calibration=calibration,
    tuning=tuning,
    refit_data=refit_data,
    search_data=search_data,
    rows=rows,
    eval_tokens=_tokens(text, tokenizer, full),
    eval_bytes=len(text.encode()),
    answers=asked.held_out(),
    total_steps=-(-recipe.train.tokens // recipe.data.step_tokens),
    log=log,
  )
  _check_data(inputs)
  if not recipe.vocab.asked():
    return inputs
  uncut = _of_the_uncut(inputs, *before, text)
  return dataclasses.replace(inputs, whole=uncut)


def _check_possible(recipe: Config) -> None:
  """Raises a UserError for what no run can do."""
  if recipe.train.hours and not recipe.train.tokens:
    raise UserError(
      "train.hours becomes train.tokens by `adapt-pruner run` or by "
      "planning.hours.settle: give one of them"
    )
  if recipe.prune.method == "slicegpt" and jax.process_count() > 1:
    raise UserError(
      "--config.prune.method=slicegpt: its model is written as orbax, which "
      "one process alone can do; run it without --distributed"
    )


def _target(
  recipe: Config, whole: ModelConfig, full: ModelConfig, beside: int, mesh: Mesh
) -> int | None:
  """What to prune to; None = there are so many steps.

  Args:
    whole, full: before and after the vocabulary was cut.
    beside: bytes of the export that are not weights.
  """
  target = targets.resolve_target(full, recipe.prune, whole, beside)
  if target is None and not recipe.prune.max_steps:
    target = budgets.count(full, recipe.prune)  # the vocabulary alone
  if recipe.prune.method == "reap" and target is not None:
    fewer = reap.with_experts(full, reap.remaining(full, target))
    sharding.require_experts(fewer, mesh, " left by reap")
  return target


def _check_data(inputs: Inputs) -> None:
  """Raises a UserError where what is learnt from is reported, or too little."""
  recipe, say, calibration = inputs.recipe, inputs.log.say, inputs.calibration
  learnt = {
    TUNING: inputs.search_data,
    "calibration.source": calibration,
    "data.source": inputs.rows,
  }
  if recipe.calibration.tuning and isinstance(inputs.tuning, WindowData):
    learnt["calibration.tuning"] = inputs.tuning
  tokens = inputs.eval_tokens
  agreement.on_writer(
    lambda: text_checks.check_overlaps(recipe, tokens, learnt, say)
  )
  text_checks.check_refit(recipe, inputs.mesh, inputs.refit_data)
  text_checks.check_channels(
    recipe.prune, recipe, inputs.full, calibration, inputs.refit_data, say
  )


def _of_the_uncut(
  inputs: Inputs, source: Path, full: ModelConfig, tokenizer: Any, text: str
) -> Inputs:
  """The same inputs of the model whose vocabulary was cut for the run."""
  return dataclasses.replace(
    inputs,
    source=source,
    full=full,
    tokenizer=tokenizer,
    eval_tokens=_tokens(text, tokenizer, full),
  )


def _answered(
  recipe: Config,
  full: ModelConfig,
  source: Path,
  tokenizer: Tokenizer | None,
  mesh: Mesh,
  path: Path,
  log: Log,
  stopping: Stopping | None,
) -> answers.Asked:
  """The dense model's own answers, if the recipe asks for any: all written."""

  def stop_if_asked() -> None:
    if stopping is not None and stopping.now():
      raise StoppedError(f"stopped; the same command continues {path}")

  dtype = recipe.weight_dtype()
  asked = answers.check(
    *(recipe, full, source, tokenizer),
    model=lambda: (weights_fingerprint(source), dtype),
    folder=path / "cache",
  )
  if asked.requests and recipe.vocab.asked():
    raise UserError(
      "a vocabulary that is cut (--config.vocab) and answers of the dense "
      "model (self) do not go together: cut it in a run of its own first"
    )
  if asked.requests and recipe.train.tokens:
    check_rows(recipe.data.batch, recipe.train.accumulation, mesh)
  load_dense = lambda: load.load(
    str(source), dtype, mesh, recipe.model.ignore_fields
  )
  answers.write(asked, load_dense, mesh, log, stop_if_asked)
  return asked


def questions(recipe: Eval) -> Questions:
  """How a recipe asks its tasks."""
  return Questions(recipe.tasks_dir, recipe.trust_tasks_dir)


def _reads_text(recipe: Config) -> bool:
  given = recipe.calibration.source.startswith("npy:")  # token ids
  return bool(
    not given
    or recipe.calibration.tuning
    or recipe.prune.search.source
    or recipe.train.tokens
    or recipe.eval.text
    or recipe.eval.answers
    or recipe.eval.tasks
  )


def open_training(
  recipe: Config,
  tokenizer: Tokenizer,
  full: ModelConfig,
  mesh: Mesh,
  path: Path,
  log: Log,
  stopping: Stopping | None = None,
) -> packing.TrainData | None:
  """The rows to train on, if the recipe trains; says how often they repeat.

  Raises:
    UserError: a source that cannot be read or is too short, or a batch that
      does not divide over the devices.
  """
  tokens = recipe.train.tokens
  if not tokens:
    return None
  check_rows(recipe.data.batch, recipe.train.accumulation, mesh)
  if recipe.train.teacher_cache and jax.process_count() > 1:
    raise UserError(
      "--config.train.teacher_cache writes from one process, and there are "
      f"{jax.process_count()}: leave it out, the teacher then runs beside"
    )
  rows = packing.train_data(
    recipe.data,
    tokenizer,
    full.vocab_size,
    recipe.seed,
    cache.tokens(path),
    log.say,
    lambda: _stop_here(stopping, path),
    tokens=tokens,
    places=placement.rows_here(recipe.data.batch, mesh),
  )
  epochs = rows.epochs(tokens)
  log.say(
    f"recovery on {tokens:,} tokens of {recipe.data.source}, which has "
    f"{'' if rows.whole else 'more than '}{rows.num_tokens:,}: {epochs:.3g} "
    "epochs"
  )
  if epochs > MANY_EPOCHS:
    log.say(
      f"WARNING: more than {MANY_EPOCHS} epochs: what is repeated so often "
      "teaches little more; give more text, or a smaller --config.train.tokens"
    )
  return rows


def _stop_here(stopping: Stopping | None, path: Path) -> None:
  """Asks this process alone, for what it does alone."""
  if stopping is not None and stopping.here:
    raise StoppedError(f"stopped; the same command continues {path}")


def _check_lengths(recipe: Config, full: ModelConfig) -> None:
  """Raises a UserError for windows of text that the model cannot hold."""
  used = {
    "calibration": not recipe.calibration.source.startswith("npy:"),
    "data": recipe.train.tokens,
    "eval": recipe.eval.text,
  }
  for section, wanted in used.items():
    if wanted:
      length = getattr(recipe, section).seq_len
      perplexity.check_length(full, length, f"config.{section}.seq_len")


def model_path(name: str, log: Log) -> Path:
  """The directory of `model.path`; the tiny model is made if it is missing."""
  if name != "tiny":
    return _resolved(name)
  agreement.on_writer(lambda: tiny_model.base_model(progress=log.say))
  return tiny_model.base_model(progress=log.say)


def _resolved(name: str) -> Path:
  """`load.resolve`; of a hub model the revision that process 0 has found."""
  if in_bucket(name):
    return load.resolve(name)
  found = agreement.decided(lambda: str(load.resolve(name)))
  if agreement.is_writer():
    return Path(found)
  snapshot = Path(found)
  if not Path(os.path.expanduser(name)).exists() and (
    snapshot.parent.name == "snapshots"
  ):
    name = f"{name.split('@')[0]}@{snapshot.name}"
  return load.resolve(name)


def read_eval_text(text: str) -> str:
  """The text that `eval.text` names."""
  if text == "embedded":
    return sources.embedded_text("heldout")
  return sources.read_text(text)


def _tokens(
  text: str, tokenizer: Tokenizer | None, config: ModelConfig
) -> np.ndarray | None:
  """The tokens of the evaluation text, int32 [N]; None without one."""
  if not text:
    return None
  return packing.heldout_tokens(text, tokenizer, config.vocab_size)


def weight_dtype(inputs: Inputs) -> jnp.dtype:
  """`Config.weight_dtype`, as a dtype."""
  return jnp.dtype(inputs.recipe.weight_dtype())


def load_model(inputs: Inputs) -> tuple[ModelConfig, Params]:
  """The model to prune: the original, with the tokens that stay."""
  return load.load(
    str(inputs.source),
    weight_dtype(inputs).name,
    inputs.mesh,
    inputs.recipe.model.ignore_fields,
  )
