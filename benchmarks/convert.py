"""Times HF -> sharded arrays -> HF beside PyTorch + Transformers.

  python benchmarks/convert.py --width=1536 --layers=14 --vocab=32000

A random bfloat16 LLaMA of about 1 GB is written once. Then each side, in a
process of its own, opens it and writes it to another directory, `--rounds`
times in turn: `load` and `save` here, `from_pretrained` and `save_pretrained`
there; "files" is `adapt-pruner convert`, which goes from file to file. Imports
count neither for time nor for memory: what is reported is wall and CPU seconds
after them, and by how many GB resident memory grew. Ours also hashes what it
writes, opens it again and compares every parameter, which takes a share of its
time that is given apart.

Resident are the memory that a process has to itself and the pages of mapped
files. The peak of the sum is compared, and that of the first is given apart:
Transformers' arrays are the pages of the mapped file themselves unless --dtype
asks for another type than the file's, ours are always in memory of their own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

UNITS = {"peak": 1e9, "own": 1e9}  # of what is not in seconds
SIDES = ("ours", "files", "transformers")


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  sizes = {
    "layers": 14,
    "width": 1536,
    "ffn": 4096,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 32000,
    "devices": 1,
    "rounds": 3,
  }
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument(
    "--max_shard", type=int, default=0, help="bytes of a file"
  )
  parser.add_argument(
    "--dtype", choices=["bfloat16", "float32"], default="bfloat16"
  )
  parser.add_argument("--folder", default="", help="default a temporary one")
  parser.add_argument("--side", choices=["", *SIDES], default="")
  return parser.parse_args()


def make(flags: argparse.Namespace, path: Path) -> None:
  """The model, as published ones are: bfloat16 safetensors."""
  import jax.numpy as jnp
  import numpy as np

  from adapt_pruner_jax.formats.hf import save
  from adapt_pruner_jax.models import axes, model_config
  from adapt_pruner_jax.models.rope import Rope

  config = model_config.ModelConfig(
    family="llama",
    vocab_size=flags.vocab,
    hidden_size=flags.width,
    queries_per_group=flags.heads // flags.kv_heads,
    head_dim=flags.width // flags.heads,
    kv_groups=(flags.kv_heads,) * flags.layers,
    ffn_widths=(flags.ffn,) * flags.layers,
    norm_eps=1e-5,
    rope=Rope(),
    context=2048,
    tied=False,
  )
  rng = np.random.default_rng(0)

  def draw(name, _, leaf):
    drawn = rng.standard_normal(leaf.shape, np.float32)
    return (drawn * 0.02 + ("norm" in name)).astype(leaf.dtype)

  abstract = model_config.abstract_params(config, jnp.bfloat16)
  params = axes.map_named(draw, abstract)
  shard = {"shard_bytes": flags.max_shard} if flags.max_shard else {}
  save.save(config, params, path, say=lambda _: None, **shard)
  gigabytes = model_config.count_params(config) * 2 / 1e9
  print(f"model: {gigabytes:.2f} GB in bfloat16", flush=True)


class Peak:
  """By how much resident memory grew while it was open, in bytes.

  Attributes:
    peak: of all of it, as the kernel counts it.
    own: of that which is not a file's.
  """

  def __enter__(self):
    self.peak = self.own = 0
    self._before = self._now()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.wait(0.005):
      grown = [x - y for x, y in zip(self._now(), self._before, strict=True)]
      self.peak = max(self.peak, sum(grown))
      self.own = max(self.own, grown[0])

  @staticmethod
  def _now() -> tuple[int, int]:
    pages = Path("/proc/self/statm").read_text().split()
    size = resource.getpagesize()
    resident, of_files = int(pages[1]) * size, int(pages[2]) * size
    return resident - of_files, of_files

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()


def ours(source: Path, out: Path, flags: argparse.Namespace) -> dict:
  import jax

  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.formats.hf import load, reopen, save

  mesh = sharding.make_mesh(1, flags.devices, 1)
  share = {}
  compare = reopen.compare

  def timed(*args):
    start, cpu = time.perf_counter(), time.process_time()
    compare(*args)
    share["compare"] = time.perf_counter() - start
    share["compare_cpu"] = time.process_time() - cpu

  reopen.compare = timed
  with measured() as result:
    config, params = load.load(source, flags.dtype, mesh)
    jax.block_until_ready(params)
    result["load"] = time.perf_counter() - result["start"]
    save.save(config, params, out, source=source, say=lambda _: None)
  return result | share


def files(source: Path, out: Path, flags: argparse.Namespace) -> dict:
  from adapt_pruner_jax.formats import convert

  with measured() as result:
    convert.convert(str(source), out, "hf", dtype=flags.dtype)
  return result


def transformers(source: Path, out: Path, flags: argparse.Namespace) -> dict:
  import torch
  from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

  with measured() as result:
    dtype = getattr(torch, flags.dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    result["load"] = time.perf_counter() - result["start"]
    model.save_pretrained(out)
  return result


class measured:
  """Wall and CPU seconds, and memory, of what is inside."""

  def __enter__(self):
    self.memory = Peak().__enter__()
    self.cpu = time.process_time()
    self.result = {"start": time.perf_counter()}
    return self.result

  def __exit__(self, *error):
    start = self.result.pop("start")
    self.result["seconds"] = time.perf_counter() - start
    self.result["cpu"] = time.process_time() - self.cpu
    self.memory.__exit__(*error)
    self.result["peak"] = self.memory.peak
    self.result["own"] = self.memory.own


def measure_all(flags: argparse.Namespace, folder: Path) -> None:
  source = folder / "model"
  env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
  devices = f" --xla_force_host_platform_device_count={flags.devices}"
  env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + devices
  root = Path(__file__).resolve().parent.parent
  env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
  found: dict[str, list[dict]] = {side: [] for side in SIDES}
  for _ in range(flags.rounds):
    for side in SIDES:
      with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
        command += [f"--folder={out}"]
        done = subprocess.run(
          [*command], env=env | {"SOURCE": str(source)}, stdout=subprocess.PIPE
        )
      if done.returncode:
        sys.exit(f"{side} failed")
      found[side].append(json.loads(done.stdout.splitlines()[-1]))
  middle = {
    side: {n: statistics.median(r[n] for r in rows) for n in rows[0]}
    for side, rows in found.items()
  }
  for side, row in middle.items():
    print(
      f"{side:>12}: "
      + ", ".join(
        f"{name} {row[name] / UNITS.get(name, 1):.2f}" for name in row
      )
    )
  two = middle.pop("transformers")
  for side, one in middle.items():
    print(
      f"{side} / transformers: time {one['seconds'] / two['seconds']:.2f}, "
      f"CPU {one['cpu'] / two['cpu']:.2f}, "
      f"peak memory {one['peak'] / two['peak']:.2f}"
    )


def main() -> None:
  flags = arguments()
  if flags.side:
    sides = {"ours": ours, "files": files, "transformers": transformers}
    side = sides[flags.side]
    out = Path(flags.folder) / "out"
    print(json.dumps(side(Path(os.environ["SOURCE"]), out, flags)))
    return
  with tempfile.TemporaryDirectory(dir=flags.folder or None) as folder:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    make(flags, Path(folder) / "model")
    measure_all(flags, Path(folder))


if __name__ == "__main__":
  main()
