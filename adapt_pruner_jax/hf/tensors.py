"""Where each parameter is in a HuggingFace checkpoint, and in which layout.

A linear weight is [out, in] there and [in..., out...] here; letters as in
`axes.AXES`. Some families store several parameters one below the other in one
fused tensor.
"""

import dataclasses
import math

import numpy as np

from adapt_pruner_jax import axes
from adapt_pruner_jax.hf.families import FAMILIES, OUTER
from adapt_pruner_jax.model import ModelConfig, layer_names, outer_names

Key = tuple[int | None, str]  # layer (None: outside the layers), parameter


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
  for i in range(config.L):
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
  return tuple(
    math.prod(sizes[letter] for letter in group) for group in hf_letters(name)
  )


def to_hf(name: str, array: np.ndarray) -> np.ndarray:
  """Our array in the layout of the checkpoint."""
  groups = hf_letters(name)
  sizes = dict(zip(axes.AXES[name], array.shape, strict=True))
  order = [axes.AXES[name].index(letter) for letter in "".join(groups)]
  return array.transpose(order).reshape(hf_shape(name, sizes))


def from_hf(name: str, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
  """The inverse of `to_hf`."""
  letters = "".join(hf_letters(name))
  array = tensor.reshape([sizes[letter] for letter in letters])
  return array.transpose([letters.index(x) for x in axes.AXES[name]])
