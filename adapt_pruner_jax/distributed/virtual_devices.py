"""Enough threads for virtual CPU devices, or a refusal, but never a hang.

XLA runs all CPU devices of a process in one pool of threads, one a core, and a
device in a collective keeps its thread until the last one has come. With fewer
threads than that takes nobody comes any more, and XLA aborts after minutes.
`NPROC`, which XLA reads when its backend starts, is the size of the pool.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import Mesh

from adapt_pruner_jax.errors import UserError

_COUNT = "--xla_force_host_platform_device_count="


def give_threads() -> None:
  """Sets NPROC for the virtual devices in XLA_FLAGS; call before JAX starts."""
  given = os.environ.get("XLA_FLAGS", "").split()
  counts = [f.removeprefix(_COUNT) for f in given if f.startswith(_COUNT)]
  if counts and counts[-1].isdecimal() and int(counts[-1]) > 1:
    os.environ.setdefault("NPROC", str(_wanted(int(counts[-1]))))


def environment(devices: int) -> dict[str, str]:
  """Variables for a process that is to have so many virtual devices."""
  given = os.environ.get("XLA_FLAGS", "").split()
  others = [flag for flag in given if not flag.startswith(_COUNT)]
  flags = " ".join([*others, f"{_COUNT}{devices}"])
  return {"XLA_FLAGS": flags, "NPROC": str(_wanted(devices))}


def require_threads(mesh: "Mesh") -> None:
  """Raises if collectives of this mesh could wait for ever.

  Raises:
    UserError: several CPU devices of this process hold one array, and there
      are too few threads for them.
  """
  import jax

  every = mesh.devices.flat
  cut = mesh.shape["fsdp"] * mesh.shape["expert"] * mesh.shape["tensor"] > 1
  if not cut or every[0].platform != "cpu":
    return
  mine = [d for d in every if d.process_index == jax.process_index()]
  threads = os.environ.get("NPROC", "")
  have = int(threads) if threads.isdecimal() else cores()
  if len(mine) > 1 and have < 2 * len(mine):
    raise UserError(
      f"{len(mine)} CPU devices with a mesh of fsdp={mesh.shape['fsdp']} "
      f"tensor={mesh.shape['tensor']} hang on {have} threads: set "
      f"NPROC={_wanted(len(mine))} in the environment before JAX starts"
    )


def _wanted(devices: int) -> int:
  return max(16, 2 * devices)


def cores() -> int:
  """How many this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
