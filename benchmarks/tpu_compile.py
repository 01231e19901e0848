"""Compiles a program for TPUs that are not here, and says what it would cost.

  python benchmarks/tpu_compile.py --model=1b --topology=v5e:2x4 --out=FILE.json
  python benchmarks/tpu_compile.py

Without arguments the cells of `CELLS` that benchmarks/tpu_compile.jsonl lacks
are compiled, each in a process of its own, and the table of
docs/accelerators.md is written from all that it has.

The true compiler is an ordinary wheel (`pip install libtpu`, half a gigabyte).
A row has `compile_cpu_s`, CPU seconds of tracing and compiling; `hbm_gb`,
arguments, results and temporaries of a chip; `collective_gb`, what a chip
sends; `step_s`, the compiler's own estimate of cycles over the clock, what
kernels that tell it take at the peaks of arithmetic and memory, and the bytes
sent over a ring, one after the other; and `mfu`, true FLOPs of the whole
model (padding does not count) over what the chips could do in that time. The
last two are null where nothing is claimed. Sizes are what a prune by
a quarter leaves: `adapt`, as recorded from the paper's method on
SmolLM2-135M-Instruct (benchmarks/real_model.jsonl), or `random`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import tpu_programs
from accelerator_models import MODELS, original, pruned
from jax.sharding import Mesh
from tpu_hlo import cost

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import devices
from adapt_pruner_jax.planning import compiling

PROGRAMS = ("train", "distill", "lora", "adapt", "curvature", "refit")
# Minutes of a CPU each; 8B hours, if its layers were not stacked.
CELLS = (
  "--model=1b --topology=v5e:2x4",
  "--model=1b --topology=v5e:2x4 --remat=full",
  "--model=1b --topology=v5e:2x4 --profile=random",
  "--model=8b --topology=v5p:2x2x4 --rows=16",
  "--model=8b --topology=v5p:2x2x4 --rows=16 --remat=full",
  "--model=8b --topology=v5p:2x2x4 --rows=16 --profile=random",
  "--model=8b --topology=v6e:4x4 --rows=16",
  "--program=distill --model=1b --topology=v5e:2x4",
  "--program=lora --model=4b --topology=v5e:2x4",
  "--program=adapt --model=8b --windows=512 --tokens=2048",
  "--program=adapt --model=30b-a3b --topology=v5e:4x4 --rows=16 "
  "--windows=512 --tokens=2048",
  "--program=adapt --model=30b-a3b --topology=v5e:4x4 --rows=16 "
  "--windows=512 --tokens=2048 --expert=16",
  "--model=30b-a3b --topology=v5p:2x2x4 --rows=16 --expert=16 --remat=full "
  "--train_tokens=1e6",
  "--program=curvature --model=8b --tokens=2048",
  "--program=refit --model=8b --tokens=2048",
  "--model=8b --topology=v5e:2x4 --moments=bfloat16",
)
ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "accelerators.md"
BEGIN, END = "<!-- tpu_compile.py: begin -->", "<!-- tpu_compile.py: end -->"


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--program", default="train", choices=[*PROGRAMS])
  parser.add_argument("--model", default="1b", choices=[*MODELS])
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--profile", default="adapt", choices=["adapt", "random"])
  parser.add_argument("--rows", type=int, default=8, help="sequences a step")
  parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
  parser.add_argument(
    "--windows", type=int, default=256, help="of calibration, beside --tokens"
  )
  parser.add_argument("--expert", type=int, default=1, help="as mesh.expert")
  parser.add_argument("--layers", type=int, default=0, help="0 = all")
  parser.add_argument("--remat", default="auto", help="as train.remat")
  parser.add_argument("--moments", default="float32", help="as train.moments")
  parser.add_argument("--scan_layers", default="on", choices=["on", "off"])
  parser.add_argument(
    "--train_tokens",
    type=float,
    default=1e8,
    help="of a stage; what is worth compiling depends on it",
  )
  parser.add_argument(
    "--table", action="store_true", help="write the page from what is there"
  )
  parser.add_argument("--hlo", default="", help="a file for the program")
  parser.add_argument("--out", default="", help="a JSON file; '' = print only")
  return parser.parse_args()


FLAGS = arguments()
# Cycles a second; bytes a second that a chip sends in a ring over one axis,
# and that its memory gives.
CHIPS = {
  "v4": (1.05e9, 9e10, 1.2e12),
  "v5e": (1.5e9, 9e10, 8.19e11),
  "v5p": (1.75e9, 1.8e11, 2.765e12),
  "v6e": (1.75e9, 1.8e11, 1.64e12),
}


def measure(programs: list, topology: str, mesh: Mesh) -> dict:
  """Sums over programs that run so often each; HBM of the largest."""
  hbm, seconds, sent, computations, each = 0.0, [0.0, 0.0], {}, 0, {}
  clock, ring, memory_rate = CHIPS[topology.split(":")[0]]
  peak = devices.peak_flops(mesh.devices.flat[0])
  for name, lower, times in programs:
    begun = time.process_time()
    compiled, text = compile_with_text(lower())
    taken = time.process_time() - begun
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    own = memory.argument_size_in_bytes + memory.temp_size_in_bytes + made
    each[name] = {"compile_cpu_s": taken, "hbm_gb": own / 1e9, "times": times}
    hbm = max(hbm, own)
    if FLAGS.hlo:
      Path(FLAGS.hlo).write_text(text)
    found = cost(text, mesh.size)
    gigabytes = {kind: times * n / 1e9 for kind, n in found.sent.items()}
    kernels = sum(
      n * max(flops / peak, moved / memory_rate)
      for n, flops, moved in found.kernels
    )
    busy = found.cycles / clock + kernels
    each[name] |= {"cycle_s": busy, "kernel_s": kernels, "sent_gb": gigabytes}
    computations += found.computations
    for kind, n in gigabytes.items():
      sent[kind] = sent.get(kind, 0) + n
    seconds[0] += times * busy
    seconds[1] += sum(gigabytes.values()) * 1e9 / ring
  return {
    "hbm_gb": hbm / 1e9,
    "collective_gb": sum(sent.values()),
    "sent_gb": sent,
    "step_s": sum(seconds),
    "compute_s": seconds[0],
    "computations": computations,
    "programs": each,
  }


def compile_with_text(lowered) -> tuple:
  """The compiled program, and its text with the compiler's cycles.

  The text is a dump: `compiled.as_text()` fails for some programs on v5p.
  """
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=dump)
    found = Path(folder).glob("*.after_codegen.txt")
    return compiled, max(found, key=lambda f: f.stat().st_size).read_text()


def compile_one() -> dict:
  """The row of the program that the flags name."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  chips = compiling.devices_of(FLAGS.topology)
  mesh = sharding.make_mesh(devices=chips, expert=FLAGS.expert)
  full = original(FLAGS.model)
  model = pruned(full, FLAGS.profile)
  layers = range(FLAGS.layers or full.num_layers)
  full, model = full.with_layers(layers), model.with_layers(layers)
  begun = time.process_time()
  work = tpu_programs.work(FLAGS, full, model, mesh)
  row = measure(work.programs, FLAGS.topology, mesh)
  row["compile_cpu_s"] = time.process_time() - begun
  row["hbm_gb"] += work.held / 1e9
  row["mfu"] = None
  if work.flops:
    peak = devices.peak_flops(chips[0]) * mesh.size
    row["mfu"] = work.flops / row["step_s"] / peak
  versions = f"jax {jax.__version__}, libtpu {version('libtpu')}"
  return work.facts | row | {"versions": versions}


