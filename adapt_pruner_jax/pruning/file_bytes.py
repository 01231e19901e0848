"""Bytes of a parameter in a file, by the block rules of its format.

f32, f16, bf16   every number alike
q8_0, q4_0       rows in blocks of 32 numbers and a scale; rows of no whole
                 blocks f16, vectors f32. The output matrix, which is the
                 embedding where the two are tied, is not q4_0 but q8_0
                 (llama.cpp's own tool makes it q6_k where it can)
q4_k_m           written by llama.cpp's own tool: blocks of 256; some layers'
                 values and down projections, and the output, in q6_k; rows of
                 no whole blocks in q5_0, in q8_0 instead of q6_k
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from adapt_pruner_jax.models import axes

BYTES = {"f32": 4, "f16": 2, "bf16": 2}
# Numbers of a block and its bytes, as in `gguf.GGML_QUANT_SIZES`.
BLOCKS = {"q4_0": (32, 18), "q5_0": (32, 22), "q8_0": (32, 34)}
BLOCKS |= {"q4_k": (256, 144), "q6_k": (256, 210)}
BLOCKS |= {"f16": (1, 2), "f32": (1, 4), "bf16": (1, 2)}
# What a matrix becomes whose rows are no whole blocks.
INSTEAD = {"q4_k": "q5_0", "q6_k": "q8_0"}


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where a parameter is: in which layer of how many, None = outside."""

  index: int | None
  layers: int
  tied: bool = False


def tensor(
  export: str, name: str, sizes: Mapping, where: Layer
) -> int | np.ndarray:
  """Bytes of a parameter.

  Args:
    export: a value of `prune.budget_export`.
    name: of the parameter.
    sizes: of each letter; an array where many widths are asked for.
    where: the parameter is.
  """
  letters = axes.AXES[name]
  size = _product(letters, sizes)
  if export in BYTES:
    return BYTES[export] * size
  if "norm" in name or "bias" in name:
    return 4 * size
  # A row holds the inputs of a neuron, or the embedding of a token.
  inputs = {"o": "KGH", "embedding": "D", "told": "R"}.get(name, letters[0])
  row = _product(inputs, sizes)
  kind = _kind(export, name, where)
  found = 2 * size  # f16
  for other in (INSTEAD.get(kind, kind), kind):
    block, block_bytes = BLOCKS[other]
    found = np.where(row % block, found, size // block * block_bytes)
  return found


def _kind(export: str, name: str, where: Layer) -> str:
  """The kind that a matrix has if its rows are whole blocks."""
  output = name == "lm_head" or (name == "embedding" and where.tied)
  if export == "q8_0":
    return "q8_0"
  if export == "q4_0":
    return "q8_0" if output else "q4_0"
  more = name in ("v", "down") and _more_bits(where.index, where.layers)
  return "q6_k" if output or more else "q4_k"


def _more_bits(layer: int, layers: int) -> bool:
  """Whether llama.cpp gives this layer more: the ends, and every third."""
  first, last = layers // 8, 7 * layers // 8
  return layer < first or layer >= last or (layer - first) % 3 == 2


def _product(letters: str, sizes: Mapping) -> int | np.ndarray:
  if any(isinstance(sizes[x], np.ndarray) for x in letters):
    found = np.ones((), np.int64)
    for x in letters:
      found = found * sizes[x]
    return found
  return math.prod(int(sizes[x]) for x in letters)
