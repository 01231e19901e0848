"""What devices can do: one table, from the makers' data sheets."""

import dataclasses
import os
import resource
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

USABLE = 0.92  # share of a device's memory that a program gets


@dataclasses.dataclass(frozen=True)
class Device:
  """One device, as JAX counts them.

  Attributes:
    flops: dense bfloat16 FLOP/s at best.
    memory: bytes.
  """

  flops: float
  memory: float


# The first name that a `device_kind` starts with counts.
DEVICES = {
  "TPU v4": Device(275e12, 32e9),
  "TPU v5 lite": Device(197e12, 16e9),
  "TPU v5e": Device(197e12, 16e9),
  "TPU v5p": Device(459e12, 95e9),
  "TPU v5": Device(459e12, 95e9),
  "TPU v6 lite": Device(918e12, 32e9),
  "TPU v6e": Device(918e12, 32e9),
  "TPU7x": Device(1153.5e12, 96e9),  # a chip of 2307e12, 192e9 is two devices
  "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9),
  "NVIDIA A100-PCIE-40GB": Device(312e12, 40e9),
  "NVIDIA A100": Device(312e12, 80e9),
  "NVIDIA H100 PCIe": Device(756e12, 80e9),
  "NVIDIA H100 NVL": Device(835e12, 94e9),
  "NVIDIA H100": Device(989e12, 80e9),
  "NVIDIA H200": Device(989e12, 141e9),
  "NVIDIA GH200": Device(989e12, 96e9),
  "NVIDIA B200": Device(2250e12, 180e9),
  "NVIDIA GB200": Device(2500e12, 186e9),
}


@dataclasses.dataclass(frozen=True)
class Meant:
  """A device that is not here, as far as what a program does depends on it."""

  device_kind: str
  platform: str
  compute_capability: float


class MeantMesh(NamedTuple):
  """A mesh of such devices, for arithmetic; JAX cannot compile for it.

  Attributes:
    shape, size, devices: as a `jax.sharding.Mesh` has them.
  """

  shape: dict[str, int]
  size: int
  devices: np.ndarray


def meant_mesh(mesh: Any, kind: str) -> Any:
  """A mesh of stand-ins as one of the devices that they stand in for.

  Args:
    mesh: of stand-ins.
    kind: a name in `DEVICES`; the mesh of another is given back as it is.
  """
  if of_kind(kind) is None:
    return mesh
  platform = "tpu" if kind.startswith("TPU") else "gpu"
  ampere = kind.startswith("NVIDIA A")
  device = Meant(kind, platform, 8.0 if ampere else 9.0)
  return MeantMesh(dict(mesh.shape), mesh.size, np.array([device]))


def nodes(kind: str, number: int) -> int:
  """How many machines so many devices are in, as usual of GPUs eight in each;
  1 of TPUs, of which a slice is meant, and where eight do not divide them."""
  usual = of_kind(kind) is not None and not kind.startswith("TPU")
  return number // 8 if usual and number % 8 == 0 else 1


def of_kind(kind: str) -> Device | None:
  """The row of a `device_kind`, None if it is not known."""
  return next((d for n, d in DEVICES.items() if kind.startswith(n)), None)


def peak_flops(device: Any) -> float | None:
  """bfloat16 FLOP/s that a `jax.Device` can do at best, None if not known."""
  found = of_kind(device.device_kind)
  return found and found.flops


def peak_memory() -> int | None:
  """Bytes of the fullest device of this process, at most since it began; of
  CPUs, the process's."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if peaks:
    return max(peaks)
  if jax.local_devices()[0].platform != "cpu":
    return None
  unit = 1 if sys.platform == "darwin" else 1024  # bytes
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of(device: jax.Device) -> float:
  """Bytes of a device; CPU devices share those of the machine."""
  try:
    stats = device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # it is only compiled for
    stats = {}
  if "bytes_limit" in stats:
    return float(stats["bytes_limit"]) / USABLE
  if found := of_kind(device.device_kind):
    return found.memory
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return whole / jax.local_device_count()
