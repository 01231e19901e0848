"""Compiles a program for TPUs that are not here, and says what it would cost.

  python benchmarks/tpu_compile.py --model=1b --topology=v5e:2x4 --out=FILE.json

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
import importlib.metadata
import json
import os
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--program", default="train", choices=["train"])
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
from tpu_hlo import cost

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import devices, flops
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.training import stacking, step


def pruned(name: str, profile: str, layers: int) -> ModelConfig:
  """A model as a prune leaves it."""
  full = ModelConfig(
    family="llama",
    norm_eps=1e-5,
    rope=Rope(theta=500000.0),
    context=131072,
    **MODELS[name],
  )
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
  return full.with_units(units).with_layers(range(layers or number))


def recipe() -> Config:
  """How it is trained."""
  config = Config()
  config.data.batch, config.data.seq_len = FLAGS.rows, FLAGS.tokens
  config.train.dtype, config.train.remat = "bfloat16", True
  config.train.scan_layers = FLAGS.scan_layers
  return config


def lower_train(config: Config, model: ModelConfig, mesh: Mesh) -> tuple:
  """The train step, lowered, and its runs of layers."""
  settings = config.train
  runs = stacking.choose(model, settings, mesh, int(FLAGS.train_tokens))
  trained, state = step.abstract_state(model, settings, mesh, 0, runs)
  batch = step.abstract_batch(FLAGS.rows, FLAGS.tokens, mesh)
  made = step.make_step(model, settings, lambda _: 1.0, mesh, runs=runs)
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


def main() -> None:
  described = topologies.get_topology_desc(FLAGS.topology, platform="tpu")
  mesh = sharding.make_mesh(devices=described.devices)
  model = pruned(FLAGS.model, FLAGS.profile, FLAGS.layers)
  jax.config.update("jax_enable_compilation_cache", False)
  begun = time.process_time()
  lowered, runs = lower_train(recipe(), model, mesh)
  compiled = lowered.compile()
  row = vars(FLAGS) | {
    "compile_cpu_s": time.process_time() - begun,
    "runs": [run._asdict() for run in runs],
    "jax": jax.__version__,
    "libtpu": importlib.metadata.version("libtpu"),
  }
  tokens = FLAGS.rows * FLAGS.tokens
  needed = flops.training_flops(model, FLAGS.tokens) * tokens
  row |= measure(compiled, FLAGS.topology, mesh.size, needed)
  text = json.dumps(row, indent=2)
  print(text)
  if FLAGS.out:
    Path(FLAGS.out).write_text(text + "\n")


if __name__ == "__main__":
  main()
