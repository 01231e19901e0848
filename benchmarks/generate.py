"""Times generation beside PyTorch + Transformers on one pruned model.

  python benchmarks/generate.py --layers=4 --width=256 --rows=4 --new=64

The model has unequal layers, as after a prune: `save` writes it and
Transformers opens that. The likeliest token is taken each time, prompts are the
same and end nowhere. Both alternate in one process on --threads cores; times
are CPU seconds, medians over --rounds, compiling apart, since on a shared
machine wall time says little.
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
    "rows": 4,
    "prompt": 128,
    "new": 64,
    "threads": 1,
    "rounds": 5,
  }
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  return parser.parse_args()


FLAGS = arguments()
# Before jax and torch start their threads.
peer_model.use_cores(FLAGS.threads)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner_jax.evaluation.generate import generate
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.models import decoder, model_config


def transformers(folder: str, prompts_BT: np.ndarray):
  """Generation by Transformers of the model in a folder."""
  model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32
  ).eval()
  given = torch.tensor(prompts_BT, dtype=torch.long)
  how = {"max_new_tokens": FLAGS.new, "min_new_tokens": FLAGS.new}

  def run() -> np.ndarray:
    with torch.inference_mode():
      found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **how,
      )
    return found[:, FLAGS.prompt :].numpy()

  return run


def seconds(fn) -> tuple[float, np.ndarray]:
  """CPU seconds of a call, and what it returned."""
  begun = time.process_time()
  found = np.asarray(fn())
  return time.process_time() - begun, found


def main() -> None:
  config = peer_model.pruned_config(FLAGS, FLAGS.prompt + FLAGS.new)
  params = decoder.init_params(config, jax.random.key(0))
  rng, shape = np.random.default_rng(0), (FLAGS.rows, FLAGS.prompt)
  prompts_BT = rng.integers(0, FLAGS.vocab, shape)
  with tempfile.TemporaryDirectory() as folder:
    host = jax.device_get(params)
    save.save(config, host, f"{folder}/model", say=lambda line: None)
    theirs = transformers(f"{folder}/model", prompts_BT)
  prompts = prompts_BT.tolist()
  ours = lambda: generate(config, params, prompts, FLAGS.new, eos_ids=())
  runs = {"ours": ours, "torch": theirs}
  first = {name: seconds(run) for name, run in runs.items()}
  times = {name: [] for name in runs}
  for _ in range(FLAGS.rounds):
    for name, run in runs.items():
      times[name].append(seconds(run)[0])
  same = np.mean(first["ours"][1] == first["torch"][1])
  size = model_config.count_params(config)
  print(
    f"{size / 1e6:.1f}M parameters, {FLAGS.rows} x {FLAGS.prompt} tokens, "
    f"{FLAGS.new} new; {same:.0%} of these the same"
  )
  median = {name: statistics.median(t) for name, t in times.items()}
  for name in runs:
    print(
      f"{name:6} first {first[name][0]:6.1f} CPU s, then {median[name]:.3f} "
      f"({min(times[name]):.3f}-{max(times[name]):.3f}): "
      f"{FLAGS.rows * FLAGS.new / median[name]:,.0f} tokens/s"
    )
  print(f"ours / torch in CPU seconds: {median['ours'] / median['torch']:.2f}")


if __name__ == "__main__":
  main()
