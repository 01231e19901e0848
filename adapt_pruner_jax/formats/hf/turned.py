"""Experts whose matrices lie the other way round in files.

There they are [X, in, out], everywhere else in these formats [X, out, in], the
gate's rows in front of those that it opens. In files of gpt-oss these two take
turns besides; those of Qwen3-VL have either way round, as their shapes say.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.files import ALL
from adapt_pruner_jax.models.model_config import ModelConfig

BOTH, BIASES, DOWN = "gate_up_proj", "gate_up_proj_bias", "down_proj"


def is_turned(config: ModelConfig, tensor: str) -> bool:
  """Whether a tensor of the model's files is one of these."""
  turned = FAMILIES[config.family].turned
  return turned and tensor.rsplit(".", 1)[-1] in (BOTH, BIASES, DOWN)


def shape(usual: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in a file, of the usual one, or the other way."""
  return (usual[0], *reversed(usual[1:]))


def to_file(tensor: str, array: np.ndarray) -> np.ndarray:
  """A tensor as files have it, of the usual one."""
  if tensor.endswith(DOWN):
    return array.swapaxes(1, 2)
  X, outputs, *inputs = array.shape
  pairs = array.reshape(X, 2, outputs // 2, *inputs)
  return pairs.transpose(0, *range(pairs.ndim - 1, 1, -1), 1).reshape(
    X, *inputs, outputs
  )


def from_file(tensor: str, array: np.ndarray) -> np.ndarray:
  """The inverse of `to_file`."""
  if tensor.endswith(DOWN):
    return array.swapaxes(1, 2)
  X, *inputs, outputs = array.shape
  pairs = array.reshape(X, *inputs, outputs // 2, 2)
  return pairs.transpose(0, *range(pairs.ndim - 1, 0, -1)).reshape(
    X, outputs, *inputs
  )


class Usual:
  """A checkpoint with its experts' matrices as those of other families.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(
    self,
    inner: Any,
    experts: Iterable[str],
    from_file: Callable[[str, np.ndarray], np.ndarray],
  ):
    """Takes a checkpoint, which of its tensors are turned, and the way back."""
    self.folder, self.dtypes, self._inner = inner.folder, inner.dtypes, inner
    self._turned, self._from_file = {*experts}, from_file
    self.shapes = {
      t: shape(s) if t in self._turned else s for t, s in inner.shapes.items()
    }

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor of this name, experts of those that are turned."""
    found = self._inner.array(tensor, rows)
    return self._from_file(tensor, found) if tensor in self._turned else found


def in_turns(checkpoint: Any, config: ModelConfig) -> Usual:
  """A checkpoint of gpt-oss, as usual."""
  experts = [t for t in checkpoint.shapes if is_turned(config, t)]
  return Usual(checkpoint, experts, from_file)


def either_way(checkpoint: Any, D: int) -> Usual:
  """A checkpoint of Qwen3-VL with experts, as usual.

  Args:
    D: width of the residual stream, which says where the inputs are.
  """
  inputs = {f".mlp.experts.{BOTH}": 2, f".mlp.experts.{DOWN}": 1}
  experts = [
    tensor
    for tensor, sizes in checkpoint.shapes.items()
    for ending, axis in inputs.items()
    if tensor.endswith(ending) and len(sizes) == 3 and sizes[axis] != D
  ]
  return Usual(checkpoint, experts, lambda _, array: array.swapaxes(1, 2))
