"""Measures what one GPU does, the most important first, into one JSON file.

  bash benchmarks/gpu.sh gpu.json

Each part runs in a process of its own, so that one that fails, or takes too
long, hides no other; the file is written anew after each. Weights are random
and bfloat16 is computed in; weights and moments that are trained are float32.
`mfu` is true FLOPs over what the device's data sheet says, `memory_gb` the most
that was in use, `compile_s` what the first call takes beyond a later one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

SECONDS = 480  # for all parts
# By name: the function, its arguments, and the share of the device's memory
# that JAX may take; .17 of an H200 is a card of 24 GB.
PARTS = {
  "kernels": ("kernels", {}, 0.9),
  "train 1b": ("train", {"model": "1b", "rows": 8}, 0.95),
  "train 8b": ("train", {"model": "8b", "rows": 4}, 0.95),
  "prune 1b": ("prune", {"model": "1b"}, 0.95),
  "lora 4b in 24 GB": ("train", {"model": "4b", "rows": 2, "rank": 16}, 0.17),
  "distill 1b": ("train", {"model": "1b", "rows": 8, "alpha": 0.5}, 0.95),
  "prune 8b": ("prune", {"model": "8b"}, 0.95),
  "adapt 1b": ("prune", {"model": "1b", "method": "adapt"}, 0.95),
  "curvature 1b": ("prune", {"model": "1b", "method": "curvature"}, 0.95),
  "adapt 8b": ("prune", {"model": "8b", "method": "adapt"}, 0.95),
  "lora 8b": ("train", {"model": "8b", "rows": 8, "rank": 16}, 0.95),
}
# What --tiny changes, to try the script on a CPU.
TINY = {"model": "tiny", "rows": 2}
TINY_TOKENS, TOKENS = 24, 4096


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="gpu.json", help="the JSON file")
  parser.add_argument("--parts", nargs="*", choices=[*PARTS], help="not all")
  parser.add_argument("--seconds", type=float, default=SECONDS, help="for all")
  parser.add_argument("--tiny", action="store_true", help="small, on a CPU too")
  parser.add_argument("--here", action="store_true", help="in one process")
  parser.add_argument("--one", default="", help="a part, into --out alone")
  return parser.parse_args()


# ---- The parts ---------------------------------------------------------------


def train(
  model: str, rows: int, tokens: int, rank: int = 0, alpha: float = 0.0
) -> dict:
  """Train steps of a model as a prune leaves it.

  Args:
    rows, tokens: of a batch.
    rank: of adapters; 0 = all weights are trained.
    alpha: share of distillation from the model before the prune.
  """
  import jax.numpy as jnp
  import numpy as np
  from accelerator_models import original, pruned

  from adapt_pruner_jax.config import Train
  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.models import flops, model_config
  from adapt_pruner_jax.training import loop, memory, step

  full, mesh = original(model), sharding.one_device()
  small = pruned(full)
  settings = Train(dtype="bfloat16", lora_rank=rank, distill_alpha=alpha)

  half = jnp.bfloat16
  training = loop.start(
    (small, weights(small, half if rank else jnp.float32)),
    settings,
    lambda _: 1e-5,
    mesh,
    teacher=(full, weights(full, half)) if alpha else None,
    tokens=10**8,
  )
  batch = step.batch_of(np.ones((rows, tokens), np.int32))
  needed = flops.training_flops(small, tokens) * (2 / 3 if rank else 1)
  needed += flops.training_flops(full, tokens) / 3 if alpha else 0
  taught = full if alpha else None
  used = memory.with_remat(settings, small, taught, (rows, tokens), mesh)
  step_fn, (trained, state) = training.step_fn, loop.stacked(training, mesh)
  placed = loop.place(batch, mesh)

  def once():
    nonlocal trained, state
    trained, state, metrics = step_fn(trained, state, placed, 0)
    return float(metrics["loss"])

  found = timed(once, 4, needed * rows * tokens)
  runs = len(step_fn.runs) or small.num_layers
  return found | {
    "params": model_config.count_params(small),
    "tokens_per_s": rows * tokens / found["seconds"],
    "remat": used.remat,
    "programs_of_layers": runs,
    "attention": attention_of(small, mesh, rows, tokens),
  }


def prune(model: str, rows: int, tokens: int, method: str = "fisher") -> dict:
  """Pruning steps, and a refit of `o` and `down` by least squares.

  Args:
    rows, tokens: of a minibatch, of which there are eight.
    method: as `prune.method`.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from accelerator_models import original

  from adapt_pruner_jax.config import Prune
  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.pruning import methods
  from adapt_pruner_jax.pruning.task import PruneTask

  config, mesh = original(model), sharding.one_device()
  params = weights(config, jnp.bfloat16)
  rng, shape = np.random.default_rng(0), (8 * rows, tokens)
  draw = lambda _: rng.integers(0, config.vocab_size, shape, np.int32)
  ends = [time.perf_counter()]
  task = PruneTask(
    config,
    params,
    Prune(method=method, max_steps=3, step_size=0.2, refit="final"),
    draw,
    refit_samples=draw,
    batch=rows,
    mesh=mesh,
    log=lambda *_: ends.append(time.perf_counter()),
  )
  made = methods.prune(task)
  steps = np.diff(ends)
  begun = time.perf_counter()
  refitted = methods.refit_after(task, made)
  jax.block_until_ready(refitted.params)
  return {
    "seconds": float(np.median(steps[1:])),
    "compile_s": float(steps[0] - np.median(steps[1:])),
    "refit_s": time.perf_counter() - begun,  # its programs' compilation too
    "calibration_tokens": 8 * rows * tokens,
    "memory_gb": memory_gb(),
  }


