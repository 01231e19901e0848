"""New tokens a second beside Transformers, the same model and prompts.

  python benchmarks/generate.py --model=DIR --batch=8 --tokens=64

Greedy, with a cache of keys and values on both sides, in one process on
--threads cores, alternating. Times are CPU seconds; the first round, in which
ours compiles, is apart. Both must say the same, but for ties.
"""

import argparse
import os
import statistics
import time


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="a HuggingFace directory")
  sizes = {"batch": 8, "prompt": 32, "tokens": 64, "threads": 1, "rounds": 5}
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  return parser.parse_args()


FLAGS = arguments()
# Before jax and torch start their threads.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.threads])
os.environ["OMP_NUM_THREADS"] = str(FLAGS.threads)
if FLAGS.threads == 1:
  one = " --xla_cpu_multi_thread_eigen=false"
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + one
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.evaluation.generate import generate
from adapt_pruner_jax.formats.hf import load

torch.set_num_threads(FLAGS.threads)


def main() -> None:
  mesh = sharding.one_device()
  config, params = load.load(FLAGS.model, "float32", mesh, "")
  rng, shape = np.random.default_rng(0), (FLAGS.batch, FLAGS.prompt)
  prompts = rng.integers(0, config.vocab_size, shape)
  peer = AutoModelForCausalLM.from_pretrained(
    FLAGS.model, trust_remote_code=True, dtype=torch.float32
  ).eval()

  def ours():
    rows = prompts.tolist()
    return generate(config, params, rows, FLAGS.tokens, eos_ids=(), mesh=mesh)

  @torch.no_grad()
  def theirs():
    ids = torch.tensor(prompts)
    found = peer.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=FLAGS.tokens,
      min_new_tokens=FLAGS.tokens,
    )
    return found[:, FLAGS.prompt :].tolist()

  sides, times = {"ours": ours, "Transformers": theirs}, {}
  said = {name: side() for name, side in sides.items()}
  for _ in range(FLAGS.rounds):
    for name, side in sides.items():
      begun = time.process_time()
      side()
      times.setdefault(name, []).append(time.process_time() - begun)
  number = FLAGS.batch * FLAGS.tokens
  for name, taken in times.items():
    each = statistics.median(taken)
    spread = f"{min(taken):.2f}-{max(taken):.2f}"
    print(
      f"{name:13}{each:8.3f} CPU s ({spread}) {number / each:8.0f} tokens/s"
    )
  same = np.mean(np.array(said["ours"]) == np.array(said["Transformers"]))
  ratio = statistics.median(times["ours"])
  ratio /= statistics.median(times["Transformers"])
  print(f"ours / Transformers {ratio:.2f} (goal 1.00); {same:.1%} tokens equal")


if __name__ == "__main__":
  main()
