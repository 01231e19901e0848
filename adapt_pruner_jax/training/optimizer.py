"""The optimizer (AdamW, clipped) and one schedule over all stages.

The learning rate is not part of the optimizer's state: it is an argument of the
train step, from the global step. Stages can then start with fresh moments or
carry them over, and the schedule goes on either way.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes

CLIP_NORM = 1.0
B1, B2, EPS = 0.9, 0.95, 1e-8
WARMUP = 0.05  # share of all steps
DECAY = 0.1  # share of all steps, "wsd" only

Schedule = Callable[[int], float]


def schedule(settings: Train, total_steps: int) -> Schedule:
  """Learning rate of each global step 0 ... total_steps - 1.

  Both kinds warm up linearly. `wsd` then stays at the peak and falls linearly
  in the last tenth (arXiv 2404.06395), of ten steps or more; `cosine` falls all
  the way. Both end at the minimum.
  """
  kind = settings.schedule
  peak, minimum = settings.learning_rate, settings.min_learning_rate
  warmup = math.ceil(WARMUP * total_steps)
  falling = total_steps - warmup
  if kind == "wsd":
    falling = min(falling, int(DECAY * total_steps))

  def learning_rate(step: int) -> float:
    done = (step + 1 - (total_steps - falling)) / max(falling, 1)
    if done <= 0:
      return peak * min((step + 1) / max(warmup, 1), 1.0)
    done = min(done, 1.0)
    if kind == "cosine":
      done = (1 - math.cos(math.pi * done)) / 2
    return peak + (minimum - peak) * done

  return learning_rate


def optimizer(
  weight_decay: float, moments: str = "float32"
) -> optax.GradientTransformation:
  """Clip, then AdamW without its learning rate (decay is decoupled).

  Args:
    weight_decay: how much of a matrix goes, times the learning rate.
    moments: the dtype that Adam's are kept in; they are computed in float32.
  """
  adam = optax.scale_by_adam(b1=B1, b2=B2, eps=EPS, mu_dtype=jnp.float32)
  return optax.chain(
    optax.clip_by_global_norm(CLIP_NORM),
    adam if moments == "float32" else _kept_as(moments, adam),
    optax.add_decayed_weights(weight_decay, mask=decayed),
  )


def of(settings: Train) -> optax.GradientTransformation:
  """The optimizer of a training."""
  return optimizer(settings.weight_decay, settings.moments)


def _kept_as(
  dtype: str, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Adam whose moments are rounded to `dtype` between steps."""

  def cast(state: Any, dtype: Any) -> Any:
    round_ = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    return state._replace(mu=round_(state.mu), nu=round_(state.nu))

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = adam.update(grads, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  init = lambda params: cast(adam.init(params), dtype)
  return optax.GradientTransformation(init, update)


def decayed(params: axes.Params) -> Any:
  """True for what weight decay pulls at: matrices, not norms and biases."""

  def one(name: str | None, _: int | None, leaf: jax.Array) -> bool:
    if name is None:  # a LoRA factor
      return True
    if name.endswith("bias"):
      return False
    letters = axes.AXES[name]
    return any(x in axes.RESIDUAL + "V" for x in letters) and len(letters) > 1

  return axes.map_named(one, params)


def state_shardings(
  transform: optax.GradientTransformation,
  params: Any,
  param_shardings: Any,
  mesh: Mesh,
) -> Any:
  """Shardings of the optimizer's state: moments lie where their params do.

  Args:
    transform: from `optimizer`.
    params: what is trained, or its shapes.
    param_shardings: of these.
    mesh: where the counters lie.
  """
  return optax.tree_map_params(
    transform,
    lambda _, placed: placed,
    jax.eval_shape(transform.init, params),
    param_shardings,
    transform_non_params=lambda _: sharding.replicated(mesh),
  )


def init(
  transform: optax.GradientTransformation,
  params: Any,
  param_shardings: Any,
  mesh: Mesh,
) -> Any:
  """Fresh optimizer state.

  The shardings are given because zeros depend on no input: without them `jit`
  would put every moment on one device.

  Args:
    transform, params, param_shardings, mesh: as `state_shardings`'s.
  """
  placed = state_shardings(transform, params, param_shardings, mesh)
  return jax.jit(transform.init, out_shardings=placed)(params)
