"""Gated delta nets: layers that remember in a matrix in place of keys.

Each value head keeps a memory S, [U, Y], that it reads with queries. At a token
with key k and value v some of it is forgotten, and what it says of k moves
towards v (the gated delta rule, Yang et al., arXiv 2412.06464):

  S <- exp(g) S,  S <- S + beta k (v - S^T k)^T,  out = S^T q

Queries, keys and values come through short causal convolutions first, and what
is said goes through a norm and a gate, as in Qwen3.5. A key head and the value
heads that it serves have no part in what others do: together they are a unit.

At the border of a document both the memory and the convolutions begin anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models.arithmetic import project, rms_norm
from adapt_pruner_jax.models.axes import Params

CHUNK = 64  # tokens that are taken in one product
EPS = 1e-6  # of the norm of queries and keys


class Before(NamedTuple):
  """What a layer keeps of the tokens so far.

  Attributes:
    q, k: inputs of the convolutions, [B, taps - 1, Z, U].
    v: the same, [B, taps - 1, Z, A, Y].
    memory: float32 [B, Z, A, U, Y].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  memory: jax.Array


class Rule(NamedTuple):
  """What the gated delta rule is given, float32.

  Attributes:
    q, k: queries and keys, [B, T, Z, U].
    v: values, [B, T, Z, A, Y].
    g: logarithms of what is kept at each token, at most 0, [B, T, Z, A].
    beta: how far values are learned, [B, T, Z, A].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  g: jax.Array
  beta: jax.Array


def heads(
  weights: Params,
  eps: float,
  h_BTD: jax.Array,
  segments_BT: jax.Array | None = None,
  before: Before | None = None,
) -> tuple[jax.Array, Before]:
  """What the value heads say, the input of `delta_o`.

  Args:
    weights: of the layer.
    eps: of the norm.
    h_BTD: the normed residual stream.
    segments_BT: which tokens belong together; None = all of a row.
    before: what was kept of tokens in front of these; None = nothing.

  Returns:
    [B, T, Z, A, Y], and what is to be kept.
  """
  w, memory, kept = weights, before and before.memory, {}
  given = {}
  for n, letters in (("q", "zu"), ("k", "zu"), ("v", "zay")):
    equation = f"btd,d{letters}->bt{letters}"
    x = project(equation, h_BTD, w[f"delta_{n}"])
    earlier = before and getattr(before, n)
    taps = w[f"delta_conv_{n}"]
    given[n], kept[n] = convolve(x, taps, earlier, segments_BT)
  of_heads = lambda n: project("btd,dza->btza", h_BTD, w[n])
  beta = jax.nn.sigmoid(of_heads("delta_beta")).astype(jnp.float32)
  time = of_heads("delta_decay").astype(jnp.float32) + w["delta_decay_bias"]
  g = -jnp.exp(w["delta_log_rate"].astype(jnp.float32)) * jax.nn.softplus(time)
  q, k, v = (jax.nn.silu(given[n]).astype(jnp.float32) for n in "qkv")
  q, k = unit_norm(q) * q.shape[-1] ** -0.5, unit_norm(k)
  rule = Rule(q, k, v, g, beta)
  if before is not None and h_BTD.shape[1] == 1:
    said, memory = one_token(rule, memory)
  else:
    said, memory = in_chunks(rule, segments_BT, memory)
  said = rms_norm(said.astype(h_BTD.dtype), w["delta_norm"], eps)
  gate = project("btd,dzay->btzay", h_BTD, w["delta_gate"])
  said = said * jax.nn.silu(gate.astype(jnp.float32))
  return said.astype(h_BTD.dtype), Before(**kept, memory=memory)


def unit_norm(x: jax.Array) -> jax.Array:
  """Vectors over their length, in the last axis."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)


