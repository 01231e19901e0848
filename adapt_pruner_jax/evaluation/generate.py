"""Text from a model: compiled prefill and decode with a cache of keys, values.

Prompts are padded on the left, so that all rows write their next token to the
same column. The cache of a layer is as wide as that layer's K; a gated delta
net has a memory of one size in its place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation.finite import not_finite
from adapt_pruner_jax.models import layer
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.delta_net import Before
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import output_matrix

CHUNK = 32  # tokens decoded before the host looks at them

Caches = list[layer.Cache | None]  # of each layer; None where K = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; temperature 0 takes the likeliest."""

  temperature: float = 0.0
  top_k: int = 0  # only among the k likeliest; 0 = all
  top_p: float = 1.0  # only among the likeliest that hold this probability


@dataclasses.dataclass(frozen=True)
class Decoding:
  """What `decode` is compiled for."""

  config: ModelConfig
  mesh: Mesh
  sampling: Sampling
  eos_ids: tuple[int, ...]
  count: int  # tokens drawn at most


class Place(NamedTuple):
  """Where in the cache the next token goes."""

  prompt: jax.Array  # columns before the first of all new tokens
  first: jax.Array  # new tokens drawn so far
  starts_B: jax.Array  # the column at which each row starts


def generate(
  config: ModelConfig,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  eos_ids: Sequence[int] | None = None,
  mesh: Mesh | None = None,
  finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
  """Continues each prompt, up to and with its end token.

  What a row draws depends on the seed and its place, not on the other rows.

  Args:
    prompts: token ids, each at least one; the same in every process.
    max_new_tokens: per prompt.
    sampling: how the next token is drawn.
    eos_ids: ids that end a row, see `formats.hf.generation_config.end_tokens`;
      default the config's.
    finished: asked about a row's new tokens every `CHUNK` of them; True ends it
      early, its tokens so far are returned.

  Returns:
    The new tokens of each prompt.

  Raises:
    UserError: as `check_request`, or a logit is not finite.
  """
  check_request(config, prompts, max_new_tokens, sampling)
  mesh = sharding.one_device() if mesh is None else mesh
  eos = tuple(config.eos_ids if eos_ids is None else eos_ids)
  how = Decoding(config, mesh, sampling, eos, CHUNK)
  tokens_BT, starts_B = pad_left(prompts, mesh)
  B, T = tokens_BT.shape
  starts = placement.place_rows(starts_B, mesh)
  # A whole number of chunks, or the last one would write outside.
  rounds = -(-max_new_tokens // CHUNK)
  slots = padded_length(T + rounds * CHUNK)
  logits, caches = prefill(
    config, mesh, slots, params, placement.place_rows(tokens_BT, mesh), starts
  )
  new: list[list[int]] = [[] for _ in prompts]
  done = np.arange(B) >= len(prompts)  # rows that only fill the mesh
  for i in range(rounds):
    at = Place(np.int32(T), np.int32(i * CHUNK), starts)
    logits, caches, drawn_BC, finite = decode(
      *(how, params, caches, logits, at),
      *(placement.place_rows(done, mesh), np.uint32(seed)),
    )
    if not finite:
      raise not_finite("the model's logits", params)
    for row in np.flatnonzero(~done):
      new[row] += np.asarray(drawn_BC)[row].tolist()
      done[row] = _trim(new[row], max_new_tokens, eos)
      done[row] |= finished is not None and finished(new[row])
    if done.all():
      break
  return new


def check_request(
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
) -> None:
  """Raises a UserError unless these prompts can be continued.

  An empty prompt cannot, nor ids outside the vocabulary, sampling out of range,
  or what does not fit the model's context.
  """
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise UserError("generation needs a prompt of at least one token")
  low = min(min(prompt) for prompt in prompts)
  high = max(max(prompt) for prompt in prompts)
  if low < 0 or high >= config.vocab_size:
    raise UserError(
      f"token id {low if low < 0 else high} is outside the model's vocabulary "
      f"of {config.vocab_size}: the tokenizer is not this model's"
    )
  longest = max(len(prompt) for prompt in prompts)
  if longest + max_new_tokens > config.context:
    raise UserError(
      f"a prompt of {longest} tokens and {max_new_tokens} new ones are longer "
      f"than the model's context of {config.context}: use a shorter prompt or "
      f"at most {max(config.context - longest, 0)} new tokens"
    )
  s = sampling
  if not (s.temperature >= 0 and s.top_k >= 0 and 0 < s.top_p <= 1):
    raise UserError(
      f"temperature={s.temperature} and top_k={s.top_k} must be at least 0, "
      f"top_p={s.top_p} in (0, 1]"
    )


def padded_length(length: int) -> int:
  """The next of 32, 48, 64, 96, 128, ...: few shapes, each compiled once."""
  power = 32
  while power < length:
    power *= 2
  return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


def pad_left(
  prompts: Sequence[Sequence[int]], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 [B, T] and the column at which each row starts [B].

  B is what the mesh divides; rows beyond the prompts hold one token, 0.
  """
  shards = placement.batch_shards(mesh)
  B = -(-len(prompts) // shards) * shards
  T = padded_length(max(len(prompt) for prompt in prompts))
  tokens = np.zeros((B, T), np.int32)
  starts = np.full(B, T - 1, np.int32)
  for row, prompt in enumerate(prompts):
    starts[row] = T - len(prompt)
    tokens[row, starts[row] :] = prompt
  return tokens, starts


@partial(jax.jit, static_argnames=("config", "mesh", "slots"))
def prefill(
  config: ModelConfig,
  mesh: Mesh,
  slots: int,
  params: Params,
  tokens_BT: jax.Array,
  starts_B: jax.Array,
) -> tuple[jax.Array, Caches]:
  """Logits [B, V] behind the prompts, and caches of `slots` columns."""
  B, T = tokens_BT.shape
  x_BTD, caches = Decoder(config).apply(
    {"params": params},
    embed(config, params, tokens_BT, mesh),
    starts_B,
    method=partial(_continue, caches=None, column=0),
  )
  matrix = output_matrix.place(config, head_matrix(config, params), mesh)
  logits_BTV = head(config, mesh, params, matrix, x_BTD[:, -1:])

  def widen(cache):
    return cache if isinstance(cache, Before) else jax.tree.map(more, cache)

  def more(kv_BTKH):
    K = kv_BTKH.shape[2]
    kv_BSKH = jnp.pad(kv_BTKH, ((0, 0), (0, slots - T), (0, 0), (0, 0)))
    axis = "tensor" if K % mesh.shape["tensor"] == 0 else None
    cut = PartitionSpec(sharding.BATCH, None, axis)
    placed = jax.sharding.NamedSharding(mesh, cut)
    return jax.lax.with_sharding_constraint(kv_BSKH, placed)

  return logits_BTV[:, 0], [*map(widen, caches)]


@partial(
  jax.jit, static_argnames=("how",), donate_argnames=("caches", "logits_BV")
)
def decode(
  how: Decoding,
  params: Params,
  caches: Caches,
  logits_BV: jax.Array,
  at: Place,
  done_B: jax.Array,
  seed: jax.Array,
) -> tuple[jax.Array, Caches, jax.Array, jax.Array]:
  """Draws up to `how.count` tokens, fewer once all rows are done.

  Args:
    logits_BV: of the token to be drawn first.
    done_B: rows that have ended.

  Returns:
    The next logits, the caches, the tokens int32 [B, count], replicated, and
    whether all logits that were drawn from are finite.
  """
  config, mesh = how.config, how.mesh
  matrix = output_matrix.place(config, head_matrix(config, params), mesh)
  B = logits_BV.shape[0]
  key = jax.random.key(seed)

  def more(carry):
    i, done_B, _, _, _, _ = carry
    return (i < how.count) & ~done_B.all()

  def step(carry):
    i, done_B, logits_BV, caches, drawn_BC, finite = carry
    finite &= (jnp.isfinite(logits_BV).all(-1) | done_B).all()
    key_now = jax.random.fold_in(key, at.first + i)
    token_B = _draw(logits_BV, key_now, how.sampling)
    drawn_BC = jax.lax.dynamic_update_slice(drawn_BC, token_B[:, None], (0, i))
    for eos in how.eos_ids:
      done_B |= token_B == eos
    x_BTD, caches = Decoder(config).apply(
      {"params": params},
      embed(config, params, token_B[:, None], mesh),
      at.starts_B,
      method=partial(_continue, caches=caches, column=at.prompt + at.first + i),
    )
    logits_BTV = head(config, mesh, params, matrix, x_BTD)
    return i + 1, done_B, logits_BTV[:, 0], caches, drawn_BC, finite

  drawn_BC = jnp.zeros((B, how.count), jnp.int32)
  carry = (0, done_B, logits_BV, caches, drawn_BC, jnp.array(True))
  found = jax.lax.while_loop(more, step, carry)
  _, _, logits_BV, caches, drawn_BC, finite = found
  drawn_BC, finite = sharding.whole((drawn_BC, finite), mesh)
  return logits_BV, caches, drawn_BC, finite


def _continue(decoder, x_BTD, starts_B, *, caches, column):
  """`Decoder.residual` of left-padded rows that these tokens go on."""
  T = x_BTD.shape[1]
  positions_BT = column + jnp.arange(T) - starts_B[:, None]
  inside_BT = (positions_BT >= 0).astype(jnp.int32)
  positions_BT = jnp.maximum(positions_BT, 0)
  if caches is None:
    # Padding is a segment of its own.
    inputs = layer.attention_inputs(decoder.config, positions_BT, inside_BT)
  else:
    of_keys = [kv for kv in caches if kv and not isinstance(kv, Before)]
    slots = of_keys[0][0].shape[1] if of_keys else 1
    inputs = dataclasses.replace(
      layer.attention_inputs(decoder.config, positions_BT),
      cached=jnp.arange(slots) - starts_B[:, None],
      column=column,
    )
  return decoder.residual(x_BTD, inputs, caches)


def head(
  config: ModelConfig,
  mesh: Mesh,
  params: Params,
  matrix: output_matrix.Placed,
  x_BTD: jax.Array,
) -> jax.Array:
  """Logits [B, T, V] of the residual stream behind the last layer."""
  x_BTD = Decoder(config).apply({"params": params}, x_BTD, method="normed")
  logits_BTV = output_matrix.logits(config, mesh, matrix, x_BTD)
  return logits_BTV[..., : config.vocab_size]


def _draw(logits_BV: jax.Array, key: jax.Array, sampling: Sampling):
  """One token a row, int32 [B]."""
  if not sampling.temperature:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  B, V = logits_BV.shape
  if 0 < sampling.top_k < V:
    least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
    least_B1 = kept_BV.min(axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
  return drawn_B.astype(jnp.int32)


def _trim(
  tokens: list[int], max_new_tokens: int, eos_ids: tuple[int, ...]
) -> bool:
  """Cuts `tokens` in place behind the first end token; True = row complete."""
  ends = (i + 1 for i, token in enumerate(tokens) if token in eos_ids)
  end = min(next(ends, max_new_tokens), max_new_tokens)
  complete = len(tokens) >= end
  del tokens[end:]
  return complete
