"""How good a model is: perplexity on a text."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax import loss, model, sharding
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig


def perplexity(
  config: ModelConfig,
  params: Params,
  tokens: np.ndarray,
  seq_len: int,
  batch: int,
  mesh: Mesh | None = None,
) -> tuple[float, float, int]:
  """exp(mean nll), total nll in nats, number of predicted tokens.

  The text is cut into disjoint windows of `seq_len` tokens, the last one
  shorter; each window predicts its tokens but the first.

  Args:
    tokens: ids of the whole text, [number of tokens]; the same array in every
      process.
    batch: windows at a time; rounded up to what the mesh divides.

  Raises:
    UserError: fewer than 2 tokens, or ids outside the vocabulary.
  """
  tokens = np.asarray(tokens)
  check_tokens(tokens, config.V)
  if seq_len < 2:
    raise UserError(
      f"a window of {seq_len} token(s) predicts none: use 2 or more"
    )
  if mesh is None:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  batch = -(-batch // shards) * shards
  rows_BT, lengths_B = windows(tokens, min(seq_len, len(tokens)), batch)
  placed = sharding.batch_sharding(mesh)
  total, count = 0.0, 0
  for i in range(0, len(rows_BT), batch):
    rows = _global(rows_BT[i : i + batch], placed)
    lengths = _global(lengths_B[i : i + batch], placed)
    nll, number = _window_loss(config, mesh, params, rows, lengths)
    total += float(nll)
    count += int(number)
  mean = total / count
  # A ruined model can be worse than any float: infinite, not an error.
  return math.exp(mean) if mean < 700 else math.inf, total, count


def windows(
  tokens: np.ndarray, seq_len: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows int32 [B, seq_len], zero padded, and their lengths [B].

  B is padded with empty rows to a multiple of `batch`, so that one compiled
  shape serves all.
  """
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
  # As in train: a whole table keeps the residual stream cut by rows.
  whole = sharding.replicated(mesh)
  table = jax.lax.with_sharding_constraint(params["embedding"], whole)
  params = params | {"embedding": table}
  logits_BTV, _ = model.Decoder(config).apply({"params": params}, rows_BT)
  positions_T = jnp.arange(1, rows_BT.shape[1])
  weights_BT = positions_T < lengths_B[:, None]
  found = loss.next_token(logits_BTV[:, :-1], rows_BT[:, 1:], weights_BT)
  return jax.lax.with_sharding_constraint(found, whole)


def _global(rows: np.ndarray, placed: jax.sharding.Sharding) -> jax.Array:
  """A global array of which every process has the whole on its host."""
  return jax.make_array_from_callback(rows.shape, placed, lambda at: rows[at])
