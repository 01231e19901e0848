"""Several CPU devices: threads enough for them, or one line, never a hang."""

import os

import jax
import pytest

from adapt_pruner_jax.distributed import sharding, virtual_devices
from adapt_pruner_jax.errors import UserError


@pytest.mark.parametrize(
  "flags, before, after",
  [
    ("", None, None),
    ("--xla_force_host_platform_device_count=1", None, None),
    ("--xla_a --xla_force_host_platform_device_count=8", None, "16"),
    ("--xla_force_host_platform_device_count=12", None, "24"),
    ("--xla_force_host_platform_device_count=8", "40", "40"),
  ],
)
def test_threads_for_the_devices_that_are_asked_for(
  monkeypatch, flags, before, after
):
  monkeypatch.setenv("XLA_FLAGS", flags)
  monkeypatch.setenv("NPROC", "none")  # so that it is put back
  monkeypatch.delenv("NPROC")
  if before:
    monkeypatch.setenv("NPROC", before)
  virtual_devices.give_threads()
  assert os.environ.get("NPROC") == after


def test_a_mesh_that_would_hang_is_refused(monkeypatch):
  monkeypatch.delenv("NPROC")
  monkeypatch.setattr(virtual_devices, "cores", lambda: 2)
  devices = jax.devices("cpu")[:4]
  for shape in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}):
    with pytest.raises(UserError, match="set NPROC=16 in the environment"):
      sharding.make_mesh(**shape, devices=devices)
  sharding.make_mesh(data=4, fsdp=1, devices=devices)
  sharding.make_mesh(devices=devices[:1])
  monkeypatch.setenv("NPROC", "8")
  sharding.make_mesh(devices=devices)
