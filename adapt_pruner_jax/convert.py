"""Formats of a model: hf, hf_uniform, gguf, and orbax (our own, on any mesh).

An orbax directory has the arrays in `params/`, the ModelConfig and a
fingerprint of each array in `model.json`, and the tokenizer's files. It can
hold every model there is, also those that other formats cannot express.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax import model, sharding, workdir
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.fingerprint import fingerprints
from adapt_pruner_jax.hf import card, load, save
from adapt_pruner_jax.model import ModelConfig

FORMATS = ("hf", "hf_uniform", "gguf", "orbax")
MANIFEST = "model.json"


def convert(
  source: str,
  out: Path,
  format: str,
  *,
  dtype: str = "float32",
  overwrite: bool = False,
  ignore_fields: str = "",
) -> None:
  """Reads a model in one format and writes it in another.

  Args:
    source: a HuggingFace directory or hub id, or an orbax directory.
    dtype: of the weights; for gguf also f32, f16 or q8_0.

  Raises:
    UserError: unknown format, `out` exists, or the format cannot express it.
  """
  _check_format(format)
  weights = dtype if format != "gguf" else "float32"
  config, params, folder = open_model(source, weights, ignore_fields)
  write(
    config,
    params,
    out,
    format,
    source=folder,
    overwrite=overwrite,
    quantization=dtype,
  )


def open_model(
  source: str,
  dtype: str = "float32",
  ignore_fields: str = "",
  mesh: Mesh | None = None,
) -> tuple[ModelConfig, Params, Path]:
  """A model in any format that can be read, and its directory."""
  if (Path(source) / MANIFEST).is_file():
    config, params = read_orbax(Path(source), dtype, mesh)
    return config, params, Path(source)
  folder = load.resolve(source)
  config, params = load.load(str(folder), dtype, mesh, ignore_fields)
  return config, params, folder


def write(
  config: ModelConfig,
  params: Params,
  out: str | os.PathLike,
  format: str = "hf",
  *,
  source: str | Path | None = None,
  overwrite: bool = False,
  quantization: str = "float32",
  facts: dict[str, Any] | None = None,
) -> None:
  """Writes a model; the result is opened again and compared before it counts.

  Raises:
    UserError: as `convert`.
  """
  _check_format(format)
  out, source = Path(out), Path(source) if source else None
  if out.exists() and not overwrite:
    raise UserError(f"{out} exists: give another --out, or --overwrite")
  if format == "orbax":
    write_orbax(config, params, out, source)
  elif format == "gguf":
    from adapt_pruner_jax.hf import gguf

    gguf.write(config, params, out, source=source, dtype=quantization)
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
  config: ModelConfig, params: Params, out: Path, source: Path | None
) -> None:
  """Writes beside `out` and renames, so that half a model never looks whole."""
  import orbax.checkpoint as ocp

  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(temporary.absolute() / "params", params)
    manifest = {
      "model": model.to_json(config),
      "dtype": str(jax.tree.leaves(params)[0].dtype),
      "fingerprints": fingerprints(_named(params)),
    }
    workdir.write_json(temporary / MANIFEST, manifest)
    if source is not None:
      save.copy_tokenizer(source, temporary)
    temporary.chmod(0o755)
    if out.exists():
      shutil.rmtree(out)
    temporary.rename(out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def read_orbax(
  path: Path, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
  """Opens what `write_orbax` wrote, on any mesh.

  Raises:
    UserError: damaged.
  """
  import orbax.checkpoint as ocp

  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  manifest = workdir.read_json(path / MANIFEST)
  config = model.from_json(manifest["model"])
  abstract = model.abstract_params(config, jnp.dtype(manifest["dtype"]))
  placed = sharding.param_shardings(abstract, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    placed,
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(path.absolute() / "params", abstract)
  except Exception as error:  # each of Orbax's stores raises its own
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} is damaged: {reason[:200]}") from error
  found = fingerprints(_named(params))
  bad = [n for n, want in manifest["fingerprints"].items() if found[n] != want]
  if bad:
    raise UserError(f"{path} is damaged: {bad[0]} is not as it was written")
  return config, jax.tree.map(lambda x: x.astype(dtype), params)


def _named(params: Params) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _check_format(format: str) -> None:
  if format not in FORMATS:
    raise UserError(
      f"--format={format} is not one of {', '.join(FORMATS)}"
      f"{nearest(format, FORMATS)}"
    )
