"""The mesh over slices, what is cut, and how many samples go at once."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import Mesh
from adapt_pruner_jax.distributed import (
  each_device,
  placement,
  processes,
  sharding,
)
from adapt_pruner_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
  """A GPU of a node, or a TPU chip of a slice."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"


def nodes(*sizes):
  where = [node for node, size in enumerate(sizes) for _ in range(size)]
  # JAX gives no promise of their order.
  found = [Device(i, node) for i, node in enumerate(where)]
  return found[::2] + found[1::2]


def grid_of(monkeypatch, devices, **shape):
  """What `make_mesh` would give to JAX, which takes no stand-ins."""
  made = []

  def mesh(grid, *_, **__):
    made.append(grid)

  monkeypatch.setattr(sharding, "Mesh", mesh)
  monkeypatch.setattr(sharding.virtual_devices, "require_threads", id)
  sharding.make_mesh(**dataclasses.asdict(Mesh(**shape)), devices=devices)
  return made[0]


def test_replicas_over_nodes_by_default(monkeypatch):
  """Within a node parameters are cut; each row of the mesh is a node."""
  grid = grid_of(monkeypatch, nodes(4, 4, 4))
  assert grid.shape == (3, 4, 1, 1)
  for node, row in enumerate(grid):
    assert {d.slice_index for d in row.flat} == {node}
  grid = grid_of(monkeypatch, nodes(4, 4), data=4, tensor=2)
  assert grid.shape == (4, 1, 1, 2)
  for node in (0, 1):
    assert {d.slice_index for d in grid[2 * node].flat} == {node}
    assert {d.slice_index for d in grid[2 * node + 1].flat} == {node}
  # Asked for: parameters cut over all of them.
  assert grid_of(monkeypatch, nodes(4, 4), data=1).shape == (1, 8, 1, 1)
  assert grid_of(monkeypatch, nodes(8)).shape == (1, 8, 1, 1)


def test_slices_that_devices_do_not_tell(monkeypatch):
  grid = grid_of(monkeypatch, jax.devices(), slices=2)
  assert grid.shape == (2, 4, 1, 1)
  assert [d.id for d in grid.flat] == [*range(8)]
  for devices, number, advice in (
    (jax.devices(), 3, r"--config\.mesh\.slices"),
    (nodes(4, 4), 4, r"--config\.mesh\.slices"),
    (nodes(4, 2), 0, "of 2, 4: each must give as many"),
  ):
    with pytest.raises(UserError, match=advice):
      sharding.make_mesh(slices=number, devices=devices)
  with pytest.raises(UserError, match=r"mesh data=0 .*tensor=8 \(2 slices"):
    sharding.make_mesh(tensor=8, devices=nodes(4, 4))


def test_processes_need_as_many_devices():
  """Else JAX's own collectives fail, with a line about a shape."""
  of = lambda *counts: [
    types.SimpleNamespace(process_index=p)
    for p, count in enumerate(counts)
    for _ in range(count)
  ]
  processes.require_alike(of(4, 4, 4))
  with pytest.raises(UserError, match=r"^process 1 has 3 device\(s\), the oth"):
    processes.require_alike(of(4, 3, 4, 4))


def test_arrays_under_a_megabyte_are_on_all_devices(monkeypatch):
  monkeypatch.setattr(sharding, "WHOLE_BELOW", 2**20)
  mesh = sharding.make_mesh()
  cut = lambda name, *shape: any(
    sharding.param_sharding(name, shape, mesh).spec
  )
  assert not cut("attn_norm", 8192)
  assert not cut("k", 2048, 2, 63)  # 1,032,192 bytes of float32
  assert cut("k", 2048, 2, 64)
  assert cut("embedding", 1000, 512)


def test_samples_at_a_time_use_all_devices():
  """Not fewer rows than devices, and never a short last minibatch."""
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  tokens_NT = np.arange(24 * 2).reshape(24, 2)
  for batch, want in ((4, 8), (3, 24), (8, 8), (5, 5), (16, 16)):
    assert placement.together(batch, len(tokens_NT), mesh) == want
  assert placement.together(4, 20, mesh) == 4
  assert placement.together(3, 20, sharding.one_device()) == 3


@pytest.mark.parametrize("bytes_each, times", [(1 << 20, 1), (700, 4)])
def test_a_large_sum_is_added_up_in_pieces(monkeypatch, bytes_each, times):
  monkeypatch.setattr(each_device, "PIECE", bytes_each)
  mesh = sharding.make_mesh()
  x_NABC = np.arange(8 * 5 * 32 * 3, dtype=np.int32).reshape(8, 5, 32, 3)
  total = jax.jit(functools.partial(each_device.total, mesh=mesh))
  lowered = total.lower(placement.place_rows(x_NABC, mesh))
  piece = 32 // times
  assert f"tensor<5x{piece}x3xi32>) -> tensor<5x{piece // 8}x3xi32>" in (
    lowered.as_text()
  )
  got = total(placement.place_rows(x_NABC, mesh))
  np.testing.assert_array_equal(got, x_NABC.sum(0))
