"""Where each parameter is in a HuggingFace checkpoint, and in which layout.

A linear weight is [out, in] there and [in..., out...] here; letters as in
`axes.AXES`. Some families store several parameters one below the other in one
fused tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.layers import is_stock
from adapt_pruner_jax.formats.hf.tensor_names import OUTER
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  outer_names,
)
from adapt_pruner_jax.models.rope import rotated_channels

Key = tuple[int | None, str]  # layer (None: outside the layers), parameter

# Of each head of these, the first channels are turned by rotary embeddings.
ROTATED = ("q", "k", "q_bias", "k_bias")
# One number each, in a tensor without dims.
NUMBERS = ("xielu_beta", "xielu_eps")
BLOCK_BYTES = 1 << 23  # stays in a CPU's cache
BLOCK_ROWS = 64  # at least: fewer would read strided memory line by line


@dataclasses.dataclass(frozen=True)
class Place:
  """Rows start : start + rows of a tensor, or of each of its blocks.

  A tensor of several blocks of rows has a share of the parameter in each, as
  one of experts has: [X, rows, columns], read as X blocks below each other. In
  a name "*" stands for X tensors, which are read as one (`together`).
  """

  tensor: str
  start: int
  rows: int
  blocks: int = 1


def places(config: ModelConfig, repeats: int = 1) -> dict[Key, Place]:
  """Where each parameter of the model is.

  Args:
    repeats: how many layers in a row share each stored layer.
  """
  family = FAMILIES[config.family]
  names = family.tensors | ({} if is_stock(config) else family.own)
  found: dict[Key, Place] = {}
  for name in outer_names(config):
    rows = hf_shape(name, config.sizes())[0]
    found[None, name] = Place(outer_tensor(config, name), 0, rows)
  for i in range(config.num_layers):
    filled: dict[str, int] = {}
    for name in layer_names(config, i):
      tensor = f"{family.body}.layers.{i // repeats}.{names[name]}"
      start = filled.get(tensor, 0)
      rows = hf_shape(name, config.sizes(i))[0]
      heads = config.kv_groups[i] * config.queries_per_group
      blocks = heads if name in family.by_head else 1
      if axes.of_each_expert(name):
        blocks = config.experts
      found[i, name] = Place(tensor, start, rows, blocks)
      filled[tensor] = start + rows // blocks
  return found


def outer_tensor(config: ModelConfig, name: str) -> str:
  """The tensor of a parameter outside the layers.

  A class of our own has its output matrix where today's Transformers has all
  of them; it renames older names for its own classes only.
  """
  if name == "lm_head" and not is_stock(config):
    return OUTER["lm_head"]
  return FAMILIES[config.family].outer[name]


def tensor_shapes(
  config: ModelConfig, repeats: int = 1
) -> dict[str, tuple[int, ...]]:
  """Shape of each tensor of the model's checkpoint, in writing order.

  Those of all experts are one, see `apart`.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  for (layer, name), place in places(config, repeats).items():
    rest = hf_shape(name, config.sizes(layer))[1:]
    rows = place.start * place.blocks + place.rows
    shapes[place.tensor] = () if name in NUMBERS else (rows, *rest)
    if axes.of_each_expert(name):
      shapes[place.tensor] = (config.experts, rows // config.experts, *rest)
  return shapes


def apart(tensor: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  """The tensors that one of `tensor_shapes` is in a file, in their order."""
  if "*" not in tensor:
    return {tensor: shape}
  return {tensor.replace("*", str(x)): shape[1:] for x in range(shape[0])}


def together(
  checkpoint: Any, name: str, tensor: str, shape: tuple[int, ...]
) -> np.ndarray:
  """The inverse: a tensor of `tensor_shapes`, experts one below the other.

  Args:
    checkpoint: as `files.Checkpoint`.
    name: of a parameter in it.
    tensor, shape: from `tensor_shapes`.
  """
  parts = [checkpoint.array(part) for part in apart(tensor, shape)]
  if not axes.of_each_expert(name):
    return np.atleast_1d(parts[0])
  whole = parts[0] if len(parts) == 1 else np.stack(parts)
  return whole.reshape(-1, *whole.shape[2:])


def own_rows(tensor: np.ndarray, place: Place) -> np.ndarray:
  """The rows of a tensor that are a parameter's; a view of a single block."""
  if place.blocks == 1:
    return tensor[place.start : place.start + place.rows]
  share = place.rows // place.blocks
  by_block = tensor.reshape(place.blocks, -1, *tensor.shape[1:])
  own = by_block[:, place.start : place.start + share]
  return own.reshape(place.rows, *tensor.shape[1:])


def hf_letters(name: str) -> tuple[str, ...]:
  """The letters of each dim of the tensor: ("KGH", "D") for `q`."""
  letters = axes.AXES[name]
  if letters[0] == "X":  # one matrix below the other, or biases
    return ("X" + letters[2], letters[1]) if letters[2:] else (letters,)
  if "conv" in name:  # each channel has one input
    return letters[:-1], "", letters[-1]
  if name in ("embedding", "told"):
    return tuple(letters)
  if not {*letters} & {*axes.RESIDUAL} or len(letters) == 1:
    return (letters,)
  if letters[0] in axes.RESIDUAL:
    return letters[1:], letters[0]
  return letters[-1], letters[:-1]


def hf_shape(name: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """Shape of a parameter in a checkpoint, by the sizes of its letters."""
  return tuple(
    math.prod(sizes[letter] for letter in group) for group in hf_letters(name)
  )


def side_by_side(config: ModelConfig) -> int:
  """Channels of a head whose rotary pairs lie side by side in the checkpoint.

  In our arrays, and in most families' files, they are half of these apart.
  """
  if not FAMILIES[config.family].interleaved:
    return 0
  return rotated_channels(config.rope, config.head_dim)


def _pair_order(pairs: int, head_dim: int) -> np.ndarray:
  """Our channel at each place of a head in the file."""
  order = np.arange(pairs).reshape(2, -1).T.reshape(-1)
  return np.concatenate([order, np.arange(pairs, head_dim)])


def to_hf(name: str, array: np.ndarray, pairs: int = 0) -> np.ndarray:
  """Our array in the layout of the checkpoint, a view but for pairs.

  Args:
    pairs: from `side_by_side`.
  """
  if pairs and name in ROTATED:
    axis = axes.AXES[name].index("H")
    array = array.take(_pair_order(pairs, array.shape[axis]), axis)
  groups = hf_letters(name)
  sizes = dict(zip(axes.AXES[name], array.shape, strict=True))
  order = [axes.AXES[name].index(letter) for letter in "".join(groups)]
  return array.transpose(order).reshape(hf_shape(name, sizes))


def from_hf(
  name: str, tensor: np.ndarray, sizes: dict[str, int], pairs: int = 0
) -> np.ndarray:
  """The inverse of `to_hf`."""
  letters = "".join(hf_letters(name))
  array = tensor.reshape([sizes[letter] for letter in letters])
  array = array.transpose([letters.index(x) for x in axes.AXES[name]])
  if pairs and name in ROTATED:
    order = np.argsort(_pair_order(pairs, sizes["H"]))
    array = array.take(order, axes.AXES[name].index("H"))
  return array


def blocks(
  array: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[slice, np.ndarray]]:
  """Rows of an array and their contents, contiguous and of this dtype."""
  row_bytes = max(1, math.prod(array.shape[1:]) * dtype.itemsize)
  step = max(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
  for start in range(0, len(array), step):
    rows = slice(start, min(start + step, len(array)))
    yield rows, contiguous(array[rows].astype(dtype, copy=False))


def contiguous(array: np.ndarray) -> np.ndarray:
  """`np.ascontiguousarray`; JAX transposes several times faster than numpy."""
  if array.flags.c_contiguous or _cpu() is None:
    return np.ascontiguousarray(array)
  return np.asarray(jax.device_put(array, _cpu()))


@functools.cache
def _cpu() -> jax.Device | None:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None
