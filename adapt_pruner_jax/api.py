"""The Python API: four functions on the pair (ModelConfig, params).

  from adapt_pruner_jax.api import load, perplexity, prune, save

  model = load("path/to/model")
  smaller = prune(model, ratio=0.2, calibration="text:book.txt")
  save(smaller, "path/to/smaller")

Each does what a command does, without a work directory.
"""

import os
from typing import Any, NamedTuple

from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig


class Model(NamedTuple):
  """A model, and where its tokenizer is."""

  config: ModelConfig
  params: Params
  source: str | None = None


def load(
  path: str | os.PathLike, dtype: str = "float32", ignore_fields: str = ""
) -> Model:
  """Opens a HuggingFace directory, hub id, orbax directory, or .gguf file.

  Args:
    dtype: of the parameters; float32, bfloat16 or float16.
    ignore_fields: fields of config.json to ignore, separated by commas.

  Raises:
    UserError: it is missing, damaged, or of an unknown family.
  """
  from adapt_pruner_jax.formats import opening

  config, params, folder = opening.open_model(str(path), dtype, ignore_fields)
  return Model(config, params, str(folder))


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
  **settings: Any,
) -> Model:
  """A smaller model, by any method, without training.

  Args:
    ratio, target_params: the target; one of them.
    calibration: as `calibration.source`, with `samples`, `seq_len`, `batch`
      and `refit_samples`.
    settings: other fields of `config.Prune`, such as method="flap"; there is
      one stage.

  Raises:
    UserError: bad settings, or a target out of reach.
  """
  from adapt_pruner_jax.config import Calibration, Config, Prune, check
  from adapt_pruner_jax.data.calibration import pruning_data
  from adapt_pruner_jax.pruning import methods, targets

  recipe = Prune(ratio=ratio, target_params=target_params, **settings)
  source = Calibration(calibration, samples, seq_len, batch, refit_samples)
  check(Config(prune=recipe, calibration=source))
  tokenizer = None
  if not calibration.startswith("npy:"):
    tokenizer = _tokenizer(model)
  windows, for_refit = pruning_data(
    source, recipe.refit != "none", tokenizer, model.config.vocab_size, seed
  )
  old = (model.config, model.params)
  found = methods.METHODS[recipe.method](
    *old,
    recipe,
    windows.batch,
    target=targets.resolve_target(model.config, recipe),
    batch=batch,
    seed=seed,
  )
  params, _ = methods.refit_after(
    old,
    found,
    found.kept,
    recipe,
    lambda: for_refit.batch(len(found.trace)),
    batch,
  )
  return Model(found.config, params, model.source)


def save(
  model: Model,
  path: str | os.PathLike,
  format: str = "hf",
  overwrite: bool = False,
) -> None:
  """Writes a model, with its tokenizer, and opens it again to compare.

  Raises:
    UserError: `path` exists, or the format cannot express the model.
  """
  from adapt_pruner_jax.formats import convert

  convert.write(
    model.config,
    model.params,
    path,
    format,
    source=model.source,
    overwrite=overwrite,
  )


def perplexity(
  model: Model, text: str, seq_len: int = 0, batch: int = 8
) -> float:
  """Perplexity per token of the model's tokenizer on a text.

  Raises:
    UserError: fewer than two tokens.
  """
  from adapt_pruner_jax.data import packing
  from adapt_pruner_jax.evaluation import perplexity as perplexity_

  ids = packing.heldout_tokens(
    text, _tokenizer(model), model.config.vocab_size, "the text"
  )
  length = perplexity_.window(model.config, seq_len)
  return perplexity_.perplexity(model.config, model.params, ids, length, batch)[
    0
  ]


def _tokenizer(model: Model) -> Any:
  from adapt_pruner_jax.data.tokenizer import load_tokenizer
  from adapt_pruner_jax.errors import UserError

  if model.source is None:
    raise UserError(
      "the model has no tokenizer: give Model(..., source=DIR), a directory "
      "with one"
    )
  return load_tokenizer(model.source)
