"""A parameter read by many processes, each its share of the file's rows.

A matrix is [out, in] in a file and mostly cut over its inputs on the devices:
the columns of one device are a little of every page of the file. So each reads
rows, and the devices turn these into what they need.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import tensors


def wanted(stored: Any, shape: tuple[int, ...]) -> bool:
  """Whether a parameter is read so: by many processes, if it is large."""
  large = math.prod(shape) * stored.dtype.itemsize >= sharding.WHOLE_BELOW
  return jax.process_count() > 1 and large


def place(stored: Any, shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
  """A parameter on the mesh, of which each process reads a part once.

  Args:
    stored: a `parameters.Stored`; all processes have to call it with the same
      ones, in the same order.
    shape: of the parameter.
    mesh: over all processes.
  """
  devices = mesh.devices.ravel()  # one program has one order of devices
  rows = stored.place.rows
  rest = tensors.hf_shape(stored.name, stored.sizes)[1:]
  each = -(-rows // len(devices))
  line = Mesh(devices, ("rows",))
  cut = NamedSharding(line, PartitionSpec("rows"))
  arrays = []
  for i, device in enumerate(devices):
    if device.process_index != jax.process_index():
      continue
    start, stop = (min(n * each, rows) for n in (i, i + 1))
    part = np.zeros((each, *rest), stored.dtype)
    if start < stop:
      part[: stop - start] = stored.rows(start, stop)
    arrays.append(jax.device_put(part, device))
  padded = (each * len(devices), *rest)
  read = jax.make_array_from_single_device_arrays(padded, cut, arrays)
  where = sharding.param_sharding(stored.name, shape, mesh)
  sizes = tuple(stored.sizes.items())
  return _arrange(stored.name, rows, sizes, stored.pairs, where)(read)


@cache
def _arrange(
  name: str,
  rows: int,
  sizes: tuple[tuple[str, int], ...],
  pairs: int,
  where: NamedSharding,
) -> Callable[[jax.Array], jax.Array]:
  """What makes of rows in the file's layout a parameter where it belongs."""
  fn = lambda read: tensors.from_hf(name, read[:rows], dict(sizes), pairs)
  return jax.jit(fn, out_shardings=where)
