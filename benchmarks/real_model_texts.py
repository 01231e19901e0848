"""Texts, windows of them, and the loss of each of their tokens."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.distributed import embedding
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.training import output_loss

MARK = "<|endoftext|>"  # between the texts' documents


def read(data: Path, name: str) -> str:
  """One of the folder's texts."""
  return (data / "text" / name).read_text(encoding="utf-8")


def c4(data: Path, begin: int, end: int | None) -> str:
  """Bytes of the sample of C4."""
  whole = (data / "text" / "c4_sample.txt").read_bytes()
  return whole[begin:end].decode(errors="ignore")


def reported(data: Path, begin: int) -> dict[str, str]:
  """What losses are reported of: C4 from a byte on, and other kinds of text."""
  shakespeare = data / "tinyshakespeare" / "input.txt"
  return {
    "c4": c4(data, begin, None),
    "wikitext": read(data, "wikitext2_raw_test.txt"),
    "books": read(data, "books.txt"),
    "shakespeare": shakespeare.read_text(encoding="utf-8"),
  }


def cut(tokenizer: Any, text: str, number: int, length: int) -> np.ndarray:
  """Windows of a text, evenly spread over it, int32 [number, length]."""
  text = text.replace(MARK, "")
  ids = np.array(tokenizer.encode(text), np.int32)
  starts = np.linspace(0, len(ids) - length, number).astype(int)
  assert len(ids) >= number * length, "too short a text"
  return np.stack([ids[start : start + length] for start in starts])


def token_losses(
  config: model_config.ModelConfig, params: Any, row_T: np.ndarray
) -> np.ndarray:
  """Nats of each token of a window but the first, float32 [T - 1]."""
  return np.asarray(_token_losses(config, params, row_T[None]))


@functools.partial(jax.jit, static_argnames="config")
def _token_losses(config, params, row_BT):
  x_BTD = embedding.embed(config, params, row_BT[:, :-1], None)
  x_BTD = decoder.Decoder(config).apply(
    {"params": params}, x_BTD, method="hidden"
  )
  matrix = params[decoder.output_name(config)]
  found = output_loss.token_log_probs(
    config, None, matrix, x_BTD, row_BT[:, 1:]
  )
  return -found[0][0]
