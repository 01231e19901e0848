"""The Python API: a few functions on the pair (ModelConfig, params).

  from adapt_pruner_jax.api import load, perplexity, prune, save

  model = load("path/to/model")
  smaller = prune(model, ratio=0.2, calibration="text:book.txt")
  save(smaller, "path/to/smaller")

Each does what a command does, without a work directory; `cut_vocabulary` what
`run` does first with `--config.vocab.keep_tokens`, and `at_step` makes the
model of a step of a run again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig

TOKENS = "bos_id", "eos_ids", "pad_id"  # of a config


class Model(NamedTuple):
  """A model, where its tokenizer is, and in which dtype it is saved.

  Attributes:
    source: the directory that it was loaded from.
    dtype: of all its weights in files; "" = as they are stored in `source`.
  """

  config: ModelConfig
  params: Params
  source: str | None = None
  dtype: str = ""


def load(
  path: str | os.PathLike,
  dtype: str = "",
  ignore_fields: str = "",
  mesh: Mesh | None = None,
) -> Model:
  """Opens a HuggingFace directory, hub id, orbax directory, or .gguf file.

  Args:
    dtype: of the parameters, the arithmetic, and what `save` writes: float32,
      bfloat16 or float16. "" = float32, saved as each weight was stored.
    ignore_fields: fields of config.json to ignore, separated by commas.
    mesh: devices that it is cut over, and what is made of it, as
      `distributed.sharding.make_mesh` makes them; default all of this process.

  Raises:
    UserError: it is missing, damaged, or of an unknown family.
  """
  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.formats import opening

  mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
  config, params, folder = opening.open_model(
    str(path), dtype or "float32", ignore_fields, mesh
  )
  return Model(config, params, str(folder), dtype)


def prune(
  model: Model,
  *,
  ratio: float = 0.0,
  target_params: int = 0,
  calibration: str = "embedded",
  samples: int = 512,
  seq_len: int = 64,
  batch: int = 32,
  refit_samples: int = 512,
  seed: int = 0,
  bos: str = "auto",
  tuning: str = "",
  **settings: Any,
) -> Model:
  """A smaller model, by any method, without training.

  Args:
    ratio, target_params: the target; one of them.
    calibration: as `calibration.source`, with `samples`, `seq_len`, `batch`
      and `refit_samples`.
    bos: as `data.bos`: whether windows start with the model's begin token.
    tuning: as `calibration.tuning`, of budget="quality".
    settings: other fields of `config.Prune`, such as method="flap"; there is
      one stage.

  Raises:
    UserError: bad settings, or a target out of reach.
  """
  from adapt_pruner_jax.config import Calibration, Config, Prune, check
  from adapt_pruner_jax.data.calibration import pruning_data
  from adapt_pruner_jax.evaluation import profile
  from adapt_pruner_jax.pruning import budgets, methods, quality, targets
  from adapt_pruner_jax.pruning.task import PruneTask

  recipe = Prune(ratio=ratio, target_params=target_params, **settings)
  source = Calibration(
    source=calibration,
    samples=samples,
    seq_len=seq_len,
    batch=batch,
    refit_samples=refit_samples,
    tuning=tuning,
  )
  check(Config(prune=recipe, calibration=source))
  tokenizer = None
  if tuning or recipe.search.source or not calibration.startswith("npy:"):
    tokenizer = _tokenizer(model, bos)
  texts = pruning_data(source, recipe, tokenizer, model.config.vocab_size, seed)
  if recipe.counts("latency"):
    budgets.check_table(model.config, recipe, profile.device_name("jax"))
  params = model.params
  if model.dtype == "float16":  # in which scores of many tokens underflow
    params = jax.tree.map(lambda x: x.astype("float32"), params)
  task = PruneTask(
    model.config,
    params,
    recipe,
    texts.steps.batch,
    targets.resolve_target(model.config, recipe),
    refit_samples=texts.refits.batch,
    tuning=texts.search and texts.search.batch,
    batch=batch,
    mesh=_mesh(model),
    seed=seed,
    limits=targets.resolve_limits(model.config, recipe),
    quality=quality.asked(recipe, texts.quality),
  )
  found = methods.refit_after(task, methods.prune(task))
  return Model(found.config, found.params, model.source, model.dtype)


def at_step(model: Model, row: Mapping[str, Any]) -> Model:
  """The model that a step of a run with prune.budget=quality left.

  As it was pruned: a refit that went with the step is not in its row.

  Args:
    model: the original; if its vocabulary was cut, after that.
    row: a line of the run's trace.jsonl.

  Raises:
    UserError: the row has no masks, or they are of another model.
  """
  from adapt_pruner_jax.errors import UserError
  from adapt_pruner_jax.pruning import surgery

  if "masks" not in row:
    raise UserError(
      "the row has no masks: trace.jsonl has them with prune.budget=quality"
    )
  try:
    masks = surgery.from_hex(row["masks"], model.config)
  except (IndexError, ValueError) as error:
    raise UserError(f"the row's masks are of another model: {error}") from error
  config, params = surgery.gather(
    *(model.config, model.params, surgery.to_kept(masks)), _mesh(model)
  )
  return Model(config, params, model.source, model.dtype)


def cut_vocabulary(
  model: Model,
  path: str | os.PathLike,
  *,
  keep_tokens: int = 0,
  ratio: float = 0.0,
  source: str = "embedded",
  bos: str = "auto",
) -> Model:
  """The model with the tokens that a corpus uses most.

  Prune it afterwards; `save` then writes the tokenizer of what is left.

  Args:
    path: a folder for that tokenizer, which the result refers to.
    keep_tokens: how many stay; or
    ratio: the share of tokens to remove.
    source: the corpus, as `vocab.source`.
    bos: as `prune`'s.

  Raises:
    UserError: the tokenizer is of a kind that cannot be cut, or too few tokens
      would be left.
  """
  import dataclasses

  from absl import logging

  from adapt_pruner_jax.config import Config, Vocab, check
  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.errors import UserError
  from adapt_pruner_jax.formats.hf.load import read_config
  from adapt_pruner_jax.models import axes
  from adapt_pruner_jax.runs import vocabulary
  from adapt_pruner_jax.storage import places

  asked = Vocab(keep_tokens, ratio, source)
  if not asked.asked():
    raise UserError("give keep_tokens=N or ratio=0.5: how much to cut")
  recipe = Config(vocab=asked)
  check(recipe)
  tokenizer = _tokenizer(model, bos)
  path = places.to_path(path)
  if places.in_bucket(path):
    raise UserError(f"{path}: the tokenizer of a cut vocabulary goes to a disk")
  folder = vocabulary.cut(
    recipe,
    Path(model.source),
    model.config,
    tokenizer,
    path,
    logging.info,
  )
  kept = np.array(vocabulary.kept(folder))

  def rows(name: str | None, _: int | None, array: Any) -> Any:
    letters = axes.AXES[name]
    if "V" not in letters:
      return array
    return array.take(kept, axis=letters.index("V"))

  cut = read_config(folder)
  changed = {n: getattr(cut, n) for n in ("vocab_size", *TOKENS)}
  config = dataclasses.replace(model.config, **changed)
  params = axes.map_named(rows, model.params)
  where = sharding.param_shardings(params, _mesh(model))
  params = jax.device_put(params, where)
  return Model(config, params, str(folder), model.dtype)


def save(
  model: Model,
  path: str | os.PathLike,
  format: str = "hf",
  overwrite: bool = False,
) -> None:
  """Writes a model, with its tokenizer, and opens it again to compare.

  Args:
    path: the directory, or the .gguf file, to write.
    format: hf, hf_uniform, gguf or orbax (docs/formats.md).
    overwrite: replace what is at `path`.

  Raises:
    UserError: `path` exists, or the format cannot express the model.
  """
  from adapt_pruner_jax.formats import convert, dtypes

  convert.write(
    model.config,
    dtypes.for_export(*model),
    path,
    format,
    source=model.source,
    overwrite=overwrite,
  )


def perplexity(
  model: Model,
  text: str,
  seq_len: int = 0,
  batch: int = 8,
  bos: str = "auto",
) -> float:
  """Perplexity per token of the model's tokenizer on a text.

  Args:
    seq_len: tokens a window; 0 = the model's context, at most 2048.
    batch: windows at a time.
    bos: "auto", each window starts with the begin token that the tokenizer
      adds, if it adds one; "none", windows of text alone, as in many papers.

  Raises:
    UserError: fewer than two tokens.
  """
  from adapt_pruner_jax.data import packing
  from adapt_pruner_jax.evaluation import perplexity as perplexity_

  tokenizer = _tokenizer(model, bos)
  ids = packing.heldout_tokens(
    text, tokenizer, model.config.vocab_size, "the text"
  )
  length = perplexity_.window(model.config, seq_len)
  return perplexity_.perplexity(
    model.config,
    model.params,
    ids,
    length,
    batch,
    _mesh(model),
    begin_id=tokenizer.begin_id,
  )[0]


def _mesh(model: Model) -> Mesh:
  """Where its parameters lie; one device if that is no mesh."""
  from adapt_pruner_jax.distributed import sharding

  first = jax.tree.leaves(model.params)[0]
  where = getattr(first, "sharding", None)
  if isinstance(where, NamedSharding):
    return where.mesh
  return sharding.one_device()


def _tokenizer(model: Model, bos: str) -> Any:
  from adapt_pruner_jax.data.tokenizer import load_tokenizer
  from adapt_pruner_jax.errors import UserError

  if model.source is None:
    raise UserError(
      "the model has no tokenizer: give Model(..., source=DIR), a directory "
      "with one"
    )
  return load_tokenizer(model.source, bos)
