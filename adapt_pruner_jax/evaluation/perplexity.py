"""Perplexity on a text: by token, word and byte."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.data import packing, sources
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.distributed import placement, sharding, stopping
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation.finite import not_finite
from adapt_pruner_jax.evaluation.phases import Phases, silent
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import output_loss

LONGEST = 2048  # tokens a window has unless more are asked for


def text_perplexity(
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  path: str,
  seq_len: int = 0,
  batch: int = 8,
  mesh: Mesh | None = None,
  phase: Phases = silent,
) -> dict:
  """Measures the perplexity of a text file by token, word and byte.

  Each window starts with the tokenizer's begin token, if it has one, and all of
  the text is predicted. Else the first token of a window is not predicted, and
  words and bytes are charged the mean of the predicted tokens for it.

  Args:
    seq_len: tokens a window; 0 = the model's context, at most 2048.
    batch, mesh, phase: as of `perplexity`.

  Returns:
    "perplexity", "word_perplexity" (None: no words, or beyond all numbers, as
    of a language that has no spaces), "byte_perplexity", "bits_per_byte", "nll"
    (summed, nats), and the numbers of tokens, words and bytes.

  Raises:
    UserError: the file cannot be read, or as `perplexity`.
  """
  text = sources.read_text(path)
  check_length(config, seq_len, "seq_len")
  seq_len = window(config, seq_len)
  tokens = packing.heldout_tokens(text, tokenizer, config.vocab_size, str(path))
  begin = tokenizer.begin_id
  value, nll, count = perplexity(
    config, params, tokens, seq_len, batch, mesh, begin, phase
  )
  whole = whole_loss(nll, count, len(tokens), begin)
  words, size = len(text.split()), len(text.encode())
  return {
    "perplexity": value,
    "word_perplexity": _exp(whole / words, None) if words else None,
    "byte_perplexity": _exp(whole / size),
    "bits_per_byte": whole / size / math.log(2),
    "nll": nll,
    "tokens": count,
    "words": words,
    "bytes": size,
    "seq_len": seq_len,
    "bos": tokenizer.bos,
    "begin_token": tokenizer.begin_token,  # of each window; null = none
    "text": str(path),
  }


def whole_loss(
  nll: float, predicted: int, tokens: int, begin_id: int | None
) -> float:
  """Nats of a text of which every token is charged.

  Args:
    nll, predicted: what `perplexity` gives.
    tokens: of the text.
    begin_id: with one, all of the text is predicted; else tokens that are not
      are charged the mean.
  """
  return nll / predicted * (predicted if begin_id is not None else tokens)


def check_length(config: ModelConfig, seq_len: int, name: str) -> None:
  """Raises a UserError for windows that are longer than the context.

  Positions that a model has never seen give results without a warning.
  """
  if seq_len > config.context:
    raise UserError(
      f"--{name}={seq_len} is longer than the model's context: give at most "
      f"--{name}={config.context}"
    )


def windows_start(tokenizer: Tokenizer, option: str) -> str:
  """What a perplexity's windows start with, for people, and how to change it.

  Empty where the tokenizer has no begin token, so that there is no choice.

  Args:
    option: that sets `bos`, such as "--bos".
  """
  if tokenizer.begin_token is not None:
    return f"windows start with {tokenizer.begin_token}; {option}=none: without"
  token = dataclasses.replace(tokenizer, bos="auto").begin_token
  return f"windows without {token}; {option}=auto: with" if token else ""


def window(config: ModelConfig, seq_len: int = 0) -> int:
  """Returns the length of windows: `seq_len`, or the context up to LONGEST."""
  return seq_len or min(config.context, LONGEST)


def perplexity(
  config: ModelConfig,
  params: Params,
  tokens: np.ndarray,
  seq_len: int,
  batch: int,
  mesh: Mesh | None = None,
  begin_id: int | None = None,
  phase: Phases = silent,
) -> tuple[float, float, int]:
  """Measures exp(mean nll), total nll in nats, number of predicted tokens.

  The text is cut into disjoint windows of `seq_len` tokens, the last one
  shorter; each window predicts its tokens but the first. With a begin token,
  that is the first of each window, so that every token of the text is predicted
  exactly once.

  Args:
    tokens: ids of the whole text, [number of tokens]; the same array in every
      process.
    batch: windows at a time; rounded up to what the mesh divides.
    begin_id: starts each window, see `Tokenizer.begin_id`; one that the text
      starts with already is not counted as text. None = windows of text alone.
    phase: shows how much of the text is read.

  Raises:
    UserError: fewer than 2 tokens, ids outside the vocabulary, or a loss that
      is not finite.
  """
  tokens = np.asarray(tokens)
  check_tokens(tokens, config.vocab_size)
  if seq_len < 2:
    raise UserError(
      f"a window of {seq_len} token(s) predicts none: use 2 or more"
    )
  if mesh is None:
    mesh = sharding.one_device()
  shards = placement.batch_shards(mesh)
  batch = -(-batch // shards) * shards
  longest = len(tokens) + (begin_id is not None)
  rows_BT, lengths_B = windows(tokens, min(seq_len, longest), batch, begin_id)
  total, count = 0.0, 0
  with phase("perplexity", len(tokens), "tokens") as shown:
    for i in range(0, len(rows_BT), batch):
      stopping.moment()
      rows = placement.place_rows(rows_BT[i : i + batch], mesh)
      lengths = placement.place_rows(lengths_B[i : i + batch], mesh)
      nll, number = _window_loss(config, mesh, params, rows, lengths)
      total += float(nll)
      count += int(number)
      shown.update(min((i + batch) * rows_BT.shape[1], len(tokens)))
  if not math.isfinite(total):
    raise not_finite("the text's losses", params)
  return _exp(total / count), total, count


def windows(
  tokens: np.ndarray, seq_len: int, batch: int, begin_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts rows int32 [B, seq_len], zero padded, and gives their lengths [B].

  B is padded with empty rows to a multiple of `batch`, so that one compiled
  shape serves all. A begin token is in front of every window, in place of one
  token of text.
  """
  if begin_id is not None:
    tokens = tokens[int(tokens[0] == begin_id) :]
    rows, lengths = windows(tokens, seq_len - 1, batch)
    begin = np.where(lengths > 0, begin_id, 0).astype(np.int32)
    return np.column_stack([begin, rows]), lengths + (lengths > 0)
  number = -(-len(tokens) // seq_len)
  rows = -(-number // batch) * batch
  flat = np.zeros(rows * seq_len, np.int32)
  flat[: len(tokens)] = tokens
  left = len(tokens) - seq_len * np.arange(rows)
  lengths = np.clip(left, 0, seq_len).astype(np.int32)
  return flat.reshape(rows, seq_len), lengths


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
  """Raises a UserError unless `tokens` can be evaluated."""
  if tokens.ndim != 1 or tokens.size < 2:
    raise UserError(
      f"perplexity needs at least 2 tokens, the text has {tokens.size}"
    )
  low, high = tokens.min(), tokens.max()
  if low < 0 or high >= vocab_size:
    raise UserError(
      f"token id {low if low < 0 else high} is outside the model's vocabulary "
      f"of {vocab_size}: the tokenizer is not this model's"
    )


@partial(jax.jit, static_argnames=("config", "mesh"))
def _window_loss(
  config: ModelConfig,
  mesh: Mesh,
  params: Params,
  rows_BT: jax.Array,
  lengths_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Summed nll and number of predicted tokens of one batch, on all devices."""
  x_BTD = embed(config, params, rows_BT, mesh)
  x_BTD = Decoder(config).apply({"params": params}, x_BTD, method="hidden")
  positions_T = jnp.arange(1, rows_BT.shape[1])
  weights_BT = positions_T < lengths_B[:, None]
  objective = output_loss.Objective(config, mesh)
  args = head_matrix(config, params), x_BTD[:, :-1], rows_BT[:, 1:], weights_BT
  nll, _ = output_loss.loss(objective, *args)
  return sharding.whole((nll, weights_BT.sum()), mesh)


def _exp(nats: float, beyond: float | None = math.inf) -> float | None:
  """A ruined model can be worse than any float: infinite, not an error."""
  return math.exp(nats) if nats < 700 else beyond
