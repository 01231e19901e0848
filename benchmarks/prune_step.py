"""Times one scoring step against two PyTorch peers, on the same weights.

  python benchmarks/prune_step.py --width=512 --layers=8 --ffn=1376
  python benchmarks/prune_step.py --stage=4 ...   # a whole stage, with compile

The peers were written for this purpose:
  all    the authors' amount of work: a pass for the layer importances, another
         for the gradients, of all parameters
  lean   one pass, gradients of the scored matrices only
All alternate in one process on --threads cores. Times are CPU seconds, medians
over --rounds, compiling apart: on a shared machine wall time says little.
Memory is beside the weights and the inputs: of JAX the temporary memory that
XLA plans, of PyTorch what autograd saves for one minibatch and the gradients.
"""

import argparse
import os
import statistics
import time

import peer_model


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  sizes = {
    "layers": 8,
    "width": 512,
    "ffn": 1376,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "vocab": 8192,
    "samples": 16,
    "batch": 8,
    "tokens": 64,
    "threads": 1,
    "rounds": 5,
    "stage": 0,
  }
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument(
    "--dtype", default="float32", choices=["float32", "bfloat16"]
  )
  return parser.parse_args()


FLAGS = arguments()
# Before jax and torch start their threads.
peer_model.use_cores(FLAGS.threads)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from prune_step_peer import SCORED, Peer

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import (
  placement,
  sharding,
)
from adapt_pruner_jax.models import (
  axes,
  decoder,
)
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  count_params,
  unit_cost,
)
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import (
  methods,
  surgery,
)
from adapt_pruner_jax.pruning.scores import measure_step
from adapt_pruner_jax.pruning.task import PruneTask

torch.set_num_threads(FLAGS.threads)


def model_config() -> ModelConfig:
  f = FLAGS
  return ModelConfig(
    family="llama",
    vocab_size=f.vocab,
    hidden_size=f.width,
    queries_per_group=f.heads // f.kv_heads,
    head_dim=f.head_dim,
    kv_groups=(f.kv_heads,) * f.layers,
    ffn_widths=(f.ffn,) * f.layers,
    norm_eps=1e-5,
    rope=Rope(),
    context=2048,
    tied=False,
  )


# ---- Ours --------------------------------------------------------------------


class Ours:
  """The compiled step, on one device."""

  def __init__(self, params: axes.Params, config: ModelConfig):
    self.config, self.mesh = (
      config,
      sharding.make_mesh(devices=jax.devices()[:1]),
    )
    everything = surgery.everything(config)
    self.stacked = surgery.expand(config, params, everything, config, self.mesh)
    masks = surgery.to_masks(everything, config)
    self.masks = placement.replicate(masks, self.mesh)
    self.options = {"kind": "taylor", "measure": "cosine", "mesh": self.mesh}

  def compile(self, samples: np.ndarray) -> None:
    self.compiled = measure_step.lower(
      self.config, self.stacked, self.masks, *self.data(samples), **self.options
    ).compile()

  def data(self, samples):
    return placement.minibatches(samples, FLAGS.batch, self.mesh)

  def step(self, samples: np.ndarray):
    found = self.compiled(self.stacked, self.masks, *self.data(samples))
    found = jax.device_get(found)
    per_layer = lambda i: {
      n: s[i].reshape(-1) for n, s in found["salience"].items()
    }
    scores = [per_layer(i) for i in range(self.config.num_layers)]
    return scores, found["importance_ML"].sum(0)

  def memory(self) -> int:
    return self.compiled.memory_analysis().temp_size_in_bytes


def peer(params: axes.Params, config: ModelConfig, lean: bool) -> Peer:
  """A peer of the sizes that were asked for."""
  return Peer(params, config, lean, FLAGS.batch, FLAGS.tokens, FLAGS.dtype)


# ---- Measurements ------------------------------------------------------------


def cpu_seconds(fn, *args) -> float:
  start = time.process_time()
  fn(*args)
  return time.process_time() - start


def useful_flops(config: ModelConfig) -> float:
  """Of the lean step: forward, gradients of inputs and of scored matrices."""
  c = config
  cost = unit_cost(c)
  scored = sum(c.kv_groups) * cost["K"] + sum(c.ffn_widths) * cost["F"]
  attention = (
    4 * FLAGS.tokens * c.queries_per_group * c.head_dim * sum(c.kv_groups) / 2
  )  # causal: half
  per_token = 6 * scored + 4 * c.hidden_size * c.vocab_size + 3 * attention
  return per_token * FLAGS.samples * FLAGS.tokens


