"""Formats of a model: hf, hf_uniform, gguf, and orbax (our own, on any mesh).

An orbax directory has the arrays in `params/`, the ModelConfig and a
fingerprint of each array in `model.json`, the tokenizer's files and SHA256SUMS.
It can hold every model there is, also those that other formats cannot express.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax import model, quiet, sharding, workdir
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError, first_line, nearest
from adapt_pruner_jax.fingerprint import fingerprints
from adapt_pruner_jax.hf import card, load, save
from adapt_pruner_jax.hf.files import MANIFEST
from adapt_pruner_jax.model import ModelConfig

FORMATS = ("hf", "hf_uniform", "gguf", "orbax")
DTYPES = ("float32", "bfloat16", "float16")


def convert(
  source: str,
  out: Path,
  format: str,
  *,
  dtype: str = "",
  overwrite: bool = False,
  ignore_fields: str = "",
) -> None:
  """Reads a model in one format and writes it in another.

  Args:
    source: a HuggingFace directory or hub id, or an orbax directory.
    dtype: of the weights, "" = as they are stored; for gguf f32 (which "" is),
      f16 or q8_0.

  Raises:
    UserError: unknown format or dtype, `out` exists, or the format cannot
      express the model.
  """
  _check_format(format)
  _check_free(out, overwrite)
  quantization = ""
  if format == "gguf":
    quantization, dtype = dtype or "f32", "float32"
  _check_dtype(dtype)
  if format == "orbax" or is_orbax(source):
    config, params, folder = open_model(source, dtype or None, ignore_fields)
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
    facts=_facts(folder),
  )


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
  _check_dtype(dtype)
  if is_orbax(source):
    folder = Path(source).expanduser()
    return *read_orbax(folder, dtype, mesh), folder
  inner = Path(source) / load.WORKDIR_MODEL
  if (inner / MANIFEST).is_file():
    raise UserError(f"{source} is a work directory; its model is {inner}")
  folder = load.resolve(source)
  config, params = load.load(str(folder), dtype, mesh, ignore_fields)
  return config, params, folder


def is_orbax(source: str) -> bool:
  return (Path(source).expanduser() / MANIFEST).is_file()


def write(
  config: ModelConfig,
  params: Params,
  out: str | os.PathLike,
  format: str = "hf",
  *,
  source: str | Path | None = None,
  overwrite: bool = False,
  quantization: str = "f32",
  facts: dict[str, Any] | None = None,
) -> None:
  """Writes a model; the result is opened again and compared before it counts.

  Args:
    source: the directory that tokenizer and licence come from.
    quantization: of gguf only.
    facts: for the model card, as in a run's summary.json.

  Raises:
    UserError: as `convert`.
  """
  _check_format(format)
  out, source = Path(out), Path(source) if source else None
  _check_free(out, overwrite)
  if format == "orbax":
    write_orbax(config, params, out, source, overwrite)
  elif format == "gguf":
    from adapt_pruner_jax.hf import gguf

    gguf.write(config, params, out, source=source, kind=quantization)
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


def verify(path: str) -> None:
  """Checks a directory against its SHA256SUMS, and says that it is whole.

  Raises:
    UserError: a file is missing, changed, or not listed.
  """
  card.verify(Path(path))
  print(f"{path}: all files are as they were written")


def write_orbax(
  config: ModelConfig,
  params: Params,
  out: Path,
  source: Path | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an orbax directory, from one process.

  Raises:
    UserError: `out` exists or cannot be written.
  """
  import orbax.checkpoint as ocp

  quiet.orbax()
  if jax.process_count() > 1:
    raise UserError("orbax models are written from one process only")
  dtype = jnp.result_type(*jax.tree.leaves(params))
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  manifest = {
    "model": model.to_json(config),
    "dtype": str(dtype),
    "fingerprints": fingerprints(_named(params)),
  }
  with save.directory(out, overwrite) as folder:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder.absolute() / "params", params)
    if source is not None:
      save.copy_tokenizer(source, folder)
    workdir.write_json(folder / MANIFEST, manifest)
    card.write_sums(folder)
    _, manifest, abstract = _open_orbax(folder, None)
    for name, part in abstract.items():  # never a second model in memory
      _restore(folder, manifest, {name: part})


def read_orbax(
  path: Path, dtype: str | None = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
  """Opens what `write_orbax` wrote, on any mesh.

  Args:
    dtype: of the parameters; None = as they are stored.

  Raises:
    UserError: damaged.
  """
  config, manifest, abstract = _open_orbax(path, mesh)
  leaves, tree = jax.tree.flatten(_restore(path, manifest, abstract))
  dtype = jnp.dtype(dtype or manifest["dtype"])
  for i, leaf in enumerate(leaves):  # one at a time in two types
    leaves[i] = leaf.astype(dtype)
  return config, jax.tree.unflatten(tree, leaves)


def _open_orbax(
  path: Path, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any], Params]:
  """The config, the manifest and the abstract params of an orbax directory."""
  card.verify(path, only=MANIFEST)
  manifest = workdir.read_json(path / MANIFEST)
  config = model.from_json(manifest["model"])
  mesh = mesh or sharding.one_device()
  abstract = model.abstract_params(config, jnp.dtype(manifest["dtype"]))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    sharding.param_shardings(abstract, mesh),
  )
  return config, manifest, abstract


def _restore(path: Path, manifest: dict[str, Any], abstract: Params) -> Params:
  """All arrays or some of them, as `abstract` says, just as they were saved."""
  import orbax.checkpoint as ocp

  quiet.orbax()
  wanted = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      params = checkpointer.restore(path.absolute() / "params", args=wanted)
  except Exception as error:  # each of Orbax's stores raises its own
    reason = first_line(error)
    raise UserError(f"{path / 'params'} is damaged: {reason[:200]}") from error
  saved = manifest["fingerprints"]
  for name, found in fingerprints(_named(params)).items():
    if saved[name] != found:
      raise UserError(
        f"{path / 'params'} is damaged: {name} is not as it was written"
      )
  return params


def _named(params: Params) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _facts(folder: Path) -> dict[str, Any] | None:
  """What the run that left this model says about it."""
  summary = folder.parent / "summary.json"
  if folder.name != "model" or not summary.is_file():
    return None
  return workdir.read_json(summary)


def _check_format(format: str) -> None:
  """Raises a UserError unless it is one of `FORMATS`."""
  if format not in FORMATS:
    raise UserError(
      f"--format={format} is not one of {', '.join(FORMATS)}"
      f"{nearest(format, FORMATS)}"
    )


def _check_dtype(dtype: str | None) -> None:
  if dtype and dtype not in DTYPES:
    raise UserError(
      f"--dtype={dtype} is not one of {', '.join(DTYPES)}"
      f"{nearest(dtype, DTYPES)}; other types are for --format=gguf"
    )


def _check_free(out: Path, overwrite: bool) -> None:
  if out.exists() and not overwrite:
    raise UserError(f"{out} exists: give another --out, or --overwrite")
