"""Writes a model in any format, and turns one format into another."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.formats.opening import check_dtype, open_model
from adapt_pruner_jax.formats.orbax import facts, is_orbax, write_orbax
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import places, publish

FORMATS = ("hf", "hf_uniform", "gguf", "orbax")


def convert(
  source: str,
  out: Path,
  format: str,
  *,
  dtype: str = "",
  overwrite: bool = False,
  ignore_fields: str = "",
  mesh: Mesh | None = None,
) -> None:
  """Reads a model in one format and writes it in another.

  Args:
    source: a HuggingFace directory or hub id, an orbax directory, or a .gguf
      file.
    out: what is written, a directory or a gguf file.
    format: one of `FORMATS`.
    overwrite: replace the model that is at `out`.
    ignore_fields: fields of config.json to ignore, separated by commas.
    dtype: of the weights, "" = as they are stored; for gguf f32, f16, bf16,
      q8_0 or q4_0.
    mesh: devices over which a model is cut that goes through them, from or to
      orbax; None = one.

  Raises:
    UserError: unknown format or dtype, `out` exists, or the format cannot
      express the model.
  """
  _check_format(format)
  out = places.to_path(out)
  publish.require_free(out, overwrite, () if format == "gguf" else save.MARKS)
  quantization = ""
  if format == "gguf":
    quantization, dtype = dtype, ""
  check_dtype(dtype)
  source = load.on_disk(source)
  if format == "orbax" or is_orbax(source):
    config, params, folder = open_model(
      source, dtype or None, ignore_fields, mesh
    )
  else:  # from file to file: one tensor in memory
    folder = load.resolve(source)
    config, params = load.stored(folder, dtype or None, ignore_fields)
  write(
    config,
    params,
    out,
    format,
    source=folder,
    overwrite=overwrite,
    quantization=quantization,
    facts=facts(folder),
  )


def write(
  config: ModelConfig,
  params: Params,
  out: str | os.PathLike,
  format: str = "hf",
  *,
  source: str | Path | None = None,
  overwrite: bool = False,
  quantization: str = "",
  facts: dict[str, Any] | None = None,
) -> None:
  """Writes a model; the result is opened again and compared before it counts.

  Args:
    config, params: the model; but for gguf, each parameter is written in its
      dtype (see `dtypes.for_export`).
    source: the directory that tokenizer and licence come from.
    out, format, overwrite: as in `convert`.
    quantization: of gguf only; "" = as the parameters are.
    facts: for the model card, as in a run's summary.json.

  Raises:
    UserError: as `convert`.
  """
  _check_format(format)
  out, source = places.to_path(out), Path(source) if source else None
  if format == "orbax":
    write_orbax(config, params, out, source, overwrite)
  elif format == "gguf":
    from adapt_pruner_jax.formats.gguf import writer

    publish.require_free(out, overwrite)
    writer.write(config, params, out, source=source, kind=quantization)
  else:
    save.save(
      config,
      params,
      out,
      source=source,
      format=format,
      overwrite=overwrite,
      facts=facts,
    )


def _check_format(format: str) -> None:
  """Raises a UserError unless it is one of `FORMATS`."""
  if format not in FORMATS:
    raise UserError(
      f"--format={format} is not one of {', '.join(FORMATS)}"
      f"{nearest(format, FORMATS)}"
    )