def matmul_peak(rounds: int) -> float:
  """FLOP/s of a large matrix product, the better of the two libraries."""
  n = 1024
  a = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
  t = torch.tensor(a).to(getattr(torch, FLAGS.dtype))
  j = jnp.asarray(a, FLAGS.dtype)
  product = jax.jit(jnp.matmul).lower(j, j).compile()
  times = []
  for _ in range(max(rounds, 3)):
    times.append(cpu_seconds(torch.matmul, t, t))
    times.append(cpu_seconds(lambda: product(j, j).block_until_ready()))
  return 2 * n**3 / min(times)


def largest_difference(ours, theirs) -> float:
  """Of all scores, relative to the largest of its matrix."""
  worst = 0.0
  for one, other in zip(ours[0], theirs[0], strict=True):
    for name in SCORED:
      want = other[name].numpy()
      worst = max(worst, np.abs(one[name] - want).max() / np.abs(want).max())
  return worst


def compare_steps(params: axes.Params, config: ModelConfig) -> None:
  rng = np.random.default_rng(0)
  shape = (FLAGS.samples, FLAGS.tokens)
  samples = rng.integers(0, config.vocab_size, shape).astype(np.int32)
  ours = Ours(params, config)
  compile_seconds = cpu_seconds(ours.compile, samples)
  peers = {"all": peer(params, config, False)}
  peers["lean"] = peer(params, config, True)
  runs = {"ours": ours} | peers
  found = {name: run.step(samples) for name, run in runs.items()}  # warm up
  times = {name: [] for name in runs}
  peaks = []
  for _ in range(FLAGS.rounds):
    peaks.append(matmul_peak(3))
    for name, run in runs.items():
      times[name].append(cpu_seconds(run.step, samples))
  peak = max(peaks)
  flops = useful_flops(config)
  median = {name: statistics.median(t) for name, t in times.items()}
  memory = {n: p.memory(samples) for n, p in peers.items()}
  memory["ours"] = ours.memory()
  print(
    f"matmul peak {peak / 1e9:.1f} GFLOP/s; useful work "
    f"{flops / 1e9:.1f} GFLOP a step; compile {compile_seconds:.1f} CPU s"
  )
  print(f"{'':6}{'CPU s':>8}{'spread':>16}{'of peak':>9}{'MiB':>8}")
  for name in runs:
    spread = f"{min(times[name]):.2f}-{max(times[name]):.2f}"
    print(
      f"{name:6}{median[name]:8.2f}{spread:>16}"
      f"{flops / median[name] / peak:9.0%}{memory[name] / 2**20:8.0f}"
    )
  ratios = {n: median["ours"] / median[n] for n in peers}
  print(
    f"ours / all {ratios['all']:.2f} (goal 0.75), "
    f"ours / lean {ratios['lean']:.2f} (goal 1.00); largest difference of a "
    f"score {largest_difference(found['ours'], found['lean']):.1e}"
  )


def compare_stages(params: axes.Params, config: ModelConfig) -> None:
  """A stage of some steps, from the first compile to the smaller model."""
  rng = np.random.default_rng(0)
  shape = (FLAGS.stage, FLAGS.samples, FLAGS.tokens)
  samples = rng.integers(0, config.vocab_size, shape).astype(np.int32)
  recipe = Prune(amplitude=0.0, max_steps=FLAGS.stage)

  def ours():
    draw = lambda step: samples[step]
    methods.prune(PruneTask(config, params, recipe, draw, batch=FLAGS.batch))

  def theirs(lean):
    other = peer(params, config, lean)
    for step in range(FLAGS.stage):
      scores, _ = other.step(samples[step])
      other.prune(scores, recipe.step_size)

  seconds = {
    "ours": cpu_seconds(ours),
    "all": cpu_seconds(theirs, False),
    "lean": cpu_seconds(theirs, True),
  }
  for name, value in seconds.items():
    print(f"{name:6}{value:8.1f} CPU s for {FLAGS.stage} steps")
  print(
    f"ours / all {seconds['ours'] / seconds['all']:.2f} (goal 1.00), "
    f"ours / lean {seconds['ours'] / seconds['lean']:.2f}"
  )


def main() -> None:
  config = model_config()
  params = decoder.init_params(
    config, jax.random.key(0), jnp.dtype(FLAGS.dtype)
  )
  print(
    f"{count_params(config) / 1e6:.1f}M parameters, {FLAGS.layers} "
    f"layers, {FLAGS.samples} x {FLAGS.tokens} tokens in minibatches of "
    f"{FLAGS.batch}, {FLAGS.dtype}, {FLAGS.threads} thread(s)"
  )
  if FLAGS.stage:
    compare_stages(params, config)
  else:
    compare_steps(params, config)


if __name__ == "__main__":
  main()
