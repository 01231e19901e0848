"""Opens a HuggingFace model: `load(path) -> (ModelConfig, params)`.

Tensors go from the mapped file to their place and dtype on the devices, a few
at a time, so that the host never holds the model. Of several processes each
reads its share of the rows of a matrix, whatever its devices need of it: these
get that from each other (`shares`).
"""

import contextlib
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import stopping
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.formats.hf import (
  apart,
  config_json,
  cut_vocabulary,
  layers,
  tensors,
  text_part,
  turned,
)
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.files import (
  CONFIG,
  INDEX,
  LICENCES,
  MANIFEST,
  Checkpoint,
  read_object,
)
from adapt_pruner_jax.formats.hf.parameters import Stored
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import publish
from adapt_pruner_jax.storage.places import in_bucket, to_path

DOWNLOADED = (
  *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md"),
  *LICENCES,
)
# What is done without if the hub cannot be reached: cards, logs, licences, and
# of a tokenizer what tokenizer.json stands for.
NEEDED = (
  CONFIG,
  *("generation_config.json", "model*.safetensors", INDEX),
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("added_tokens.json", "chat_template*", "additional_chat*/*"),
)
VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.*", "merges.txt")
# Folders, but for additional_chat_templates, and Mistral's second copy of the
# weights.
NOT_DOWNLOADED = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*")
HUB_ID = r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?"
COMPARED_BYTES = 1 << 26
WORKDIR_MODEL = "model"
READERS = 4


def resolve(path: str | os.PathLike) -> Path:
  """The directory of a model: `path` itself, that of a .gguf file, or a
  download of this hub id or from this place in a bucket.

  Raises:
    UserError: neither is there.
  """
  from adapt_pruner_jax.formats.gguf import directory as gguf_directory

  folder = Path(os.path.expanduser(on_disk(path)))
  publish.put_back(folder)
  if folder.is_dir():
    if (folder / WORKDIR_MODEL / CONFIG).is_file():
      raise UserError(
        f"{path} is a work directory; its model is {folder / WORKDIR_MODEL}"
      )
    cached = sorted((folder / "snapshots").glob(f"*/{CONFIG}"))
    if cached and not (folder / CONFIG).exists():
      raise UserError(
        f"{path} is a repository in the hub's cache; give its hub id or one of "
        + ", ".join(str(file.parent) for file in cached)
      )
    return folder
  if gguf_directory.is_gguf(folder):
    return gguf_directory.of(folder)
  if folder.exists():
    raise UserError(
      f"{path} is a file; a model directory or a .gguf file is needed"
    )
  asked = re.fullmatch(HUB_ID, str(path))
  if not asked:
    raise UserError(
      f"{path} does not exist; give a directory or a hub id such as "
      "HuggingFaceTB/SmolLM2-135M, with or without @REVISION"
    )
  try:
    return _from_hub(asked["name"], asked["revision"])
  except Exception as error:
    raise UserError(
      f"{path} is not a directory, and the HuggingFace hub does not give it: "
      f"{first_line(error)} Check the name and the network; log in "
      "with `hf auth login` if the model asks for it"
    ) from error


def on_disk(path: str | os.PathLike) -> str | os.PathLike:
  """The path, or that of a copy on this machine of what is in a bucket.

  Raises:
    UserError: it is a work directory, or not there, or not whole.
  """
  if not in_bucket(path):
    return path
  from adapt_pruner_jax.storage import download

  inner = to_path(path) / WORKDIR_MODEL
  if (inner / CONFIG).is_file() or (inner / MANIFEST).is_file():
    raise UserError(f"{path} is a work directory; its model is {inner}")
  return str(download.copy(to_path(path)))


def _from_hub(name: str, revision: str | None) -> Path:
  """The snapshot of a hub repository, downloaded or in the cache."""
  import huggingface_hub
  from huggingface_hub.errors import (
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
  )

  get = functools.partial(
    huggingface_hub.snapshot_download,
    name,
    revision=revision,
    ignore_patterns=NOT_DOWNLOADED,
  )
  try:
    return Path(get(allow_patterns=DOWNLOADED))
  except LocalEntryNotFoundError as error:  # and the hub cannot be reached
    try:
      folder = Path(get(allow_patterns=NEEDED, local_files_only=True))
      if not (folder / "tokenizer.json").is_file():
        get(allow_patterns=VOCABULARIES, local_files_only=True)
    except IncompleteSnapshotError:  # which says what is missing
      raise
    except LocalEntryNotFoundError:
      raise error from None
    return folder


def read_config(
  path: str | os.PathLike, ignore_fields: str = ""
) -> ModelConfig:
  """The config of the model at `path`; no weights are needed.

  Args:
    path: directory or hub id.
    ignore_fields: fields of config.json to ignore, separated by commas.

  Raises:
    UserError: see `config_json.read`.
  """
  folder = resolve(path)
  raw = read_object(folder / CONFIG)
  config = config_json.read(raw, ignore_fields, str(folder / CONFIG))
  return text_part.tied_as_stored(config, raw, folder)


