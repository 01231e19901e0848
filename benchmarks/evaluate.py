"""Questions per second against lm-eval's HF backend, same model and questions.

  python benchmarks/evaluate.py --model=DIR --tasks-dir=DIR
  python benchmarks/evaluate.py --model=DIR --width=512 --layers=8 ...

With --width a randomly initialised LLaMA of that size, with DIR's tokenizer,
stands in for DIR. Both backends alternate in one process on one core. A
question is one of the benchmark's, whatever number of choices it has. Times are
of the model's part (`loglikelihood`, tokenization included), in CPU seconds
with the wall seconds beside; the first JAX round, which compiles, is apart.
"""

import argparse
import os
import statistics
import tempfile
import time

import peer_model


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True)
  parser.add_argument("--tasks-dir", required=True)
  parser.add_argument(
    "--tasks",
    default="arc_easy,arc_challenge,hellaswag,openbookqa,piqa,winogrande",
  )
  sizes = {
    "limit": 100,  # questions a task
    "batch": 8,
    "rounds": 3,
    "width": 0,
    "layers": 8,
    "ffn": 1376,
    "heads": 8,
    "kv_heads": 4,
    "vocab": 32000,
  }
  for name, value in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=value)
  return parser.parse_args()


FLAGS = arguments()
# Before jax and torch start their threads.
peer_model.use_cores(1)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.evaluation import (
  lm_eval_model,
  lm_eval_run,
)
from adapt_pruner_jax.evaluation.questions import Questions
from adapt_pruner_jax.formats.hf import load

torch.set_num_threads(1)


def random_model(folder: str) -> str:
  """Writes a LLaMA of the flags' size, with the tokenizer of --model."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=FLAGS.vocab,
    hidden_size=FLAGS.width,
    intermediate_size=FLAGS.ffn,
    num_hidden_layers=FLAGS.layers,
    num_attention_heads=FLAGS.heads,
    num_key_value_heads=FLAGS.kv_heads,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(FLAGS.model)
  tokenizer.save_pretrained(folder)
  return folder


def timed(model, spent: list):
  """`model`, which notes the CPU and wall seconds of its requests."""
  answer = model.loglikelihood

  def loglikelihood(requests, **options):
    cpu, wall = time.process_time(), time.perf_counter()
    found = answer(requests, **options)
    spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    return found

  model.loglikelihood = loglikelihood
  return model


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = random_model(folder) if FLAGS.width else FLAGS.model
    config, params = load.load(path, "float32")
    tokenizer = load_tokenizer(path)
    spent: dict[str, list] = {"jax": [], "hf": []}
    models = {
      "jax": timed(
        lm_eval_model.JaxLM(config, params, tokenizer, FLAGS.batch),
        spent["jax"],
      ),
      "hf": timed(
        HFLM(
          pretrained=path,
          device="cpu",
          dtype="float32",
          batch_size=FLAGS.batch,
        ),
        spent["hf"],
      ),
    }
    wanted = dict.fromkeys(FLAGS.tasks.split(","))
    asked = Questions(FLAGS.tasks_dir, limit=FLAGS.limit)
    raw = {}
    for _ in range(FLAGS.rounds + 1):
      for name, model in models.items():
        raw[name] = lm_eval_run.run(wanted, model, asked)
  number = sum(len(samples) for samples in raw["jax"]["samples"].values())
  worst = max(
    abs(x[0] - y[0])
    for task, samples in raw["jax"]["samples"].items()
    for a, b in zip(samples, raw["hf"]["samples"][task], strict=True)
    for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True)
  )
  print(
    f"{number} questions of {', '.join(wanted)}; worst difference {worst:.1e}"
  )
  rates = {}
  for name, rounds in spent.items():
    cpu, wall = map(statistics.median, zip(*rounds[1:], strict=True))
    rates[name] = number / cpu
    print(
      f"{name:4} {number / cpu:8.1f} questions per CPU second "
      f"({cpu:.2f} s, wall {wall:.2f} s), first round {rounds[0][0]:.2f} s"
    )
  first = spent["hf"][0][0] / spent["jax"][0][0]
  print(f"jax / hf {rates['jax'] / rates['hf']:.2f}, first round {first:.2f}")


if __name__ == "__main__":
  main()
