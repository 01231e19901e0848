"""Devices: the mesh, and where each array lives on it.

The mesh has four axes: `data` (replicas), `fsdp` (parameters cut, batch cut),
`expert` (experts cut, batch cut), `tensor` (heads and MLP channels cut).
Neighbours in it are neighbours in the network: within a slice of TPUs, or a
node of GPUs, `mesh_utils` places them on the torus; from one slice or node to
the next only `data` leads, whose replicas exchange gradients alone. Arrays name
their dims by letter (`axes.AXES`), and `RULES` maps letters to mesh axes. D
comes first: it is never pruned, so it goes on dividing, while K and F stop
dividing after a prune. What does not divide moves to another dim that does, and
is replicated only as a last resort (JAX refuses uneven shards). Small arrays,
such as norms, are on all devices: to gather one would take longer than to keep
it.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import virtual_devices
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import ModelConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH = axes.BATCH
# Bytes, in float32: smaller parameters are on all devices. Tests set it to 0.
WHOLE_BELOW = int(os.environ.get("ADAPT_PRUNER_WHOLE_BELOW", 1 << 20))
RULES = dict.fromkeys(axes.RESIDUAL, "fsdp") | {
  "K": "tensor",
  "Z": "tensor",
  "F": "tensor",
  "S": "tensor",
  "V": "tensor",
  "R": "fsdp",
}


def make_mesh(
  data: int = 0,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
  *,
  slices: int = 0,
  expert: int = 1,
) -> Mesh:
  """A (data, fsdp, expert, tensor) mesh.

  Args:
    data, fsdp, tensor, expert: its sizes; one of them may be -1 (what is left),
      and data 0 (as many as there are slices).
    devices: default all.
    slices: of devices with a fast network between them: TPU slices, GPU nodes;
      0 = as many as the devices say.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or CPU
      devices have too few threads.
  """
  devices = jax.devices() if devices is None else devices
  groups = _slices(devices, slices)
  sizes = [data, fsdp, expert, tensor]
  named = zip(MESH_AXES, sizes, strict=True)
  text = f"mesh {' '.join(f'{name}={size}' for name, size in named)}"
  if data == 0:
    sizes[0] = len(groups)
    text += f" ({len(groups)} slices or nodes)" * (len(groups) > 1)
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise UserError(
      f"{text}: sizes are at least 1, one of them may be -1, and data may be 0"
    )
  known = math.prod(s for s in sizes if s != -1)
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  if math.prod(sizes) != len(devices):
    raise UserError(
      f"{text} does not match the {len(devices)} device(s): the product of "
      "mesh.data, .fsdp, .expert and .tensor must be their number"
    )
  each = (sizes[0] // len(groups), *sizes[1:])
  if sizes[0] % len(groups):  # parameters are cut over slices too
    grid = np.concatenate(groups).reshape(sizes)
  else:
    grid = np.concatenate([_placed(each, group) for group in groups])
  mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
  virtual_devices.require_threads(mesh)
  return mesh


def _slices(
  devices: Sequence[jax.Device], number: int
) -> list[list[jax.Device]]:
  """The devices of each slice or node; of so many if they do not say.

  Raises:
    UserError: another number than they say, or one that does not divide them.
  """
  found: dict[int, list[jax.Device]] = {}
  for device in devices:
    found.setdefault(getattr(device, "slice_index", 0), []).append(device)
  if len(found) == 1 and number > 1 and len(devices) % number == 0:
    each = len(devices) // number
    return [[*devices[i * each : (i + 1) * each]] for i in range(number)]
  sizes = {len(group) for group in found.values()}
  are = (
    f"mesh slices={number}: the {len(devices)} device(s) are in {len(found)} "
    f"slice(s) or node(s) of {', '.join(map(str, sorted(sizes)))}"
  )
  if len(sizes) > 1:
    raise UserError(
      f"{are}: each must give as many, of GPUs by CUDA_VISIBLE_DEVICES"
    )
  if number not in (0, len(found)):
    raise UserError(
      f"{are}; leave --config.mesh.slices out, or give a number that divides "
      "them"
    )
  return [found[key] for key in sorted(found)]


def _placed(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices of a slice as a grid in which neighbours are neighbours."""
  if devices[0].platform != "tpu" or len(devices) == 1:
    return np.asarray(devices).reshape(shape)
  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def one_device() -> Mesh:
  """The mesh of whoever gives none."""
  return make_mesh(devices=jax.local_devices()[:1])