def kernels(tiny: bool = False) -> dict:
  """The device's attention against plain attention in float32, by case.

  `error` and `plain_error` are the largest differences from that, of results
  and gradients, over its largest number: of the kernel and of plain attention,
  both in bfloat16.
  """
  length = 130 if tiny else 2049
  cases = {
    "64, packed": {"K": 8, "G": 4, "H": 64},
    "128, packed, window": {"K": 8, "G": 4, "H": 128, "window": length // 3},
    "96, one KV head": {"K": 1, "G": 3, "H": 96},
    "256, packed": {"K": 2, "G": 2, "H": 256},
    "256, one document a row": {"K": 2, "G": 2, "H": 256, "packed": False},
    "128, soft cap": {"K": 2, "G": 2, "H": 128, "softcap": 30.0},
  }
  if tiny:
    cases = dict(list(cases.items())[:1])
  return {name: kernel(length, **case) for name, case in cases.items()}


def kernel(T, K, G, H, window=0, softcap=0.0, packed=True) -> dict:
  """One case of `kernels`, two rows of T tokens."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from adapt_pruner_jax.distributed import sharding
  from adapt_pruner_jax.models import attention
  from adapt_pruner_jax.models.kernels import Kernel

  rng, mesh = np.random.default_rng(0), sharding.one_device()
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  heads = draw(2, T, K, G, H), draw(2, T, K, H), draw(2, T, K, H)
  column = np.arange(T)
  start = np.where(column < T // 3, 0, T // 3) if packed else 0 * column
  document = jnp.asarray(np.tile(1 + (start > 0), (2, 1)), jnp.int32)

  def run(name, dtype):
    inputs = attention.AttentionInputs(
      jnp.asarray(column - start, jnp.int32)[None],
      (),
      document if packed else None,
      kernel=Kernel(name, mesh),
    )
    name = attention.chosen(heads[0].astype(dtype), inputs, window, softcap)

    def total(*heads):
      said = attention.attend(
        *heads, inputs, window, scale=H**-0.5, softcap=softcap
      )
      return jnp.sum(jnp.sin(said.astype(jnp.float32))), said

    fn = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    with jax.default_matmul_precision("float32"):
      (_, said), gradients = fn(*(x.astype(dtype) for x in heads))
    return name, [np.asarray(x, np.float32) for x in (said, *gradients)]

  _, want = run("plain", jnp.float32)
  _, plain = run("plain", jnp.bfloat16)
  taken, got = run("auto", jnp.bfloat16)

  def error(found):
    pairs = zip(found, want, strict=True)
    return max(float(abs(x - y).max() / abs(y).max()) for x, y in pairs)

  found = {"taken": " ".join(taken), "error": error(got)}
  found["plain_error"] = error(plain)
  found["good"] = found["error"] < 2 * found["plain_error"] + 1e-3
  return found


def weights(config, dtype) -> dict:
  """Random weights, parts of one array: a program a shape, and a small one."""
  import jax
  import jax.numpy as jnp

  from adapt_pruner_jax.models import axes, model_config

  shapes = model_config.abstract_params(config, dtype)
  largest = max(x.size for x in jax.tree.leaves(shapes))
  drawn = 0.02 * jax.random.normal(jax.random.key(0), largest, dtype)

  def one(name, _, x):
    if "norm" in name:
      return jnp.ones(x.shape, dtype)
    return drawn[: x.size].reshape(x.shape)

  return axes.map_named(one, shapes)


# ---- Measuring ---------------------------------------------------------------


def timed(once, times: int, flops: float) -> dict:
  """Seconds of a call, the first apart; `once` waits for the device."""
  import jax

  from adapt_pruner_jax.models import devices

  seconds = []
  for _ in range(times + 1):
    begun = time.perf_counter()
    loss = once()
    seconds.append(time.perf_counter() - begun)
  each = statistics.median(seconds[1:])
  peak = devices.peak_flops(jax.devices()[0])
  return {
    "seconds": each,
    "compile_s": seconds[0] - each,
    "mfu": flops / each / peak if peak else None,
    "memory_gb": memory_gb(),
    "loss": loss,
  }


def memory_gb() -> float | None:
  """The most that was in use; None where the device does not say."""
  import jax

  stats = jax.devices()[0].memory_stats() or {}
  most = stats.get("peak_bytes_in_use")
  return most and most / 1e9


def attention_of(config, mesh, rows: int, tokens: int) -> str:
  """The implementation of a train step's attention, and why no other."""
  from adapt_pruner_jax.models import kernels

  args = config, mesh, rows, tokens, "bfloat16", True
  return " ".join(kernels.choose("auto", kernels.case_of_run(*args))).strip()


# ---- Part by part ------------------------------------------------------------


def run_part(name: str, tiny: bool) -> dict:
  """What a part finds, or its error."""
  function, given, _ = PARTS[name]
  begun = time.perf_counter()
  if function == "kernels":
    given = {"tiny": tiny}
  else:
    given = given | {"tokens": TOKENS}
    if function == "prune":
      given |= {"rows": 2, "tokens": 2048}
    if tiny:
      given |= TINY | {"tokens": TINY_TOKENS}
  try:
    found = globals()[function](**given)
  except Exception as error:
    last = f"{type(error).__name__}: {error}"[:2000]
    found = {"error": last, "traceback": traceback.format_exc()[-4000:]}
  found = {"asked": given, "took_s": time.perf_counter() - begun} | found
  return found | what_is_here()


def elsewhere(name: str, tiny: bool, left: float) -> dict:
  """`run_part` in a process of its own, for at most so many seconds."""
  if left < 15:
    return {"error": "no time was left"}
  share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
  environment = os.environ | {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": share or str(PARTS[name][2])
  }
  command = [sys.executable, __file__, f"--one={name}"] + ["--tiny"] * tiny
  begun = time.perf_counter()
  try:
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=left
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not done within {left:.0f} s"}
  try:
    found = json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError):
    return {"error": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
  return found | {"process_s": time.perf_counter() - begun}


def what_is_here() -> dict:
  """The device and the versions."""
  try:
    import jax

    device = jax.devices()[0]
  except Exception as error:
    return {"device": f"none: {error}"}
  return {
    "device": device.device_kind,
    "jax": jax.__version__,
    "backend": device.client.platform_version.splitlines()[0],
  }


def main() -> None:
  flags = arguments()
  if flags.one:
    print(json.dumps(run_part(flags.one, flags.tiny)))
    return
  begun = time.perf_counter()
  names = [name for name in PARTS if name in (flags.parts or PARTS)]
  found: dict = {"parts": {}}
  for name in names:
    left = flags.seconds - (time.perf_counter() - begun)
    if flags.here:
      part = run_part(name, flags.tiny)
    else:
      part = elsewhere(name, flags.tiny, left)
    found["parts"][name] = part
    found["seconds"] = time.perf_counter() - begun
    Path(flags.out).write_text(json.dumps(found, indent=2) + "\n")
    print(name, "FAILED" if "error" in part else "done", flush=True)


if __name__ == "__main__":
  main()
