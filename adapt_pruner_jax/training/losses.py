"""Training losses, as sums: a mean over microbatches is then exact."""

import jax
import jax.numpy as jnp

TEMPERATURE = 2.0


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
  temperature: float = TEMPERATURE,
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


def _weighted(loss_BT: jax.Array, weights_BT: jax.Array):
  weights_BT = weights_BT.astype(jnp.float32)
  # 0 * inf is nan: a masked position must not count whatever its logits are.
  counted_BT = jnp.where(weights_BT > 0, loss_BT, 0)
  return (counted_BT * weights_BT).sum(), weights_BT.sum()
