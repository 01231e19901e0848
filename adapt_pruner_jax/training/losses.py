"""Training losses, as sums: a mean over microbatches is then exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST_REST = 1e-6  # of all tokens that are not the likeliest; float32's noise


def log_probs(
  logits_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of the token that follows each position, in nats.

  Args:
    logits_BTV: scores of the token that follows each position.
    targets_BT: the token that does follow.

  Returns:
    The log-probability, and the target's logit itself; float32 [B, T] each.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  # Comparing with every id, unlike a gather along V, stays local to a device
  # when V is cut, and its gradient is not a scatter.
  ids_V = jnp.arange(logits_BTV.shape[-1])
  hit_BTV = targets_BT[..., None] == ids_V
  target_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
  return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1), target_BT


def next_token(
  logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy in nats, summed over tokens: (sum, sum of weights).

  Args:
    logits_BTV: scores of the token that follows each position.
    targets_BT: the token that does follow; ignored where the weight is 0.
    weights_BT: how much each counts: 1, or 0 for padding and for the end of a
      packed document, or its share of a mean.
  """
  log_probs_BT, _ = log_probs(logits_BTV, targets_BT)
  return _weighted(-log_probs_BT, weights_BT)


def distillation(
  student_BTV: jax.Array,
  teacher_BTV: jax.Array,
  weights_BT: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """KL(teacher || student) * temperature^2, summed: (sum, sum of weights).

  The square keeps the size of the gradient independent of the temperature
  (Hinton et al., arXiv 1503.02531). No gradient goes to the teacher.

  Args:
    student_BTV, teacher_BTV: logits.
    weights_BT: as `next_token`'s.
    temperature: what both are divided by.
  """
  teacher_BTV = jax.lax.stop_gradient(teacher_BTV).astype(jnp.float32)
  student_BTV = student_BTV.astype(jnp.float32)
  log_t = jax.nn.log_softmax(teacher_BTV / temperature, axis=-1)
  log_s = jax.nn.log_softmax(student_BTV / temperature, axis=-1)
  kl_BT = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
  return _weighted(kl_BT * temperature**2, weights_BT)


class Likeliest(NamedTuple):
  """The tokens that a teacher finds likeliest, as a cache keeps them.

  Attributes:
    ids_BTC: C token ids a position.
    log_probs_BTC: theirs, of logits over the temperature.
  """

  ids_BTC: jax.Array
  log_probs_BTC: jax.Array


def likeliest(
  logits_BTV: jax.Array, number: int, temperature: float
) -> Likeliest:
  """The tokens of highest probability, and their log-probabilities.

  Args:
    logits_BTV: of a teacher.
    number: how many, at most V.
    temperature: what the logits are divided by.
  """
  logits_BTV = logits_BTV.astype(jnp.float32) / temperature
  top_BTC, ids_BTC = jax.lax.top_k(logits_BTV, number)
  total_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
  return Likeliest(ids_BTC, top_BTC - total_BT1)


def distillation_by_likeliest(
  student_BTV: jax.Array,
  taught: Likeliest,
  weights_BT: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """`distillation` from the teacher's likeliest tokens alone.

  All other tokens together are one more outcome, so that it is KL too, never
  more than the whole one and equal to it with all tokens.

  Args:
    student_BTV: logits.
    taught: of the teacher, at the same temperature.
    weights_BT, temperature: as `distillation`'s.
  """
  student_BTV = student_BTV.astype(jnp.float32) / temperature
  total_BT1 = jax.nn.logsumexp(student_BTV, axis=-1, keepdims=True)
  own_BTC = jnp.take_along_axis(student_BTV, taught.ids_BTC, axis=-1)
  log_s, log_t = own_BTC - total_BT1, taught.log_probs_BTC.astype(jnp.float32)
  share_t = jnp.exp(log_t)
  rest_t, rest_s = (
    jnp.maximum(1 - p.sum(-1), LEAST_REST) for p in (share_t, jnp.exp(log_s))
  )
  kl_BT = (share_t * (log_t - log_s)).sum(-1)
  kl_BT += rest_t * (jnp.log(rest_t) - jnp.log(rest_s))
  return _weighted(kl_BT * temperature**2, weights_BT)


def _weighted(loss_BT: jax.Array, weights_BT: jax.Array):
  weights_BT = weights_BT.astype(jnp.float32)
  # 0 * inf is nan: a masked position must not count whatever its logits are.
  counted_BT = jnp.where(weights_BT > 0, loss_BT, 0)
  return (counted_BT * weights_BT).sum(), weights_BT.sum()