def load(
  path: str | os.PathLike,
  dtype: str | None = "float32",
  mesh: Mesh | None = None,
  ignore_fields: str = "",
) -> tuple[ModelConfig, Params]:
  """The model at `path`.

  Args:
    path: directory or hub id.
    dtype: of the parameters; None = as they are stored.
    mesh: where they go, by `sharding.param_sharding`; None = default device.
    ignore_fields: fields of config.json to ignore, separated by commas.

  Raises:
    UserError: as `stored`.
  """
  config, tree = stored(path, dtype, ignore_fields)
  leaves, structure = jax.tree.flatten(tree)
  several = mesh is not None and jax.process_count() > 1
  place = lambda leaf: leaf.place_on(mesh)
  arrays = []
  with ThreadPoolExecutor(READERS) as threads:
    # What several processes run together they run in one order, none ahead.
    in_turn = (place(leaf) for leaf in leaves)
    placed = in_turn if several else threads.map(place, leaves)
    with contextlib.closing(placed):  # what waits is given up with the rest
      for array in placed:
        stopping.moment()
        arrays.append(array)
  return config, jax.tree.unflatten(structure, arrays)


def stored(
  path: str | os.PathLike, dtype: str | None = None, ignore_fields: str = ""
) -> tuple[ModelConfig, Params]:
  """The model at `path` with its parameters left in the files, as `Stored`.

  Raises:
    UserError: what `config_json.read` raises; files that are missing, damaged
      or unsafe; tensors that are missing, unexpected or of another shape. All
      of this is known before any weight is read.
  """
  folder = resolve(path)
  config = read_config(folder, ignore_fields)
  repeats = config_json.repeats(read_object(folder / CONFIG))
  if repeats > 1:
    logging.warning(
      "%s runs each layer %d times; they become layers of their own",
      path,
      repeats,
    )
  from adapt_pruner_jax.formats.gguf import directory as gguf_directory

  original = cut_vocabulary.source_of(folder) or folder
  whole = config if original == folder else None
  checkpoint = gguf_directory.checkpoint(original, whole)
  checkpoint = checkpoint or text_part.checkpoint(original)
  if isinstance(checkpoint, text_part.Part):
    checkpoint.say()
  checkpoint = text_part.with_head(checkpoint, config)
  family = FAMILIES[config.family]
  if "*" in family.tensors.get("moe_down", "") and layers.is_stock(config):
    checkpoint = apart.Apart(checkpoint)
  if family.turned:
    checkpoint = turned.in_turns(checkpoint, config)
  if original != folder:
    checkpoint = cut_vocabulary.Checkpoint(folder, checkpoint)
  check_tensors(checkpoint, config, repeats)
  params: Params = {}
  pairs = tensors.side_by_side(config)
  shapes = tensors.tensor_shapes(config, repeats)
  for (layer, name), place in tensors.places(config, repeats).items():
    tree = params
    if layer is not None:
      tree = params.setdefault(axes.layer_name(layer), {})
    shape, sizes = shapes[place.tensor], config.sizes(layer)
    first = next(iter(tensors.apart(place.tensor, shape)))
    kind = jnp.dtype(dtype or checkpoint.dtypes[first])
    tree[name] = Stored(checkpoint, name, place, sizes, kind, pairs, shape)
  return config, params


def check_tensors(
  checkpoint: Checkpoint, config: ModelConfig, repeats: int = 1
) -> None:
  """Raises a UserError unless the checkpoint has the model's tensors."""
  expected = {
    tensor: shape
    for whole in tensors.tensor_shapes(config, repeats).items()
    for tensor, shape in tensors.apart(*whole).items()
  }
  found = {**checkpoint.shapes}
  output = tensors.outer_tensor(config, "lm_head")
  if config.tied and output in found:
    _check_tied(checkpoint, config)
    del found[output]
  problems = [f"{t} is missing" for t in expected if t not in found]
  problems += [f"{t} is unexpected" for t in found if t not in expected]
  problems += [
    f"{t} has shape {list(found[t])}, expected {list(shape)}"
    for t, shape in expected.items()
    if t in found and found[t] != shape
  ]
  if problems:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise UserError(
      f"{checkpoint.folder}: the tensor {problems[0]}{more}; the weights do "
      f"not belong to its {CONFIG}"
    )


def _check_tied(checkpoint: Checkpoint, config: ModelConfig) -> None:
  """Some checkpoints store a tied matrix twice: fine if both are equal.

  Of several processes each compares its share.
  """
  names = ("embedding", "lm_head")
  one, two = (tensors.outer_tensor(config, name) for name in names)
  shape = checkpoint.shapes.get(one)
  same = shape == checkpoint.shapes[two]
  if same:
    step = max(1, COMPARED_BYTES // (4 * shape[1]))
    mine, each = jax.process_index(), jax.process_count()
    for row in range(mine * step, shape[0], each * step):
      rows = slice(row, min(row + step, shape[0]))
      first = checkpoint.array(one, rows)
      same &= np.array_equal(first, checkpoint.array(two, rows))
  if not same:
    raise UserError(
      f"{checkpoint.folder}: {CONFIG} says that {two} is {one} "
      "(tie_word_embeddings), but they differ; if both belong to the model, "
      'as Transformers 5 takes it, set "tie_word_embeddings": false there'
    )
