"""Formats of a model: hf, hf_uniform, gguf, and orbax (our own, on any mesh).

An orbax directory has the arrays in `params/`, the ModelConfig and a
fingerprint of each array in `model.json`, the tokenizer's files and SHA256SUMS.
It can hold every model there is, also those that other formats cannot express.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.formats.hf import card, save
from adapt_pruner_jax.formats.hf.files import MANIFEST
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import json_files, orbax_messages
from adapt_pruner_jax.storage.fingerprint import fingerprints, named_leaves


def is_orbax(source: str) -> bool:
  return (Path(source).expanduser() / MANIFEST).is_file()


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

  orbax_messages.orbax()
  if jax.process_count() > 1:
    raise UserError("orbax models are written from one process only")
  dtype = jnp.result_type(*jax.tree.leaves(params))
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  manifest = {
    "model": model_config.to_json(config),
    "dtype": str(dtype),
    "fingerprints": fingerprints(named_leaves(params, "/")),
  }
  with save.directory(out, overwrite) as folder:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder.absolute() / "params", params)
    if source is not None:
      save.copy_tokenizer(source, folder)
    json_files.write_json(folder / MANIFEST, manifest)
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
  manifest = json_files.read_json(path / MANIFEST)
  config = model_config.from_json(manifest["model"])
  mesh = mesh or sharding.one_device()
  abstract = model_config.abstract_params(config, jnp.dtype(manifest["dtype"]))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    sharding.param_shardings(abstract, mesh),
  )
  return config, manifest, abstract


def _restore(path: Path, manifest: dict[str, Any], abstract: Params) -> Params:
  """All arrays or some of them, as `abstract` says, just as they were saved."""
  import orbax.checkpoint as ocp

  orbax_messages.orbax()
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
  for name, found in fingerprints(named_leaves(params, "/")).items():
    if saved[name] != found:
      raise UserError(
        f"{path / 'params'} is damaged: {name} is not as it was written"
      )
  return params


def facts(folder: Path) -> dict[str, Any] | None:
  """What the run that left this model says about it."""
  summary = folder.parent / "summary.json"
  if folder.name != "model" or not summary.is_file():
    return None
  return json_files.read_json(summary)
