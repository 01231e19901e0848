"""Weights in four bits, 32 of them with one power of two (MXFP4, gpt-oss).

`X_blocks` has two weights a byte, the first in its low half, each one of
`VALUES`; `X_scales` the exponents, plus 127. They are read as `X`, in the
layout that Transformers unpacks them to: inputs in front of outputs.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.files import ALL, quant_method

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*HALF, *(-x for x in HALF)], np.float32)
BYTES = 16  # of a block of 32
BECOMES = "bfloat16"  # which holds all of them exactly


def unpacked(checkpoint: Any, quantization: Any) -> Any:
  """The checkpoint with plain weights; itself if it has no others.

  Args:
    quantization: the `quantization_config` of its config.json.

  Raises:
    UserError: weights in bytes of another kind, or without their exponents.
  """
  kinds = {"uint8": "U8", "bool": "BOOL"}
  packed = [t for t, kind in checkpoint.dtypes.items() if kind in kinds]
  if not packed:
    return checkpoint
  for tensor in packed:
    pair = BLOCKS, SCALES
    if tensor.endswith(SCALES):
      pair = SCALES, BLOCKS
    other = tensor.removesuffix(pair[0]) + pair[1]
    known = tensor.endswith(pair) and other in checkpoint.shapes
    if not known or quant_method(quantization) != METHOD:
      raise UserError(
        f"{checkpoint.folder}: {tensor} is stored as "
        f"{kinds[checkpoint.dtypes[tensor]]}, which is read with {BLOCKS} and "
        f"{SCALES} of the method {METHOD} only; other quantized models are not "
        "supported"
      )
  return Unpacked(checkpoint)


class Unpacked:
  """The tensors, those in four bits under their own names.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(self, inner: Any):
    """Takes a checkpoint with blocks and scales."""
    self.folder, self._inner = inner.folder, inner
    self.shapes, self.dtypes = dict(inner.shapes), dict(inner.dtypes)
    for tensor in inner.shapes:
      if inner.dtypes[tensor] == "uint8" and tensor.endswith(BLOCKS):
        name = tensor.removesuffix(BLOCKS)
        if name in inner.shapes:
          raise UserError(
            f"{self.folder}: {name} is stored plain and as {tensor}; one of "
            "them is needed"
          )
        X, outputs, groups, size = self._checked(name)
        self.shapes[name] = (X, groups * size * 2, outputs)
        self.dtypes[name] = BECOMES
        for ending in (BLOCKS, SCALES):
          del self.shapes[f"{name}{ending}"], self.dtypes[f"{name}{ending}"]

  def _checked(self, name: str) -> tuple[int, ...]:
    blocks = self._inner.shapes[f"{name}{BLOCKS}"]
    scales = self._inner.shapes[f"{name}{SCALES}"]
    if len(blocks) != 4 or blocks[3] != BYTES or blocks[:3] != scales:
      raise UserError(
        f"{self.folder}: {name}{BLOCKS} {list(blocks)} and {name}{SCALES} "
        f"{list(scales)} do not go together: blocks are [experts, outputs, "
        f"groups, {BYTES}], scales without the last"
      )
    return blocks

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor; of one in four bits, whose rows are experts, the
    values."""
    if tensor in self._inner.shapes:
      return self._inner.array(tensor, rows)
    blocks = self._inner.array(f"{tensor}{BLOCKS}", rows)
    scales = self._inner.array(f"{tensor}{SCALES}", rows)
    shape = len(blocks), *self.shapes[tensor][1:]
    made = np.empty(shape, jnp.dtype(self.dtypes[tensor]))
    for into, block, scale in zip(made, blocks, scales, strict=True):
      halves = VALUES[np.stack([block & 15, block >> 4], axis=-1)]
      exponents = scale.astype(np.int32)[..., None, None] - 127
      plain = np.ldexp(halves, exponents)
      into[:] = plain.reshape(len(block), -1).T
    return made
