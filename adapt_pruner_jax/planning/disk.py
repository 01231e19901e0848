"""Bytes on disk: of the original, of the export, of checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.formats.hf import files, text_part
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays
from adapt_pruner_jax.runs.summary import weight_bytes
from adapt_pruner_jax.training import teacher_cache
from adapt_pruner_jax.training.step import likeliest


def disk(
  config: Config, configs: Sequence[ModelConfig], folder: Path | None
) -> dict[str, int]:
  """Bytes of the original, the export, a checkpoint, all that are kept, and at
  most of the teacher's likeliest tokens.

  Args:
    config: the recipe.
    configs: of the original and of the model after each stage.
    folder: of the original; None if it is still to be made.
  """
  itemsize = arrays.weight_dtype(config).itemsize
  largest = model_config.count_params(configs[1])
  checkpoint = largest * itemsize
  if config.train.tokens and not config.train.lora_rank:
    checkpoint += 2 * largest * jnp.dtype(config.train.moments).itemsize
  # While one is written, the old ones are still there.
  original = original_bytes(configs[0], folder)
  exported = model_config.count_params(configs[-1])
  share = exported / model_config.count_params(configs[0])
  asked = config.model.dtype and jnp.dtype(config.model.dtype).itemsize
  cached = {}
  if number := likeliest(config.train, configs[0]):
    rows = -(-config.train.tokens // config.data.seq_len)
    record = teacher_cache.record(config.data.seq_len, number)
    cached = {"teacher cache": rows * record.itemsize}  # if no row repeats
  return cached | {
    "original": original,
    "export": exported * asked if asked else round(original * share),
    "checkpoint": checkpoint,
    "checkpoints": checkpoint * (config.checkpoint.keep + 1),
  }


def original_bytes(full: ModelConfig, folder: Path | None) -> int:
  """Bytes of the original's files; as its config.json says if there are none.

  Of a hub model `plan` has config.json alone.
  """
  dtype = "float32"
  if folder is not None and any(folder.glob("*.safetensors")):
    return weight_bytes(folder)
  if folder is not None:
    path = folder / files.CONFIG
    whole = files.read_object(path)
    for raw in (whole, text_part.config_of(whole, str(path))):
      named = raw.get("dtype") or raw.get("torch_dtype")
      dtype = named if named in files.DTYPES.values() else dtype
  return model_config.count_params(full) * jnp.dtype(dtype).itemsize
