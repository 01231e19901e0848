"""Compiles a program for TPUs that are not here, and says what it would cost.

  python benchmarks/tpu_compile.py --model=1b --topology=v5e:2x4 --out=FILE.json
  python benchmarks/tpu_compile.py

Without arguments the cells of `CELLS` that benchmarks/tpu_compile.jsonl lacks
are compiled, each in a process of its own, and the table of
docs/accelerators.md is written from all that it has.

The true compiler is an ordinary wheel (`pip install libtpu`, half a gigabyte).
A row has `compile_cpu_s`, CPU seconds of tracing and compiling; `hbm_gb`,
arguments, results and temporaries of a chip; `collective_gb`, what a chip
sends; `step_s`, the compiler's own estimate of cycles over the clock and the
bytes sent over a ring, one after the other; and `mfu`, true FLOPs of the whole
model (padding does not count) over what the chips could do in that time. The
last two are null where the compiler gives no cycles. Sizes are what a prune by
a quarter leaves: `adapt`, as recorded from the paper's method on
SmolLM2-135M-Instruct (benchmarks/real_model.jsonl), or `random`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

PROGRAMS = ("train", "distill", "lora")
# Minutes of a CPU each; 8B hours, if its layers were not stacked.
CELLS = (
  "--model=1b --topology=v5e:2x4",
  "--model=1b --topology=v5e:2x4 --profile=random",
  "--model=8b --topology=v5p:2x2x4 --rows=16",
  "--model=8b --topology=v5p:2x2x4 --rows=16 --profile=random",
  "--model=8b --topology=v6e:4x4 --rows=16",
  "--program=distill --model=1b --topology=v5e:2x4",
  "--program=lora --model=4b --topology=v5e:2x4",
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
  parser.add_argument("--layers", type=int, default=0, help="0 = all")
  parser.add_argument("--scan_layers", default="on", choices=["on", "off"])
  parser.add_argument(
    "--train_tokens",
    type=float,
    default=1e8,
    help="of a stage; what is worth compiling depends on it",
  )
  parser.add_argument("--hlo", default="", help="a file for the program")
  parser.add_argument("--out", default="", help="a JSON file; '' = print only")
  return parser.parse_args()


# Llama-3.2-1B, Qwen3-4B and Llama-3.1-8B.
MODELS = {
  "1b": {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "queries_per_group": 4,
    "head_dim": 64,
    "kv_groups": (8,) * 16,
    "ffn_widths": (8192,) * 16,
    "tied": True,
  },
  "4b": {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "queries_per_group": 4,
    "head_dim": 128,
    "kv_groups": (8,) * 36,
    "ffn_widths": (9728,) * 36,
    "tied": True,
    "qk_norm": "head",
  },
  "8b": {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "queries_per_group": 4,
    "head_dim": 128,
    "kv_groups": (8,) * 32,
    "ffn_widths": (14336,) * 32,
    "tied": False,
  },
}
# Shares of a layer's KV groups and channels that are left.
ADAPT_KV = (1, 1, *(2 / 3,) * 5, *(1,) * 23)
ADAPT_FFN = tuple(
  width / 1536
  for width in (
    *(1536, 1093, 1021, 1017, 1019, 1018, 1019, 1019, 1022, 1019),
    *(1023, 1022, 1015, 1014, 1013, 1016, 1017, 1013, 1020, 1023),
    *(1028, 1024, 1025, 1030, 1087, 1014, 1015, 1026, 1028, 1128),
  )
)
# Cycles a second; bytes a second that a chip sends in a ring over one axis.
CHIPS = {
  "v4": (1.05e9, 9e10),
  "v5e": (1.5e9, 9e10),
  "v5p": (1.75e9, 1.8e11),
  "v6e": (1.75e9, 1.8e11),
}

FLAGS = arguments()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Lowered
from tpu_hlo import cost

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import devices, flops, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.training import stacking, step


def original(name: str) -> ModelConfig:
  """A model before pruning."""
  return ModelConfig(
    family="llama",
    norm_eps=1e-5,
    rope=Rope(theta=500000.0),
    context=131072,
    **MODELS[name],
  )


def pruned(full: ModelConfig, profile: str) -> ModelConfig:
  """A model as a prune leaves it."""
  number = full.num_layers
  if profile == "random":
    rng = np.random.default_rng(0)
    shares = [rng.uniform(0.5, 1, number) for _ in "KF"]
  else:
    at = np.linspace(0, len(ADAPT_FFN) - 1, number).round().astype(int)
    shares = [np.array(s)[at] for s in (ADAPT_KV, ADAPT_FFN)]
  units = {
    unit: tuple(max(1, int(n * s)) for n, s in zip(widths, share, strict=True))
    for (unit, widths), share in zip(full.units().items(), shares, strict=True)
  }
  return full.with_units(units)


def recipe() -> Train:
  """How it is trained."""
  return Train(
    dtype="bfloat16",
    remat=True,
    scan_layers=FLAGS.scan_layers,
    distill_alpha=0.5 if FLAGS.program == "distill" else 0.0,
    lora_rank=16 if FLAGS.program == "lora" else 0,
  )


def lower(
  settings: Train, model: ModelConfig, full: ModelConfig, mesh: Mesh
) -> tuple[Lowered, stacking.Runs]:
  """A train step, lowered, and its runs of layers.

  Args:
    full: the teacher's sizes.
  """
  runs = stacking.choose(model, settings, mesh, int(FLAGS.train_tokens))
  params = partial(step.abstract_state, settings=settings, mesh=mesh)
  rank, base, teacher = settings.lora_rank, None, None
  if rank:
    base, _ = params(model, rank=0, runs=runs)
  if settings.distill_alpha:
    whole = stacking.choose(full, settings, mesh)
    taught, _ = params(full, rank=0, runs=whole)
    half = lambda x: jax.ShapeDtypeStruct(
      x.shape, settings.dtype, sharding=x.sharding
    )
    teacher = full, jax.tree.map(half, taught)
  trained, state = params(model, rank=rank, runs=runs)
  batch = step.abstract_batch(FLAGS.rows, FLAGS.tokens, mesh)
  given = model, settings, lambda _: 1.0, mesh
  made = step.make_step(*given, base=base, teacher=teacher, runs=runs)
  return made.lower(trained, state, batch), runs


def measure(compiled, topology: str, chips: int, true_flops: float) -> dict:
  """The row of a compiled program."""
  memory = compiled.memory_analysis()
  made = memory.output_size_in_bytes - memory.alias_size_in_bytes
  hbm = memory.argument_size_in_bytes + memory.temp_size_in_bytes + made
  row = {"hbm_gb": hbm / 1e9, "collective_gb": None, "step_s": None}
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:  # on v5p: no text of some
    return row | {"mfu": None, "no_text": str(error).splitlines()[0][:80]}
  if FLAGS.hlo:
    Path(FLAGS.hlo).write_text(text)
  found = cost(text, chips)
  clock, ring = CHIPS[topology.split(":")[0]]
  sent = sum(found.sent.values())
  seconds = found.cycles / clock + sent / ring
  kind = topologies.get_topology_desc(topology, platform="tpu").devices[0]
  peak = devices.peak_flops(kind) * chips
  return row | {
    "collective_gb": sent / 1e9,
    "sent_gb": {kind: n / 1e9 for kind, n in found.sent.items()},
    "step_s": seconds,
    "compute_s": found.cycles / clock,
    "mfu": true_flops / seconds / peak,
    "computations": found.computations,
  }


def compile_one() -> dict:
  """The row of the program that the flags name."""
  described = topologies.get_topology_desc(FLAGS.topology, platform="tpu")
  mesh = sharding.make_mesh(devices=described.devices)
  full = original(FLAGS.model)
  model = pruned(full, FLAGS.profile)
  layers = range(FLAGS.layers or full.num_layers)
  full, model = full.with_layers(layers), model.with_layers(layers)
  jax.config.update("jax_enable_compilation_cache", False)
  begun = time.process_time()
  lowered, runs = lower(recipe(), model, full, mesh)
  compiled = lowered.compile()
  row = {
    "compile_cpu_s": time.process_time() - begun,
    "runs": [run._asdict() for run in runs],
    "padding": padding(model, runs),
    "versions": f"jax {jax.__version__}, libtpu {version('libtpu')}",
  }
  tokens = FLAGS.rows * FLAGS.tokens
  needed = flops.training_flops(model, FLAGS.tokens) * tokens
  if FLAGS.program == "distill":  # the teacher's forward
    needed += flops.training_flops(full, FLAGS.tokens) / 3 * tokens
  return row | measure(compiled, FLAGS.topology, mesh.size, needed)


def padding(model: ModelConfig, runs: stacking.Runs) -> float:
  """Share of the layers' parameters that only pads."""
  count = model_config.count_params
  units = {"K": list(model.kv_groups), "F": list(model.ffn_widths)}
  for run in runs:
    for unit, size in zip("KF", run[2:], strict=True):
      units[unit][run.first : run.end] = [size] * (run.end - run.first)
  padded = model.with_units({u: tuple(n) for u, n in units.items()})
  inside = count(padded) - count(model.with_layers(()))
  return (count(padded) - count(model)) / inside


