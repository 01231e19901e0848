"""Writes safetensors files, block by block of one tensor after the other.

The format: 8 bytes with the header's size, the header in JSON, the tensors
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import agreement, stopping
from adapt_pruner_jax.distributed.to_writer import to_writer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import tensors, turned
from adapt_pruner_jax.formats.hf.files import DTYPES, INDEX, SINGLE
from adapt_pruner_jax.formats.hf.tensors import Key
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import json_files

# A parameter as a numpy array; None if the model has none of that name, or, on
# other processes than 0, if it is spread over several. All processes have to
# ask for the same ones in the same order.
Get = Callable[[Key], np.ndarray | None]


def getter(params: Params) -> Get:
  """Parameters of a tree, brought from wherever they are, one at a time."""

  def get(key: Key) -> np.ndarray | None:
    layer, name = key
    tree = params if layer is None else params[axes.layer_name(layer)]
    if name not in tree:
      return None
    array = tree[name]
    return on_host(array) if isinstance(array, jax.Array) else array.__array__()

  return get


def tensor_dtypes(
  config: ModelConfig, params: Params, usual: np.dtype
) -> dict[str, np.dtype]:
  """The dtype of each tensor of the model.

  Args:
    config: the model as it is written.
    params: whose leaves have a dtype.
    usual: of what is written but not in `params`, as after padding.
  """
  found: dict[str, list[np.dtype]] = {}
  for (layer, name), place in tensors.places(config).items():
    tree = params if layer is None else params[axes.layer_name(layer)]
    dtype = tree[name].dtype if name in tree else usual
    found.setdefault(place.tensor, []).append(dtype)
  return {t: np.dtype(jnp.result_type(*ds)) for t, ds in found.items()}


def usual_dtype(config: ModelConfig, params: Params) -> np.dtype:
  """The dtype that most of the model is in."""
  counted: Counter[np.dtype] = Counter()

  def count(name: str, layer: int | None, leaf: Any) -> None:
    size = math.prod(axes.shape(name, config.sizes(layer)))
    counted[np.dtype(leaf.dtype)] += size

  axes.map_named(count, params)
  return counted.most_common(1)[0][0]


def on_host(array: jax.Array) -> np.ndarray | None:
  """All of an array; None where it is another process that gets it."""
  if not array.is_fully_addressable:
    return to_writer(array)
  devices = array.devices()
  if len(devices) > 1 or next(iter(devices)).platform != "cpu":
    # An array keeps what it was copied to: let that be one which goes.
    array = jax.device_put(array, array.sharding, may_alias=False)
  return np.asarray(array)


def remembering(
  get: Get, dtypes: dict[str, np.dtype], config: ModelConfig
) -> tuple[Get, dict[Key, str]]:
  """`get`, and the digests of what it has given, as it is written.

  So that what is sent from one process to another is sent once.

  Args:
    dtypes: of each tensor of the model in its files.
    config: of the model as it is written.
  """
  places, told = tensors.places(config), {}

  def remembered(key: Key) -> np.ndarray | None:
    array = get(key)
    if array is not None:
      told[key] = digest(key[1], array, dtypes[places[key].tensor])
    return array

  return remembered, told


def digest(name: str, array: np.ndarray, dtype: np.dtype) -> str:
  """SHA-256 of a parameter in its file's layout, rotary pairs as ours."""
  found = hashlib.sha256()
  for _, block in tensors.blocks(tensors.to_hf(name, array), dtype):
    found.update(block.reshape(-1).view(np.uint8).data)
  return found.hexdigest()