def require_experts(config: ModelConfig, mesh: Mesh, left: str = "") -> None:
  """Raises unless the devices of `expert` get as many experts each.

  Args:
    config: of the model.
    mesh: the devices.
    left: why it has as many experts, if that is not how it is stored.

  Raises:
    UserError: they do not, or the model has none.
  """
  parts = mesh.shape["expert"]
  if parts > 1 and (not config.experts or config.experts % parts):
    has = f"{config.experts} experts{left}" if config.experts else "no experts"
    raise UserError(
      f"--config.mesh.expert={parts} cuts a layer's experts in as many equal "
      f"parts, and {config.family} has {has}: give a number that divides "
      "them, or 1"
    )


def spec(letters: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Where an array with these dim letters is cut.

  Each mesh axis goes to the dim that `RULES` wants if the size divides, else
  to the largest other dim that divides, else nowhere; none does if the array is
  small.
  """
  cut: list[str | None] = [None] * len(letters)
  if 4 * math.prod(shape) < WHOLE_BELOW:
    return PartitionSpec(*cut)
  experts = letters.find("X")
  # A router, which has them last, is whole: it compares them all.
  if mesh.shape["expert"] > 1 and 0 <= experts < len(letters) - 1:
    cut[experts] = "expert"
  for axis in ("fsdp", "tensor"):
    size = mesh.shape[axis]
    if size == 1:
      continue
    wanted = [
      i for i, letter in enumerate(letters) if RULES.get(letter) == axis
    ]
    if not wanted:
      continue
    others = sorted(
      set(range(len(shape))) - set(wanted), key=lambda i: -shape[i]
    )
    for i in wanted + others:
      # L is scanned over: cutting it would gather each layer from one device.
      if cut[i] is None and shape[i] % size == 0 and letters[i] != "L":
        cut[i] = axis
        break
  return PartitionSpec(*cut)


def param_sharding(
  name: str, shape: Sequence[int], mesh: Mesh, stacked: bool = False
) -> NamedSharding:
  """Where a parameter is cut.

  Args:
    name: a key of `axes.AXES`.
    shape: of the array.
    mesh: the devices.
    stacked: the array has a leading layer dim.
  """
  letters = "L" * stacked + axes.AXES[name]
  return NamedSharding(mesh, spec(letters, shape, mesh))


def param_shardings(tree: axes.Params, mesh: Mesh) -> axes.Params:
  """Shardings for a tree with parameters inside, such as params or moments.

  Leaves that are not parameters (counters) are replicated.
  """

  def one(name: str | None, _: int | None, leaf: jax.Array) -> NamedSharding:
    if name is None:
      return replicated(mesh)
    return param_sharding(name, leaf.shape, mesh)

  return axes.map_named(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def whole(tree: Any, mesh: Mesh | None) -> Any:
  """Within `jit`: results that every process can read."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def with_numpy(mesh: Mesh) -> bool:
  """Whether arrays are best rearranged by numpy: one process, on a CPU."""
  return jax.process_count() == 1 and mesh.devices.flat[0].platform == "cpu"


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
  """What XLA is told where a program gathers weights cut over the mesh.

  By default it cuts products with large gathered weights into steps that wait
  for each other's permutes (windowed einsum), which takes longer on TPUs than
  gathering them first (docs/accelerators.md).
  """
  if mesh.devices.flat[0].platform != "tpu" or mesh.size == 1:
    return None
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
