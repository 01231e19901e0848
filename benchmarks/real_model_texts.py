"""Windows of texts, the loss of each of their tokens, and bits as text."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.models import decoder, layer, model_config
from adapt_pruner_jax.training import losses

BLOCK = 256  # positions whose logits exist at once
MARK = "<|endoftext|>"  # between the texts' documents


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
  inputs_T, targets_T = row_T[:-1], row_T[1:]
  number = -(-len(inputs_T) // BLOCK)
  pad = (0, number * BLOCK - len(inputs_T))
  found = _token_losses(
    config, params, np.pad(inputs_T, pad), np.pad(targets_T, pad)
  )
  return np.asarray(found)[: len(inputs_T)]


@functools.partial(jax.jit, static_argnames="config")
def _token_losses(config, params, inputs_T, targets_T):
  x_BTD, _ = decoder.Decoder(config).apply(
    {"params": params},
    inputs_T[None],
    layer.attention_inputs(config, len(inputs_T)),
    method="residual",
  )

  def block(parts):
    x_CD, targets_C = parts
    logits_BCV = generate.head(config, params, x_CD[None])
    return -losses.log_probs(logits_BCV, targets_C[None])[0][0]

  x_MCD = x_BTD[0].reshape(-1, BLOCK, x_BTD.shape[-1])
  return jax.lax.map(block, (x_MCD, targets_T.reshape(-1, BLOCK))).ravel()


def to_hex(bits: Sequence[int]) -> str:
  """The first bit is the highest; padded with zeros at the end."""
  return np.packbits(np.array(bits, bool)).tobytes().hex()


def from_hex(text: str, number: int) -> np.ndarray:
  """The inverse of `to_hex`, float [number]."""
  packed = np.frombuffer(bytes.fromhex(text), np.uint8)
  return np.unpackbits(packed)[:number].astype(float)
