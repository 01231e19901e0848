"""Programs compiled for TPUs that are not here, as far as memory is known.

The compiler is an ordinary wheel (`pip install libtpu`) and needs no TPU. Where
it has laid out memory it has done a tenth of its work; generating code, the
rest, is not waited for. It cannot be stopped either, so each phase of a run is
planned in a process of its own, which ends.
"""

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.planning import arrays

# What libtpu asks for, where there is no TPU.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# Names of JAX for slices, by what a device is called in `models.devices`, and
# the slices that are sold, by their devices.
GENERATIONS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5p": "v5p",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "TPU7x",
}
CORES = {"TPU7x": 2}  # devices of a chip
FLAT = ("v5e", "v6e")  # a torus of two dims; others have three
SLICES = {
  True: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  False: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
THREAD = "TPU compiler"
REPORT = "*memory-usage-report.txt"
TOTAL = r"Memory Space: \w+ \(color=0\)[^\n]*\n\s*Total bytes: (\d+)"
# How it says that a program does not fit: by all of it, or by what is beside
# the arguments.
OUT_OF_MEMORY = r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
OUT_BY_TEMPORARIES = r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def slice_of(kind: str, number: int) -> str:
  """The topology of so many devices, such as "v5e:2x4"; "" = none is known."""
  name = GENERATIONS.get(kind, "")
  for shape in SLICES[name in FLAT] if name else ():
    chips = math.prod(map(int, shape.split("x")))
    if number == chips * CORES.get(name, 1):
      return f"{name}:{shape}"
  return ""


def has_compiler() -> bool:
  """Whether libtpu is installed."""
  return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: str) -> Sequence[jax.Device]:
  """Devices of a TPU slice that is not here; they can only be compiled for.

  Raises:
    UserError: no such slice, or libtpu is missing.
  """
  from jax.experimental import topologies

  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(topology, "tpu").devices
  except Exception as error:
    raise UserError(
      f"--topology={topology}: {first_line(error)}; a name is such as "
      "v5e:2x4, and libtpu must be installed (pip install libtpu)"
    ) from error


def temporary(lowered: Lowered, arguments: Any, mesh: Mesh) -> int:
  """Bytes on a device that a program needs beyond its arguments.

  Args:
    lowered: the program.
    arguments: of it, abstract arrays with shardings.
    mesh: that it is for. Of TPUs that are not here no code is waited for, and
      the compiler goes on in a thread until the process ends.
  """
  away = mesh.devices.flat[0].platform == "tpu"
  if not away or jax.default_backend() == "tpu":
    return arrays.temporary(lowered.compile())
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    running = _Compiler(lowered, folder)
    threading.Thread(target=running.run, name=THREAD, daemon=True).start()
    return _beyond(running, Path(folder), arrays.size(arguments))


@dataclasses.dataclass
class _Compiler:
  """A compilation in a thread, and how it ended."""

  lowered: Lowered
  folder: str
  error: Exception | None = None
  done: bool = False

  def run(self) -> None:
    dump = {"xla_dump_to": self.folder, "xla_dump_hlo_as_text": True}
    try:
      self.lowered.compile(compiler_options=dump)
    except Exception as error:
      self.error = error
    self.done = True


def _beyond(running: _Compiler, folder: Path, given: int) -> int:
  """Bytes that the compiler has laid out beyond those of the arguments."""
  code, before = "*after_optimizations_after_buffer_assignment.txt", 0
  while True:
    ended = running.done
    if running.error is not None:
      needed = lacking(str(running.error), given)
      if needed is None:
        raise running.error
      return needed
    reports = [file.read_text() for file in folder.glob(REPORT)]
    totals = [int(m[1]) for text in reports if (m := re.search(TOTAL, text))]
    found = max(totals, default=0)
    if found and (ended or (found == before and any(folder.glob(code)))):
      return max(found - given, 0)
    assert not ended, "the compiler has not told what memory it needs"
    before = found
    time.sleep(0.5)


def lacking(said: str, given: int) -> int | None:
  """Bytes that a program which does not fit needs beyond its arguments.

  Args:
    said: by the compiler, of why it failed.
    given: bytes of the arguments.

  Returns:
    None if it failed by something else.
  """
  if found := re.search(OUT_OF_MEMORY, said):
    return max(_bytes(found) - given, 0)
  found = re.search(OUT_BY_TEMPORARIES, said)
  return _bytes(found) if found else None


def _bytes(found: re.Match) -> int:
  return round(float(found[1]) * UNITS[found[2]])
