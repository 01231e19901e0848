"""Parameters in their files, and how each gets onto the devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import shares, tensors
from adapt_pruner_jax.formats.hf.files import Checkpoint
from adapt_pruner_jax.formats.hf.tensors import Place
from adapt_pruner_jax.models import axes


@dataclasses.dataclass(frozen=True)
class Stored:
  """A parameter in its file.

  Attributes:
    sizes: of its dim letters.
    dtype: what it becomes when it is read.
    pairs: as of `tensors.from_hf`.
    shape: of the tensor, from `tensors.tensor_shapes`.
  """

  checkpoint: Checkpoint
  name: str
  place: Place
  sizes: dict[str, int]
  dtype: np.dtype
  pairs: int = 0
  shape: tuple[int, ...] = ()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """All of it; a view of the file if the dtype is that of the file."""
    part = self._part(self._tensor(), self._whole)
    return part.astype(dtype or self.dtype, copy=bool(copy))

  @property
  def _whole(self) -> tuple[slice, ...]:
    return (slice(None),) * len(axes.AXES[self.name])

  def _tensor(self) -> np.ndarray:
    where = self.place.tensor, self.shape
    return tensors.together(self.checkpoint, self.name, *where)

  def _part(self, tensor: np.ndarray, index: Sequence[slice]) -> np.ndarray:
    """A view of part `index` of the parameter in its tensor.

    A dim of the tensor holds several of our dims, as KGH: the first of them is
    cut in the file's layout, the others afterwards.
    """
    cut = dict(zip(axes.AXES[self.name], index, strict=True))
    sizes, ranges = dict(self.sizes), []
    for letters in tensors.hf_letters(self.name):
      if not letters:
        ranges.append(slice(None))
        continue
      first, inner = letters[0], math.prod(sizes[x] for x in letters[1:])
      start, stop, _ = cut[first].indices(sizes[first])
      ranges.append(slice(start * inner, stop * inner))
      sizes[first] = stop - start
      cut[first] = slice(None)
    rows = tensors.own_rows(tensor, self.place)[tuple(ranges)]
    part = tensors.from_hf(self.name, rows, sizes, self.pairs)
    return part[tuple(cut[letter] for letter in axes.AXES[self.name])]

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Rows of the parameter in the file's layout; no others are read.

    But where a file has experts, or heads, in another order of rows, all of
    those at the ends.
    """
    share = self.place.rows // self.place.blocks
    found = []
    for block in range(start // share, -(-stop // share)):
      first = self.place.start - block * share
      low, high = max(start, block * share), min(stop, (block + 1) * share)
      found.append(self._block(block, slice(first + low, first + high)))
    return found[0] if len(found) == 1 else np.concatenate(found)

  def _block(self, number: int, rows: slice) -> np.ndarray:
    """Rows of a block of the tensor, which has a share of the parameter."""
    tensor, blocks = self.place.tensor, self.place.blocks
    if "*" in tensor:
      return self.checkpoint.array(tensor.replace("*", str(number)), rows)
    if axes.of_each_expert(self.name):
      (expert,) = self.checkpoint.array(tensor, slice(number, number + 1))
      return expert[rows]
    first = number * (self.checkpoint.shapes[tensor][0] // blocks)
    rows = slice(first + rows.start, first + rows.stop)
    return self.checkpoint.array(tensor, rows)

  def place_on(self, mesh: Mesh | None) -> jax.Array:
    """On the mesh or, None, the default device; reads what is needed there."""
    shape = axes.shape(self.name, self.sizes)
    if mesh is not None and shares.wanted(self, shape):
      return shares.place(self, shape, mesh)
    tensor = self._tensor()
    if mesh is None:
      return jax.device_put(self._read(tensor, self._whole))
    where = sharding.param_sharding(self.name, shape, mesh)
    parts: dict[tuple, np.ndarray] = {}  # replicas are read once
    arrays = []
    for device, index in where.addressable_devices_indices_map(shape).items():
      key = tuple((cut.start, cut.stop) for cut in index)
      if key not in parts:
        parts[key] = self._read(tensor, index)
      arrays.append(jax.device_put(parts[key], device))
    return jax.make_array_from_single_device_arrays(shape, where, arrays)

  def _read(self, tensor: np.ndarray, index: Sequence[slice]) -> np.ndarray:
    """Part `index`, to be put on a device, which transposes it on the way.

    What needs no transposition is copied: JAX keeps memory that it can use as
    it is, and that of a file may change.
    """
    part = self._part(tensor, index)
    return part.astype(self.dtype, copy=part.flags.c_contiguous)