def write(
  folder: Path | None,
  config: ModelConfig,
  get: Get,
  dtypes: dict[str, np.dtype],
  shard_bytes: int,
) -> dict[str, str]:
  """Writes all tensors of the model, and the index if there are several files.

  Args:
    folder: None on processes that only send what they have.
    dtypes: of each tensor.
    shard_bytes: of a file, at most; a larger tensor has a file for itself.

  Returns:
    SHA-256 of each file of weights, by its name.

  Raises:
    OSError: it cannot be written; a UserError on the other processes.
  """
  shapes = _shapes(config)
  keys: dict[str, list[Key]] = {}
  places = tensors.places(config)
  for key, place in places.items():
    keys.setdefault(place.tensor, []).append(key)
  sizes = {t: math.prod(s) * dtypes[t].itemsize for t, s in shapes.items()}
  # Wider types come first in a file, as readers want each one aligned.
  shards = [
    sorted(shard, key=lambda t: -dtypes[t].itemsize)
    for shard in _shards(sizes, shard_bytes)
  ]
  names = [
    f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    for i in range(len(shards))
  ]
  if len(shards) == 1:
    names = [SINGLE]
  sums: dict[str, str] = {}
  pairs = tensors.side_by_side(config)
  failed = None
  for name, shard in zip(names, shards, strict=True):
    arrays = (
      (array, dtypes[tensor])
      for tensor in shard
      for array in _arrays(config, keys[tensor], places, get, pairs)
    )
    if folder is not None and failed is None:
      header = _kinds(shard, shapes, dtypes)
      try:
        sums[name] = _write_file(folder / name, header, arrays)
      except OSError as error:
        failed = error
    for _ in arrays:  # what others have is sent, wanted or not
      pass
  if not agreement.all_agree(failed is None):
    raise failed or UserError("process 0 cannot write; see its message")
  if folder is not None and len(shards) > 1:
    where = {
      t: n
      for n, shard in zip(names, shards, strict=True)
      for t in _kinds(shard, shapes, dtypes)
    }
    total = {"total_size": sum(sizes.values())}
    index = {"metadata": total, "weight_map": where}
    json_files.write_json(folder / INDEX, index, sort_keys=True)
  return sums


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of each tensor in the files, in their order."""
  return {
    t: turned.shape(shape) if turned.is_turned(config, t) else shape
    for t, shape in tensors.tensor_shapes(config).items()
  }


def _arrays(
  config: ModelConfig,
  keys: list[Key],
  places: dict[Key, tensors.Place],
  get: Get,
  pairs: int,
) -> Iterator[np.ndarray]:
  """What a tensor consists of, in the layout of the file, in its order.

  Args:
    config: of the model.
    keys: of the parameters that it holds.
    pairs: as of `tensors.to_hf`.
  """
  stopping.moment()
  if not agreement.is_writer():
    for key in keys:
      get(key)
    return
  tensor, blocks = places[keys[0]].tensor, places[keys[0]].blocks
  arrays = (tensors.to_hf(key[1], get(key), pairs) for key in keys)
  if blocks == 1:
    yield from arrays
    return
  parts = [x.reshape(blocks, -1, *x.shape[1:]) for x in arrays]
  whole = np.concatenate(parts, axis=1)
  if turned.is_turned(config, tensor):
    yield turned.to_file(tensor, whole)
  else:
    yield whole.reshape(-1, *whole.shape[2:])


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
  """Tensors of each file, in their order."""
  shards: list[list[str]] = [[]]
  filled = 0
  for tensor, size in sizes.items():
    if shards[-1] and filled + size > limit:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += size
  return shards


def header_bytes(config: ModelConfig, dtype: np.dtype) -> int:
  """Bytes of a safetensors file beside its tensors, of one dtype.

  A model of smaller sizes has no more, several files some hundred each.
  """
  shapes = _shapes(config)
  return len(_header(_kinds(shapes, shapes, dict.fromkeys(shapes, dtype))))


def _kinds(
  names: Iterable[str],
  shapes: dict[str, tuple[int, ...]],
  dtypes: dict[str, np.dtype],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of the tensors of a file, by their names in it."""
  return {
    t: (shape, dtypes[name])
    for name in names
    for t, shape in tensors.apart(name, shapes[name]).items()
  }


def _header(kinds: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
  """What a file begins with: its own length, and where each tensor is."""
  codes = {name: code for code, name in DTYPES.items()}
  header: dict = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor, (shape, dtype) in kinds.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[tensor] = {
      "dtype": codes[str(dtype)],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def _write_file(
  file: Path,
  kinds: dict[str, tuple[tuple[int, ...], np.dtype]],
  arrays: Iterable[tuple[np.ndarray, np.dtype]],
) -> str:
  """Writes one file; returns its SHA-256.

  Args:
    kinds: shape and dtype of each tensor.
    arrays: their contents in the same order, each with its dtype in the file.

  A thread hashes each block while it is written and the
  next one is made.
  """
  head = _header(kinds)
  end = sum(
    math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values()
  )
  digest = hashlib.sha256(head)
  hashed: Future | None = None
  with open(file, "wb") as out, ThreadPoolExecutor(1) as thread:
    out.write(head)
    for array, dtype in arrays:
      for _, block in tensors.blocks(array, dtype):
        # numpy hands out no buffer of bfloat16, but of its bytes.
        content = block.reshape(-1).view(np.uint8).data
        if hashed is not None:
          hashed.result()
        hashed = thread.submit(digest.update, content)
        out.write(content)
    if out.tell() != len(head) + end:
      raise RuntimeError(f"{file} has another size than its header says")
  return digest.hexdigest()
