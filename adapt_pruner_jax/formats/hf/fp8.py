"""Weights stored in eight bits with a scale for each block (DeepSeek-V3's way).

They are dequantised when they are read: `weight * weight_scale_inv`, each scale
over its block of rows and columns, or one scale over the whole matrix. Scales
of activations are left out: these are not rounded here.
"""

from typing import Any

import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.files import (
  ALL,
  FLOAT8,
  Checkpoint,
  quant_method,
)

METHOD = "fp8"
BLOCK = (128, 128)  # where the config says nothing
SCALE, ACTIVATION = "_scale_inv", "activation_scale"
BECOMES = "bfloat16"  # the dtype of these weights


def dequantized(checkpoint: Checkpoint, quantization: Any) -> Any:
  """The checkpoint with plain weights; itself if it has no others.

  Args:
    quantization: the `quantization_config` of its config.json.

  Raises:
    UserError: eight-bit weights of another kind, or without their scales.
  """
  eight = [t for t, kind in checkpoint.dtypes.items() if kind == FLOAT8]
  if not eight:
    return checkpoint
  for tensor in eight:
    if (
      quant_method(quantization) != METHOD
      or f"{tensor}{SCALE}" not in checkpoint.shapes
    ):
      raise UserError(
        f"{checkpoint.folder}: {tensor} is stored in eight bits, which needs "
        f"{tensor}{SCALE} and a quantization_config of the method {METHOD}"
      )
  return Dequantized(checkpoint, quantization)


class Dequantized:
  """The tensors without the scales of others.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(self, inner: Checkpoint, quantization: dict[str, Any]):
    """Takes a checkpoint with its scales."""
    self.folder, self._inner = inner.folder, inner
    block = quantization.get("weight_block_size", BLOCK)
    sizes = block if isinstance(block, list | tuple) else ()
    good = [isinstance(size, int) and size > 0 for size in sizes]
    if block and good != [True, True]:
      raise UserError(
        f"{self.folder}: weight_block_size={block} must be two numbers from 1 "
        "on, rows and columns of a block, or null"
      )
    self._block = tuple(block) if block else None
    plain = {
      tensor: BECOMES if kind == FLOAT8 else kind
      for tensor, kind in inner.dtypes.items()
      if not tensor.endswith((SCALE, ACTIVATION))
    }
    self.dtypes = plain
    self.shapes = {tensor: inner.shapes[tensor] for tensor in plain}
    for tensor in plain:
      if inner.dtypes[tensor] == FLOAT8:
        self._check(tensor)

  def _check(self, tensor: str) -> None:
    shape = self.shapes[tensor]
    found = self._inner.shapes[f"{tensor}{SCALE}"]
    wanted = () if self._block is None else self._grid(shape)
    if len(shape) != 2 or (found != wanted and (wanted or found != (1,))):
      raise UserError(
        f"{self.folder}: {tensor}{SCALE} has shape {list(found)}, expected "
        f"{list(wanted)} for blocks of {self._block}"
      )

  def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, self._block, strict=False))

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor; of one in eight bits their values in float32."""
    found = self._inner.array(tensor, rows)
    if self._inner.dtypes[tensor] != FLOAT8:
      return found
    if self._block is None:
      scale = self._inner.array(f"{tensor}{SCALE}").astype(np.float32)
      return found.astype(np.float32) * scale
    number, columns = self.shapes[tensor]
    of_row = np.arange(number)[rows] // self._block[0]
    of_column = np.arange(columns) // self._block[1]
    first, stop = (of_row[0], of_row[-1] + 1) if len(of_row) else (0, 0)
    scale = self._inner.array(f"{tensor}{SCALE}", slice(first, stop))
    scale = scale.astype(np.float32)[of_row - first][:, of_column]
    return found.astype(np.float32) * scale
