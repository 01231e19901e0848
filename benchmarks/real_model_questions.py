"""Which questions a model gets right, as bits in text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt_pruner_jax.evaluation import lm_eval_run, presets
from adapt_pruner_jax.evaluation.questions import Questions


def right(lm: Any, names: list[str], how: Questions) -> dict:
  """Which questions are answered right, as hexadecimal bits by task."""
  metrics = presets.PRESETS["commonsense"].metrics
  raw = lm_eval_run.run(lm_eval_run.expand(names, how)[0], lm, how)
  correct, number = {}, {}
  for name, samples in raw["samples"].items():
    metric = metrics.get(name, "acc")  # MMLU's subjects have one
    rows = sorted(samples, key=lambda sample: sample["doc_id"])
    bits = [int(row[metric]) for row in rows if metric in row]
    correct[name], number[name] = to_hex(bits), len(bits)
  return {"correct": correct, "questions": number}


def to_hex(bits: Sequence[int]) -> str:
  """The first bit is the highest; padded with zeros at the end."""
  return np.packbits(np.array(bits, bool)).tobytes().hex()


def from_hex(text: str, number: int) -> np.ndarray:
  """The inverse of `to_hex`, float [number]."""
  packed = np.frombuffer(bytes.fromhex(text), np.uint8)
  return np.unpackbits(packed)[:number].astype(float)
