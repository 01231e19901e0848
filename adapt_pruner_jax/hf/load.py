"""Opens a HuggingFace model: `load(path) -> (ModelConfig, params)`.

Tensors go one by one from the file to their place and dtype on the devices, so
the host never holds the model; each process reads only what its devices need.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from adapt_pruner_jax import axes, sharding
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.hf import config_json, tensors
from adapt_pruner_jax.hf.families import OUTER
from adapt_pruner_jax.hf.files import CONFIG, Checkpoint, read_json
from adapt_pruner_jax.hf.tensors import Place
from adapt_pruner_jax.model import ModelConfig

DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md")
NOT_PARAMETERS = ("rotary_emb.inv_freq",)  # endings; old checkpoints have them
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
COMPARED_BYTES = 1 << 26
WORKDIR_MODEL = "model"

Index = tuple[slice, ...]


def resolve(path: str | os.PathLike) -> Path:
  """The directory of a model: `path` itself, or a download of this hub id.

  Raises:
    UserError: neither is there.
  """
  folder = Path(path).expanduser()
  if folder.is_dir():
    if (folder / WORKDIR_MODEL / CONFIG).is_file():
      raise UserError(
        f"{path} is a work directory; its model is {folder / WORKDIR_MODEL}"
      )
    return folder
  if folder.exists():
    raise UserError(f"{path} is a file; a model directory is needed")
  if not re.fullmatch(HUB_ID, str(path)):
    raise UserError(
      f"{path} does not exist; give a directory or a hub id such as "
      "HuggingFaceTB/SmolLM2-135M"
    )
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        str(path), allow_patterns=DOWNLOADED, ignore_patterns="*/*"
      )
    )
  except Exception as error:
    raise UserError(
      f"{path} is not a directory, and the HuggingFace hub does not give it: "
      f"{str(error).splitlines()[0]} Check the name and the network; log in "
      "with `hf auth login` if the model asks for it"
    ) from error


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
  file = resolve(path) / CONFIG
  return config_json.read(read_json(file), ignore_fields, str(file))


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
    UserError: what `config_json.read` raises; files that are missing, damaged
      or unsafe; tensors that are missing, unexpected or of another shape. All
      of this is known before any weight is read.
  """
  folder = resolve(path)
  config = read_config(folder, ignore_fields)
  repeats = config_json.repeats(read_json(folder / CONFIG))
  if repeats > 1:
    logging.warning(
      "%s runs each layer %d times; they become layers of their own",
      path,
      repeats,
    )
  checkpoint = Checkpoint(folder)
  check_tensors(checkpoint, config, repeats)
  places = tensors.places(config, repeats)
  # One file after the other, so that each is opened once.
  params: Params = {}
  for (layer, name), place in places.items():
    tree = params
    if layer is not None:
      tree = params.setdefault(axes.layer_name(layer), {})
    tree[name] = read_parameter(
      checkpoint, name, place, config.sizes(layer), dtype, mesh
    )
  return config, params


def check_tensors(
  checkpoint: Checkpoint, config: ModelConfig, repeats: int = 1
) -> None:
  """Raises a UserError unless the checkpoint has the model's tensors."""
  expected = tensors.tensor_shapes(config, repeats)
  found = {
    tensor: shape
    for tensor, shape in checkpoint.shapes.items()
    if not tensor.endswith(NOT_PARAMETERS)
  }
  if config.tied and OUTER["lm_head"] in found:
    _check_tied(checkpoint)
    del found[OUTER["lm_head"]]
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


def _check_tied(checkpoint: Checkpoint) -> None:
  """Some checkpoints store a tied matrix twice: fine if both are equal."""
  one, two = OUTER["embedding"], OUTER["lm_head"]
  shape = checkpoint.shapes.get(one)
  same = shape == checkpoint.shapes[two]
  if same:
    step = max(1, COMPARED_BYTES // (4 * shape[1]))
    for row in range(0, shape[0], step):
      rows = slice(row, min(row + step, shape[0]))
      first = np.asarray(checkpoint.slices(one)[rows])
      same &= np.array_equal(first, checkpoint.slices(two)[rows])
  if not same:
    raise UserError(
      f"{checkpoint.folder}: {CONFIG} says that {two} is {one} "
      "(tie_word_embeddings), but they differ"
    )


def read_parameter(
  checkpoint: Checkpoint,
  name: str,
  place: Place,
  sizes: dict[str, int],
  dtype: str | None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """One parameter of a model, as in `load`."""
  shape = axes.shape(name, sizes)
  dtype = jnp.dtype(dtype or checkpoint.dtypes[place.tensor])
  source = checkpoint.slices(place.tensor)
  if mesh is None:
    whole = (slice(None),) * len(shape)
    return jnp.asarray(_read_part(source, name, place, sizes, whole, dtype))
  parts: dict[tuple, np.ndarray] = {}  # replicas are read once

  def part(index: Index) -> np.ndarray:
    key = tuple((cut.start, cut.stop) for cut in index)
    if key not in parts:
      parts[key] = _read_part(source, name, place, sizes, index, dtype)
    return parts[key]

  where = sharding.param_sharding(name, shape, mesh)
  return jax.make_array_from_callback(shape, where, part)


def _read_part(
  source: Any,
  name: str,
  place: Place,
  sizes: dict[str, int],
  index: Sequence[slice],
  dtype: np.dtype,
) -> np.ndarray:
  """Part `index` of a parameter, read from the slices of its tensor.

  A dim of the tensor holds several of our dims, as KGH: the first of them is
  cut when it is read, the others afterwards.
  """
  cut = dict(zip(axes.AXES[name], index, strict=True))
  sizes, ranges = dict(sizes), []
  for letters in tensors.hf_letters(name):
    first, inner = letters[0], math.prod(sizes[x] for x in letters[1:])
    start, stop, _ = cut[first].indices(sizes[first])
    ranges.append(slice(start * inner, stop * inner))
    sizes[first] = stop - start
    cut[first] = slice(None)
  rows = ranges[0]
  ranges[0] = slice(rows.start + place.start, rows.stop + place.start)
  part = tensors.from_hf(name, source[tuple(ranges)], sizes)
  part = part[tuple(cut[letter] for letter in axes.AXES[name])]
  return np.ascontiguousarray(part, dtype)
