"""Opens a model in whatever format it is."""

import os
from pathlib import Path

from jax.sharding import Mesh

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.formats.hf.files import MANIFEST
from adapt_pruner_jax.formats.orbax import is_orbax, read_orbax
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import publish

DTYPES = ("float32", "bfloat16", "float16")


def open_model(
  source: str,
  dtype: str | None = "float32",
  ignore_fields: str = "",
  mesh: Mesh | None = None,
) -> tuple[ModelConfig, Params, Path]:
  """Opens a model.

  Args:
    source: a HuggingFace directory or hub id, or an orbax directory.
    dtype: of the parameters, and so of the arithmetic; None = as they are
      stored.
    ignore_fields: fields of config.json to ignore, separated by commas.
    mesh: where the parameters go; None = the default device.

  Returns:
    The model, and its directory.

  Raises:
    UserError: not there, damaged, or an unknown dtype.
  """
  check_dtype(dtype)
  source = load.on_disk(source)
  folder = Path(os.path.expanduser(source))
  publish.put_back(folder)
  if is_orbax(source):
    return *read_orbax(folder, dtype, mesh), folder
  inner = folder / load.WORKDIR_MODEL
  if (inner / MANIFEST).is_file():
    raise UserError(f"{source} is a work directory; its model is {inner}")
  folder = load.resolve(source)
  config, params = load.load(str(folder), dtype, mesh, ignore_fields)
  return config, params, folder


def check_dtype(dtype: str | None) -> None:
  """Raises a UserError for a dtype that parameters cannot have."""
  if dtype and dtype not in DTYPES:
    raise UserError(
      f"--dtype={dtype} is not one of {', '.join(DTYPES)}"
      f"{nearest(dtype, DTYPES)}; other types are for --format=gguf"
    )
