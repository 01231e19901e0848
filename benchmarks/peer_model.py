"""The pruned model that is timed beside PyTorch's, and the cores that both get.

To be imported before jax and torch, whose threads start with them.
"""

import argparse
import os

SIZES = {
  "layers": 4,
  "width": 256,
  "ffn": 688,
  "heads": 8,
  "kv_heads": 4,
  "head_dim": 32,
  "vocab": 4096,
}


def use_cores(threads: int) -> None:
  """Pins this process, and what it starts, to so many cores of the CPU."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  os.environ["OMP_NUM_THREADS"] = str(threads)
  if threads == 1:
    one = " --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + one


def pruned_config(sizes: argparse.Namespace, context: int):
  """Every second layer has lost a KV group and a fifth of its channels."""
  from adapt_pruner_jax.models.model_config import ModelConfig
  from adapt_pruner_jax.models.rope import Rope

  thin = [i % 2 for i in range(sizes.layers)]
  return ModelConfig(
    family="llama",
    vocab_size=sizes.vocab,
    hidden_size=sizes.width,
    queries_per_group=sizes.heads // sizes.kv_heads,
    head_dim=sizes.head_dim,
    kv_groups=tuple(sizes.kv_heads - t for t in thin),
    ffn_widths=tuple(sizes.ffn - t * (sizes.ffn // 5) for t in thin),
    norm_eps=1e-5,
    rope=Rope(),
    context=context,
    tied=False,
  )
