"""Formats of a model: hf, hf_uniform, gguf, and orbax (our own, on any mesh).

An orbax directory has the arrays in `params/`, the ModelConfig and a
fingerprint of each array in `model.json`, the tokenizer's files and SHA256SUMS.
It can hold every model there is, also those that other formats cannot express.
"""

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
  """A model in any format that can be read, and its directory.

  Raises:
    UserError: not there, damaged, or an unknown dtype.
  """
  check_dtype(dtype)
  publish.put_back(Path(source).expanduser())
  if is_orbax(source):
    folder = Path(source).expanduser()
    return *read_orbax(folder, dtype, mesh), folder
  inner = Path(source) / load.WORKDIR_MODEL
  if (inner / MANIFEST).is_file():
    raise UserError(f"{source} is a work directory; its model is {inner}")
  folder = load.resolve(source)
  config, params = load.load(str(folder), dtype, mesh, ignore_fields)
  return config, params, folder


def check_dtype(dtype: str | None) -> None:
  if dtype and dtype not in DTYPES:
    raise UserError(
      f"--dtype={dtype} is not one of {', '.join(DTYPES)}"
      f"{nearest(dtype, DTYPES)}; other types are for --format=gguf"
    )
