"""Experts that lie one behind the other in one tensor, as one tensor each.

Files of Qwen's have either; rows of `families` name the latter.
"""

from typing import Any

import numpy as np

from adapt_pruner_jax.formats.hf.files import ALL

STACKED = {
  "experts.gate_up_proj": ("gate_proj", "up_proj"),
  "experts.down_proj": ("down_proj",),
}


class Apart:
  """A checkpoint with a tensor for each matrix of each expert.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(self, inner: Any):
    """Takes a checkpoint, with stacked experts or without."""
    self.folder, self._inner = inner.folder, inner
    self.shapes, self.dtypes = dict(inner.shapes), dict(inner.dtypes)
    self._parts: dict[str, tuple[str, int, int, int]] = {}
    for tensor, shape in inner.shapes.items():
      ending = next((e for e in STACKED if tensor.endswith(e)), None)
      if ending is not None and len(shape) == 3:
        self._part(tensor, ending)

  def _part(self, tensor: str, ending: str) -> None:
    """Replaces a tensor by what it consists of."""
    experts, rows, columns = self.shapes.pop(tensor)
    kind = self.dtypes.pop(tensor)
    rows //= len(STACKED[ending])
    layer = tensor.removesuffix(ending)
    for expert in range(experts):
      for place, name in enumerate(STACKED[ending]):
        part = f"{layer}experts.{expert}.{name}.weight"
        self._parts[part] = tensor, expert, place * rows, rows
        self.shapes[part], self.dtypes[part] = (rows, columns), kind

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor of this name."""
    if tensor not in self._parts:
      return self._inner.array(tensor, rows)
    whole, expert, first, number = self._parts[tensor]
    (of_expert,) = self._inner.array(whole, slice(expert, expert + 1))
    return of_expert[first : first + number][rows]
