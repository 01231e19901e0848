"""Writes safetensors files, one tensor after the other.

The format: 8 bytes with the header's size, the header in JSON, the tensors
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from adapt_pruner_jax import axes
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.hf import tensors
from adapt_pruner_jax.hf.files import DTYPES, INDEX, SINGLE, write_json
from adapt_pruner_jax.hf.tensors import Key
from adapt_pruner_jax.model import ModelConfig

# A parameter as a numpy array, None if the model has none of that name. All
# processes have to ask for the same ones in the same order.
Get = Callable[[Key], np.ndarray | None]


def getter(params: Params) -> Get:
  """Parameters of a tree, gathered from wherever they are."""

  def get(key: Key) -> np.ndarray | None:
    layer, name = key
    tree = params if layer is None else params[axes.layer_name(layer)]
    if name not in tree:
      return None
    array = tree[name]
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      from jax.experimental import multihost_utils

      return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)

  return get


def write(
  folder: Path | None,
  config: ModelConfig,
  get: Get,
  dtype: np.dtype,
  shard_bytes: int,
) -> None:
  """Writes all tensors of the model, and the index if there are several files.

  Args:
    folder: None on processes that only take part in gathering.
    dtype: of all tensors.
    shard_bytes: of a file, at most; a larger tensor has a file for itself.
  """
  shapes = tensors.tensor_shapes(config)
  keys: dict[str, list[Key]] = {}
  for key, place in tensors.places(config).items():
    keys.setdefault(place.tensor, []).append(key)
  sizes = {t: math.prod(s) * dtype.itemsize for t, s in shapes.items()}
  shards = _shards(sizes, shard_bytes)
  names = [
    f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    for i in range(len(shards))
  ]
  if len(shards) == 1:
    names = [SINGLE]
  for name, shard in zip(names, shards, strict=True):
    arrays = (
      tensors.to_hf(key[1], get(key)).astype(dtype, copy=False)
      for tensor in shard
      for key in keys[tensor]
    )
    if folder is None:
      for _ in arrays:
        pass
    else:
      _write_file(folder / name, {t: shapes[t] for t in shard}, dtype, arrays)
  if folder is not None and len(shards) > 1:
    where = {t: n for n, s in zip(names, shards, strict=True) for t in s}
    total = {"total_size": sum(sizes.values())}
    write_json(folder / INDEX, {"metadata": total, "weight_map": where})


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


def _write_file(
  file: Path,
  shapes: dict[str, tuple[int, ...]],
  dtype: np.dtype,
  arrays: Iterable[np.ndarray],
) -> None:
  """One file; `arrays` are its bytes in the order of `shapes`."""
  code = {name: code for code, name in DTYPES.items()}[str(dtype)]
  header: dict = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor, shape in shapes.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[tensor] = {
      "dtype": code,
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(file, "wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
      # numpy hands out no buffer of bfloat16, but of its bytes.
      out.write(np.ascontiguousarray(array).view(np.uint8).data)
    if out.tell() != 8 + len(text) + end:
      raise RuntimeError(f"{file} has another size than its header says")
