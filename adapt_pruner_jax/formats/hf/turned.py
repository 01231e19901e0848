"""Experts whose matrices lie the other way round in files (gpt-oss).

There they are [X, in, out], and of a gate and what it opens the outputs take
turns. Everywhere else in these formats they are [X, out, in], the gate's rows
in front: here is the way from one to the other.
"""

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

  def __init__(self, inner: Any, config: ModelConfig):
    """Takes a checkpoint of such a model."""
    self.folder, self.dtypes, self._inner = inner.folder, inner.dtypes, inner
    self._turned = {t for t in inner.shapes if is_turned(config, t)}
    self.shapes = {
      t: shape(s) if t in self._turned else s for t, s in inner.shapes.items()
    }

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor of this name, experts of those that are turned."""
    found = self._inner.array(tensor, rows)
    return from_file(tensor, found) if tensor in self._turned else found
