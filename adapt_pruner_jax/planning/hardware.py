"""What a run is planned for: devices that are here, or that are only named."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.models.devices import (
  DEVICES,
  memory_of,
  of_kind,
  peak_flops,
)
from adapt_pruner_jax.planning import compiling


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What the run is planned for; empty and 0 = what is here."""

  device: str = ""  # a name in `devices.DEVICES`, such as "NVIDIA H100"
  devices: int = 0
  memory: float = 0.0  # bytes of one device
  peak: float = 0.0  # FLOP/s of one device
  mfu: float = 0.4  # share of the peak that is reached
  topology: str = ""  # a slice of TPUs (libtpu is needed): "v5e:2x4"


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
    "a slice of TPUs to compile for, such as v5e:2x4; needs libtpu",
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
  if not 0 < hardware.mfu <= 1:  # written so that NaN fails
    raise UserError(f"--mfu={hardware.mfu} must be in (0, 1]")
  for name, value in (
    ("devices", hardware.devices),
    ("memory_gb", hardware.memory / 1e9),
    ("tflops", hardware.peak / 1e12),
  ):
    if not 0 <= value < math.inf:
      raise UserError(
        f"--{name}={value:g} must be above 0 and finite, or left out for what "
        "is here"
      )
  if hardware.topology:
    slice_ = compiling.devices_of(hardware.topology)
    kind = slice_[0].device_kind
    given = hardware.device, hardware.devices
    if given[0] not in ("", kind) or given[1] not in (0, len(slice_)):
      raise UserError(
        f"--topology={hardware.topology} is {len(slice_)} x {kind}: leave out "
        "--device and --devices"
      )
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


def compile_for(hardware: Hardware) -> Sequence[jax.Device] | int | str:
  """The devices that programs are compiled for, how many stand-ins, or the
  slice of TPUs that the TPU compiler is asked about."""
  here = jax.devices()
  is_here = hardware.device == here[0].device_kind
  enough = hardware.devices <= jax.device_count()
  if is_here and enough and here[0].platform != "tpu":
    return here[: hardware.devices]
  slice_ = compiling.slice_of(hardware.device, hardware.devices)
  slice_ = hardware.topology or slice_
  if slice_ and compiling.has_compiler():
    return slice_
  return here[: hardware.devices] if is_here and enough else hardware.devices


def source(
  hardware: Hardware, devices: Sequence[jax.Device] | int | str
) -> str:
  """Where the figures of memory come from."""
  if isinstance(devices, str):
    return f"what the TPU compiler lays out for {devices}"
  if not isinstance(devices, int):
    return f"compiled for {len(devices)} x {devices[0].device_kind}"
  said = (
    f"scoring is compiled for {devices} virtual CPU device(s) in float32, an "
    "upper bound; training is an estimate, nothing was compiled"
  )
  if compiling.slice_of(hardware.device, hardware.devices):
    said += "; pip install libtpu, and the TPU compiler says it"
  return said
