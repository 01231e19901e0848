"""Times a recovery step beside PyTorch + Transformers on one pruned model.

  python benchmarks/train_step.py --layers=4 --width=256 --batch=4 --tokens=256

The model has unequal layers, as after a prune: `hf.save` writes it and
Transformers opens that, with AdamW, clipping and the same batch, dtype and
device. Both alternate in one process, compiling apart. On a CPU times are CPU
seconds of --threads cores, since on a shared machine wall time says little; on
an accelerator (--device=gpu) they are wall seconds, and --torch_compile also
compiles PyTorch's side.
"""

import argparse
import os
import statistics
import tempfile
import time

import peer_model


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  sizes = peer_model.SIZES | {
    "batch": 4,
    "tokens": 256,
    "threads": 1,
    "rounds": 5,
  }
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
  parser.add_argument(
    "--dtype", default="float32", choices=["float32", "bfloat16"]
  )
  parser.add_argument("--remat", action="store_true")
  parser.add_argument("--torch_compile", action="store_true")
  return parser.parse_args()


FLAGS = arguments()
CPU = FLAGS.device == "cpu"
if CPU:  # before jax and torch start their threads
  peer_model.use_cores(FLAGS.threads)
  os.environ["JAX_PLATFORMS"] = "cpu"
else:  # two libraries share the card's memory
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import torch

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.models import (
  decoder,
  devices,
  flops,
  model_config,
)
from adapt_pruner_jax.training import (
  loop,
  optimizer,
)
from adapt_pruner_jax.training.step import (
  init_optimizer,
  make_step,
)

LEARNING_RATE = 1e-4


class Ours:
  """`train.make_step` on one device."""

  def __init__(
    self, config: model_config.ModelConfig, params, tokens_BS: np.ndarray
  ):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    settings = Train(dtype=FLAGS.dtype, remat="full" if FLAGS.remat else "none")
    constant = lambda step: LEARNING_RATE
    self.run = make_step(config, settings, constant, mesh)
    placed = sharding.param_shardings(params, mesh)
    self.params = jax.device_put(params, placed)
    self.state = init_optimizer(self.params, settings, mesh)
    ones = np.ones((FLAGS.batch, FLAGS.tokens), np.int32)
    batch = {
      "tokens_BT": tokens_BS[:, :-1],
      "targets_BT": tokens_BS[:, 1:],
      "segments_BT": ones,
      "positions_BT": np.cumsum(ones, axis=1) - 1,
      "weights_BT": ones.astype(np.float32),
    }
    self.batch = loop.place(batch, mesh)

  def step(self) -> float:
    self.params, self.state, metrics = self.run(
      self.params, self.state, self.batch, 0
    )
    return float(metrics["loss"])


class Transformers:
  """The exported model in PyTorch, float32 weights and moments."""

  def __init__(self, folder: str, tokens_BS: np.ndarray):
    from transformers import AutoModelForCausalLM

    self.device = "cpu" if CPU else "cuda"
    model_ = AutoModelForCausalLM.from_pretrained(
      folder, trust_remote_code=True, dtype=torch.float32
    )
    self.model = model_.to(self.device).train()
    if FLAGS.remat:
      self.model.gradient_checkpointing_enable()
    self.forward = self.model
    if FLAGS.torch_compile:
      self.forward = torch.compile(self.model)
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=LEARNING_RATE,
      betas=(optimizer.B1, optimizer.B2),
      weight_decay=0.0,
      fused=True,
    )
    tokens = torch.tensor(tokens_BS, dtype=torch.long, device=self.device)
    self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]

  def step(self) -> float:
    low = FLAGS.dtype == "bfloat16"
    with torch.autocast(self.device, dtype=torch.bfloat16, enabled=low):
      logits = self.forward(self.inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), self.targets.flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimizer.CLIP_NORM)
    self.optimizer.step()
    self.optimizer.zero_grad()
    return loss.item()  # waits for the device


def seconds(fn) -> tuple[float, float]:
  """CPU or wall seconds of a call, and what it returned."""
  clock = time.process_time if CPU else time.perf_counter
  start = clock()
  result = fn()
  return clock() - start, result


def step_flops(config: model_config.ModelConfig) -> float:
  """Forward and twice that backward; what remat repeats does not count."""
  one = flops.training_flops(config, FLAGS.tokens)
  return one * FLAGS.batch * FLAGS.tokens


def peak_flops() -> float:
  """Of the card; of a CPU what a large matrix product reaches."""
  if not CPU:
    return devices.peak_flops(jax.devices()[0])
  a = torch.randn(1024, 1024).to(getattr(torch, FLAGS.dtype))
  return 2 * 1024**3 / min(seconds(lambda: a @ a)[0] for _ in range(9))


def main() -> None:
  config = peer_model.pruned_config(FLAGS, FLAGS.tokens)
  params = jax.device_get(decoder.init_params(config, jax.random.key(0)))
  shape = (FLAGS.batch, FLAGS.tokens + 1)
  tokens_BS = np.random.default_rng(0).integers(0, config.vocab_size, shape)
  with tempfile.TemporaryDirectory() as folder:
    save.save(config, params, f"{folder}/model", say=lambda line: None)
    theirs = Transformers(f"{folder}/model", tokens_BS.astype(np.int32))
  ours = Ours(config, params, tokens_BS.astype(np.int32))
  runs = {"ours": ours, "torch": theirs}
  first = {name: seconds(run.step) for name, run in runs.items()}
  times, peaks = {name: [] for name in runs}, []
  for _ in range(FLAGS.rounds):
    peaks.append(peak_flops())
    for name, run in runs.items():
      times[name].append(seconds(run.step)[0])
  tokens, flops, peak = (
    FLAGS.batch * FLAGS.tokens,
    step_flops(config),
    max(peaks),
  )
  kind = "CPU s" if CPU else "s"
  size = model_config.count_params(config)
  print(
    f"{size / 1e6:.1f}M parameters, {FLAGS.batch} x "
    f"{FLAGS.tokens} tokens, {FLAGS.dtype}, {FLAGS.device}; peak "
    f"{peak / 1e9:.0f} GFLOP/s; first losses {first['ours'][1]:.4f} and "
    f"{first['torch'][1]:.4f}"
  )
  median = {name: statistics.median(t) for name, t in times.items()}
  for name in runs:
    print(
      f"{name:6} first step {first[name][0]:6.1f} {kind}, then "
      f"{median[name]:.3f} ({min(times[name]):.3f}-{max(times[name]):.3f}): "
      f"{tokens / median[name]:,.0f} tokens/s, MFU "
      f"{flops / median[name] / peak:.0%}"
    )
  print(f"ours / torch in tokens/s: {median['torch'] / median['ours']:.2f}")


if __name__ == "__main__":
  main()
