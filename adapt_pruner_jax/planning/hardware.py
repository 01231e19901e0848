"""What a run is planned for: devices that are here, or that are only named."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from adapt_pruner_jax.errors import UserError, first_line, nearest
from adapt_pruner_jax.models.devices import (
  DEVICES,
  memory_of,
  of_kind,
  peak_flops,
)


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What the run is planned for; empty and 0 = what is here."""

  device: str = ""  # a name in `devices.DEVICES`, such as "NVIDIA H100"
  devices: int = 0
  memory: float = 0.0  # bytes of one device
  peak: float = 0.0  # FLOP/s of one device
  mfu: float = 0.4  # share of the peak that is reached
  topology: str = ""  # compile for these TPUs (libtpu is needed): "v5e:2x4"


def define_flags(values: flags.FlagValues) -> None:
  """The flags of `adapt-pruner plan` beside --config."""
  known = ", ".join(DEVICES)
  text, number = flags.DEFINE_string, flags.DEFINE_float
  text("device", "", f"what it will run on: {known}", flag_values=values)
  flags.DEFINE_integer("devices", 0, "how many of them", flag_values=values)
  number("memory_gb", 0, "memory of one device", flag_values=values)
  number("tflops", 0, "peak of one device", flag_values=values)
  number("mfu", 0.4, "share of the peak that is reached", flag_values=values)
  text(
    "topology",
    "",
    "compile for these TPUs, such as v5e:2x4; needs libtpu and minutes",
    flag_values=values,
  )


def flag_values(values: flags.FlagValues) -> dict[str, Any]:
  """The flags as arguments of `plan`."""
  return {
    "hardware": Hardware(
      values.device,
      values.devices,
      values.memory_gb * 1e9,
      values.tflops * 1e12,
      values.mfu,
      values.topology,
    )
  }


def resolve(hardware: Hardware) -> Hardware:
  """Fills in what is here, and what is known of a named device.

  Raises:
    UserError: a device or a topology that is not known, or a bad share.
  """
  if hardware.mfu <= 0 or hardware.mfu > 1:
    raise UserError(f"--mfu={hardware.mfu} must be in (0, 1]")
  if hardware.topology:
    slice_ = topology_devices(hardware.topology)
    kind = slice_[0].device_kind
    hardware = dataclasses.replace(hardware, device=kind, devices=len(slice_))
  if hardware.device:
    names = {name.lower(): name for name in DEVICES}
    wanted = hardware.device.lower()
    found = [full for low, full in names.items() if wanted in low]
    if not found:
      raise UserError(
        f"--device={hardware.device} is not known"
        f"{nearest(hardware.device, DEVICES)}; known are "
        f"{', '.join(DEVICES)}; of another give --tflops and --memory_gb"
      )
    name = min(found, key=len)
    here = jax.devices()[0]
    same = of_kind(here.device_kind) is DEVICES[name]
    size = memory_of(here) if same else DEVICES[name].memory
    return dataclasses.replace(
      hardware,
      device=name,
      devices=hardware.devices or 1,
      memory=hardware.memory or size,
      peak=hardware.peak or DEVICES[name].flops,
    )
  here = jax.devices()[0]
  return dataclasses.replace(
    hardware,
    device="" if hardware.memory or hardware.peak else here.device_kind,
    devices=hardware.devices or jax.device_count(),
    memory=hardware.memory or memory_of(here),
    peak=hardware.peak or peak_flops(here) or 0.0,
  )


def compile_for(hardware: Hardware) -> Sequence[jax.Device] | int:
  """The devices that programs are compiled for, or how many stand-ins."""
  if hardware.topology:
    return topology_devices(hardware.topology)
  is_here = hardware.device == jax.devices()[0].device_kind
  if is_here and hardware.devices <= jax.device_count():
    return jax.devices()[: hardware.devices]
  return hardware.devices


def source(devices: Sequence[jax.Device] | int) -> str:
  """Where the figures of memory come from."""
  if not isinstance(devices, int):
    return f"compiled for {len(devices)} x {devices[0].device_kind}"
  return (
    f"scoring is compiled for {devices} virtual CPU device(s) in float32, an "
    "upper bound; training is an estimate, nothing was compiled"
  )


def topology_devices(name: str) -> Sequence[jax.Device]:
  """Devices of a TPU slice that is not here; they can only be compiled for.

  Raises:
    UserError: no such slice, or libtpu is missing.
  """
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(name, "tpu").devices
  except Exception as error:
    raise UserError(
      f"--topology={name}: {first_line(error)}; a name is such as "
      "v5e:2x4, and libtpu must be installed (pip install libtpu)"
    ) from error