def fill_table() -> None:
  """Compiles what is missing, and writes the page's table."""
  found = {}
  if ROWS.exists():
    for line in ROWS.read_text().splitlines():
      found |= {(row := json.loads(line))["cell"]: row}
  for cell in CELLS:
    if cell in found:
      continue
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder) / "row.json"
      command = [sys.executable, __file__, *cell.split(), f"--out={out}"]
      subprocess.run(command, check=True)
      found[cell] = {"cell": cell} | json.loads(out.read_text())
    with open(ROWS, "a") as rows:
      rows.write(json.dumps(found[cell]) + "\n")
  table = [
    "| flags | runs | padding | compile, CPU s | HBM a chip, GB | sent, GB | "
    "step, s | MFU |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
  ]
  for cell in CELLS:
    row = found[cell]
    numbers = (
      len(row["runs"]),
      f"{row['padding']:.0%}",
      f"{row['compile_cpu_s']:.0f}",
      f"{row['hbm_gb']:.2f}",
      *(shown(row[n]) for n in ("collective_gb", "step_s", "mfu")),
    )
    table.append(" | ".join([f"| `{cell}`", *map(str, numbers)]) + " |")
  versions = ", ".join(sorted({row["versions"] for row in found.values()}))
  before, rest = PAGE.read_text().split(BEGIN)
  middle = "\n".join([*table, "", f"With {versions}."])
  after = rest.split(END)[1]
  PAGE.write_text(f"{before}{BEGIN}\n\n{middle}\n\n{END}{after}")


def shown(value: float | None) -> str:
  """A number of the table; "-" where the compiler gives none."""
  return "-" if value is None else f"{value:.3g}"


def main() -> None:
  if len(sys.argv) == 1:
    fill_table()
    return
  row = vars(FLAGS) | compile_one()
  text = json.dumps(row, indent=2)
  print(text)
  if FLAGS.out:
    Path(FLAGS.out).write_text(text + "\n")


if __name__ == "__main__":
  main()