def stored() -> dict[str, dict]:
  """The rows that there are, by cell; the last of each counts."""
  lines = ROWS.read_text().splitlines() if ROWS.exists() else []
  return {(row := json.loads(line))["cell"]: row for line in lines}


def fill_table() -> None:
  """Compiles what is missing, and writes the page's table."""
  for cell in CELLS:
    if cell in stored():
      continue
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder) / "row.json"
      command = [sys.executable, __file__, *cell.split(), f"--out={out}"]
      subprocess.run(command, check=True)
      row = {"cell": cell} | json.loads(out.read_text())
    with open(ROWS, "a") as rows:
      rows.write(json.dumps(row) + "\n")
    write_table()


def write_table() -> None:
  """Writes the page's table, of the rows that there are."""
  found = stored()
  table = [
    "| flags | runs | padding | recomputed | compile, CPU s | HBM a chip, GB "
    "| sent, GB | step, s | MFU |",
    "|---|---:|---:|---|---:|---:|---:|---:|---:|",
  ]
  cells = [cell for cell in CELLS if cell in found]
  for cell in cells:
    row = found[cell]
    numbers = (
      *runs_of(row),
      f"{row['compile_cpu_s']:.0f}",
      f"{row['hbm_gb']:.2f}",
      *(shown(row[n]) for n in ("collective_gb", "step_s", "mfu")),
    )
    table.append(" | ".join([f"| `{cell}`", *numbers]) + " |")
  versions = ", ".join(sorted({found[cell]["versions"] for cell in cells}))
  before, rest = PAGE.read_text().split(BEGIN)
  middle = "\n".join([*table, "", f"With {versions}."])
  after = rest.split(END)[1]
  PAGE.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}")


def runs_of(row: dict) -> tuple[str, str, str]:
  """Of a train step: its runs, their padding, and what it recomputes."""
  if "runs" not in row:
    return "-", "-", "-"
  return str(len(row["runs"])), f"{row['padding']:.0%}", row["remat"]


def shown(value: float | None) -> str:
  """A number of the table; "-" where the compiler gives none."""
  return "-" if value is None else f"{value:.3g}"


def main() -> None:
  if len(sys.argv) == 1:
    fill_table()
    return
  if FLAGS.table:
    write_table()
    return
  row = vars(FLAGS) | compile_one()
  text = json.dumps(row, indent=2)
  print(text)
  if FLAGS.out:
    Path(FLAGS.out).write_text(text + "\n")


if __name__ == "__main__":
  main()
