"""Our own format: arrays that any mesh opens, of every model there is.

A directory has the arrays in `params/`, the ModelConfig, dtypes and a
fingerprint of each array in `model.json`, what came with the parent (tokenizer,
generation config, licence) and SHA256SUMS.
It also holds models that other formats cannot express.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.formats.hf import card, load, parent_files, save, weights
from adapt_pruner_jax.formats.hf.files import MANIFEST
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import json_files, orbax_messages
from adapt_pruner_jax.storage.fingerprint import fingerprints, named_leaves


def is_orbax(source: str) -> bool:
  """Returns whether a path is a directory in this format."""
  return (Path(os.path.expanduser(source)) / MANIFEST).is_file()


def verify(path: str) -> None:
  """Checks a directory against its SHA256SUMS, and says that it is whole.

  Raises:
    UserError: a file is missing, changed, or not listed.
  """
  card.verify(Path(os.path.expanduser(load.on_disk(path))))
  print(f"{path}: all files are as they were written")


def write_orbax(
  config: ModelConfig,
  params: Params,
  out: Path,
  source: Path | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an orbax directory, from one process.

  Args:
    config, params: the model; each parameter is written in its dtype.
    out: the directory.
    source: the parent's directory, which the tokenizer, the generation config
      and the licence come from.
    overwrite: replace the model that is at `out`.

  Raises:
    UserError: `out` exists or cannot be written.
  """
  import orbax.checkpoint as ocp

  orbax_messages.orbax()
  if jax.process_count() > 1:
    raise UserError("orbax models are written from one process only")
  params = jax.tree.map(jnp.asarray, params)
  usual = str(weights.usual_dtype(config, params))
  others = {n: str(x.dtype) for n, x in named_leaves(params, "/").items()}
  others = {n: dtype for n, dtype in others.items() if dtype != usual}
  manifest = {
    "model": model_config.to_json(config),
    "dtype": usual,
    "other_dtypes": others,
    "tokenizer": parent_files.tokenizer_fields(source),
    "fingerprints": fingerprints(named_leaves(params, "/")),
  }
  with save.directory(out, overwrite) as folder:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder.absolute() / "params", params)
    if source is not None:
      parent_files.copy_all(source, folder)
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
    path: the directory.
    dtype: of the parameters; None = as they are stored.
    mesh: where they go; None = the default device.

  Raises:
    UserError: it is damaged.
  """
  config, manifest, abstract = _open_orbax(path, mesh)
  leaves, tree = jax.tree.flatten(_restore(path, manifest, abstract))
  for i, leaf in enumerate(leaves if dtype else ()):  # one at a time in both
    leaves[i] = leaf.astype(dtype)
  return config, jax.tree.unflatten(tree, leaves)


def _open_orbax(
  path: Path, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any], Params]:
  """The config, the manifest and the abstract params of an orbax directory."""
  card.verify(path, only=MANIFEST)
  try:
    manifest = json_files.read_object(path / MANIFEST)
    config = model_config.from_json(manifest["model"])
    kinds = _kinds(manifest)
    abstract = model_config.abstract_params(config, kinds("embedding"))
    named = named_leaves(abstract, "/")
    if named.keys() != manifest["fingerprints"].keys():
      raise ValueError("its parameters are not those of its model")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path / MANIFEST} is damaged ({type(error).__name__}: "
      f"{first_line(error)}): get the directory again"
    ) from error
  mesh = mesh or sharding.one_device()
  where = sharding.param_shardings(abstract, mesh)
  structs = [
    jax.ShapeDtypeStruct(x.shape, kinds(name), sharding=s)
    for (name, x), s in zip(named.items(), jax.tree.leaves(where), strict=True)
  ]
  tree = jax.tree.structure(abstract)
  return config, manifest, jax.tree.unflatten(tree, structs)


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


def _kinds(manifest: dict[str, Any]) -> Callable[[str], jnp.dtype]:
  """Gives the stored dtype of a parameter by its name in the manifest."""
  others = manifest.get("other_dtypes", {})  # before 0.2 there were none
  return lambda name: jnp.dtype(others.get(name, manifest["dtype"]))


def stored_dtypes(path: Path) -> dict[tuple[int | None, str], str]:
  """The dtype of each parameter of an orbax directory, by layer and name."""
  _, _, abstract = _open_orbax(path, None)
  found = {}
  axes.map_named(
    lambda name, layer, x: found.update({(layer, name): str(x.dtype)}), abstract
  )
  return found


def facts(folder: Path) -> dict[str, Any] | None:
  """Returns what the run that left this model says about it, if one did."""
  summary = folder.parent / "summary.json"
  if folder.name != "model" or not summary.is_file():
    return None
  return json_files.read_object(summary)
