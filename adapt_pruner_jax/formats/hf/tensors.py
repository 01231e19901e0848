"""Where each parameter is in a HuggingFace checkpoint, and in which layout.

A linear weight is [out, in] there and [in..., out...] here; letters as in
`axes.AXES`. Some families store several parameters one below the other in one
fused tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

from adapt_pruner_jax.formats.hf.families import FAMILIES, OUTER
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  outer_names,
)

Key = tuple[int | None, str]  # layer (None: outside the layers), parameter

BLOCK_BYTES = 1 << 23  # stays in a CPU's cache
BLOCK_ROWS = 64  # at least: fewer would read strided memory line by line


@dataclasses.dataclass(frozen=True)
class Place:
  """Rows start : start + rows of a tensor."""

  tensor: str
  start: int
  rows: int


def places(config: ModelConfig, repeats: int = 1) -> dict[Key, Place]:
  """Where each parameter of the model is.

  Args:
    repeats: how many layers in a row share each stored layer.
  """
  names = FAMILIES[config.family].tensors
  found: dict[Key, Place] = {}
  for name in outer_names(config):
    rows = hf_shape(name, config.sizes())[0]
    found[None, name] = Place(OUTER[name], 0, rows)
  for i in range(config.num_layers):
    filled: dict[str, int] = {}
    for name in layer_names(config, i):
      tensor = f"model.layers.{i // repeats}.{names[name]}"
      start = filled.get(tensor, 0)
      rows = hf_shape(name, config.sizes(i))[0]
      found[i, name] = Place(tensor, start, rows)
      filled[tensor] = start + rows
  return found


def tensor_shapes(
  config: ModelConfig, repeats: int = 1
) -> dict[str, tuple[int, ...]]:
  """Shape of each tensor of the model's checkpoint, in writing order."""
  shapes: dict[str, tuple[int, ...]] = {}
  for (layer, name), place in places(config, repeats).items():
    rest = hf_shape(name, config.sizes(layer))[1:]
    shapes[place.tensor] = (place.start + place.rows, *rest)
  return shapes


def hf_letters(name: str) -> tuple[str, ...]:
  """The letters of each dim of the tensor: ("KGH", "D") for `q`."""
  letters = axes.AXES[name]
  if "norm" in name or name.endswith("bias"):
    return (letters,)
  if name == "embedding":
    return ("V", "D")
  if letters[0] in axes.RESIDUAL:
    return letters[1:], letters[0]
  return letters[-1], letters[:-1]


def hf_shape(name: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """Shape of a parameter in a checkpoint, by the sizes of its letters."""
  return tuple(
    math.prod(sizes[letter] for letter in group) for group in hf_letters(name)
  )


def to_hf(name: str, array: np.ndarray) -> np.ndarray:
  """Our array in the layout of the checkpoint, a view."""
  groups = hf_letters(name)
  sizes = dict(zip(axes.AXES[name], array.shape, strict=True))
  order = [axes.AXES[name].index(letter) for letter in "".join(groups)]
  return array.transpose(order).reshape(hf_shape(name, sizes))


def from_hf(name: str, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
  """The inverse of `to_hf`, a view as well."""
  letters = "".join(hf_letters(name))
  array = tensor.reshape([sizes[letter] for letter in letters])
  return array.transpose([letters.index(x) for x in axes.AXES[name]])


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