def convolve(
  x_BTN: jax.Array,
  taps_NC: jax.Array,
  before_BcN: jax.Array | None,
  segments_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Each channel's sum over its last C tokens of the same segment.

  Args:
    x_BTN: any number of dims of channels.
    taps_NC: the last one is of the token itself.
    before_BcN: the C - 1 tokens in front of these; None = none.
    segments_BT: None = all of a row belong together.

  Returns:
    The sums, and the last C - 1 tokens.
  """
  (B, T), C = x_BTN.shape[:2], taps_NC.shape[-1]
  if before_BcN is None:
    before_BcN = jnp.zeros((B, C - 1, *x_BTN.shape[2:]), x_BTN.dtype)
  all_BSN = jnp.concatenate([before_BcN, x_BTN], axis=1)
  last_BcN = all_BSN[:, T:]
  total, like = 0.0, (1,) * (x_BTN.ndim - 2)
  if segments_BT is not None:
    pads = ((0, 0), (C - 1, 0))
    segments_BS = jnp.pad(segments_BT, pads, constant_values=-1)
    same_Bc = segments_BS[:, T:] == segments_BT[:, -1:]
    last_BcN = last_BcN * same_Bc.reshape(B, C - 1, *like).astype(x_BTN.dtype)
  for tap in range(C):
    part_BTN = all_BSN[:, tap : tap + T]
    if segments_BT is not None:
      same_BT = segments_BS[:, tap : tap + T] == segments_BT
      part_BTN *= same_BT.reshape(B, T, *like).astype(x_BTN.dtype)
    total = total + part_BTN * taps_NC[..., tap]
  return total, last_BcN


def one_token(rule: Rule, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The rule of a single token, as in the equations above.

  Args:
    rule: with T = 1.
    memory: float32 [B, Z, A, U, Y].

  Returns:
    What is said, float32 [B, 1, Z, A, Y], and the memory behind it.
  """
  q, k, v, g, beta = (x[:, 0] for x in rule)
  memory = memory * jnp.exp(g)[..., None, None]
  error = v - jnp.einsum("bzauy,bzu->bzay", memory, k)
  learned = beta[..., None] * error
  memory = memory + jnp.einsum("bzu,bzay->bzauy", k, learned)
  return jnp.einsum("bzauy,bzu->bzay", memory, q)[:, None], memory


def in_chunks(
  rule: Rule,
  segments_BT: jax.Array | None = None,
  memory: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The rule of many tokens, a chunk of them at a time.

  What the tokens of a chunk learn depends on those before them in it by a
  triangular system (the WY form, arXiv 2406.06484, section 3).

  Args:
    rule: of T tokens.
    segments_BT: documents, one behind the other; None = one a row.
    memory: float32 [B, Z, A, U, Y]; None = nothing.

  Returns:
    What is said, float32 [B, T, Z, A, Y], and the memory of the last document.
  """
  (B, T, Z, A, Y), U = rule.v.shape, rule.k.shape[-1]
  if segments_BT is None:
    segments_BT = jnp.zeros((B, T), jnp.int32)
  if memory is None:
    memory = jnp.zeros((B, Z, A, U, Y), jnp.float32)
  size = min(CHUNK, T)
  rest = -T % size  # zeros neither learn nor forget

  def chunked(x, mode="constant"):
    pads = ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pads, mode=mode).reshape(B, -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def step(carry, xs):
    (memory, segment_B), (chunk, segments_Bt) = carry, xs
    said, memory = _chunk(chunk, segments_Bt, memory, segment_B)
    return (memory, segments_Bt[:, -1]), said

  xs = Rule(*map(chunked, rule)), chunked(segments_BT, "edge")
  carry = memory, segments_BT[:, 0]
  (memory, _), said_nBtZAY = jax.lax.scan(step, carry, xs)
  said = jnp.moveaxis(said_nBtZAY, 0, 1).reshape(B, -1, Z, A, Y)
  return said[:, :T], memory


def _chunk(rule, segments_Bt, memory, segment_B):
  """What a chunk says, and the memory behind it.

  Args:
    memory: of the document `segment_B`.
  """
  q, k, v, g, beta = rule
  t = segments_Bt.shape[1]
  by_head = lambda x: x[:, :, None, None]  # a mask of tokens
  past_Bt = segments_Bt == segment_B[:, None]
  last_Bt = segments_Bt == segments_Bt[:, -1:]
  kept = jnp.cumsum(g, axis=1)  # since the chunk's beginning; logarithms
  since_start = jnp.where(by_head(past_Bt), jnp.exp(kept), 0)
  until_end = jnp.where(by_head(last_Bt), jnp.exp(kept[:, -1:] - kept), 0)
  kept_BZAt = jnp.moveaxis(kept, 1, -1)
  between = kept_BZAt[..., :, None] - kept_BZAt[..., None, :]
  seen_Btt = segments_Bt[:, :, None] == segments_Bt[:, None]
  seen_Btt &= jnp.tril(jnp.ones((t, t), bool))
  between = jnp.exp(jnp.where(seen_Btt[:, None, None], between, -jnp.inf))
  alike = jnp.einsum("bizu,bjzu->bzij", k, k)[:, :, None] * between
  beta_BZAt1 = jnp.moveaxis(beta, 1, -1)[..., None]
  system = beta_BZAt1 * alike  # its diagonal is taken to be one
  reads = jnp.einsum("bizu,bjzu->bzij", q, k)[:, :, None] * between

  decayed_k = jnp.einsum("btzu,btza->bzatu", k, since_start)
  right = [jnp.moveaxis(v, 1, -2), decayed_k]
  learned = jax.scipy.linalg.solve_triangular(
    system,
    beta_BZAt1 * jnp.concatenate(right, axis=-1),
    lower=True,
    unit_diagonal=True,
  )
  new_v, old_k = jnp.split(learned, [v.shape[-1]], axis=-1)
  new_v -= jnp.einsum("bzatu,bzauy->bzaty", old_k, memory)
  said = jnp.einsum("btzu,btza,bzauy->btzay", q, since_start, memory)
  said += jnp.einsum("bzaij,bzajy->bizay", reads, new_v)
  memory = memory * since_start[:, -1, :, :, None, None]
  memory += jnp.einsum("btzu,btza,bzaty->bzauy", k, until_end, new_v)
  return said, memory
