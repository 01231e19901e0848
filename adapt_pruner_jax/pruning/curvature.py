"""Curvature: remove what the rest of its matrix can stand in for.

The score of a unit is the second-order increase of the loss when it is removed
and the rest of the matrix that it feeds, `o` or `down`, is refitted (`refit`):

  s = trace(B_JJ^-1 W_J H W_J^T),   B = (G + ridge)^-1

with J the unit's input channels of the matrix W [C, D], G = mean of x x^T its
input's Gram matrix, and H = sum of g g^T over tokens, g the loss's gradient at
its output. For one channel it is w^T H w / B_cc, as in Optimal Brain Surgeon
with the Kronecker factors of K-FAC. Only activations and their gradients are
needed, and one layer's G exists at a time.

Scores of all modules have one unit of measure, so that one ranking of all units
can replace a schedule. The score says what can be reconstructed: use it with a
refit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import WRITERS, add, fed, places
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  linear_algebra,
  surgery,
)
from adapt_pruner_jax.pruning.task import Masked, Measured

ENOUGH = 4  # tokens per input channel from which a weak ridge is best
WEAK, STRONG = 1e-3, 0.1


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores of all units, in nats of the sequences' summed mean losses."""
  task = masked.task
  tokens_MBT, valid_MB = placement.minibatches(tokens_NT, task.batch, task.mesh)
  found = measure_step(
    surgery.dense(task.full),
    masked.stacked,
    placement.replicate(masked.masks, task.mesh),
    tokens_MBT,
    valid_MB,
    mesh=task.mesh,
  )
  found = jax.device_get(found)
  scores = {u: np.asarray(s, np.float64) for u, s in found["scores"].items()}
  return Measured(scores, found["loss_M"])


@partial(jax.jit, static_argnames=("config", "mesh"))
def measure_step(
  config: ModelConfig,
  stacked: Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  *,
  mesh: Mesh,
) -> dict:
  """Losses and scores of the masked model, float32.

  Args:
    config: equal layers (`surgery.dense`).
    stacked: from `surgery.expand`.
    masks: {"K": bool [L, K], "F": bool [L, F]}, the units that are left.
    tokens_MBT: M minibatches of B sequences.
    valid_MB: False for rows that only pad.

  Returns:
    loss_M (mean over the minibatch's predictions), scores {"K": [L, K], "F":
    [L, F]}. The loss behind the gradients is the sum over sequences of the
    mean over their tokens.
  """
  M, B, T = tokens_MBT.shape
  layers = stacked["layers"]
  outer = {"params": {k: v for k, v in stacked.items() if k != "layers"}}
  decoder = Decoder(config)
  tokens = jnp.sum(valid_MB) * T

  def cut(x):
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    return jax.lax.with_sharding_constraint(x, where)

  def half(unit, layer, masks, place, x_BTD):
    """The stream behind a half, and what its units say, [B, T, C]."""
    writer = WRITERS[unit]
    y_BTC = fed(config, writer, layer, place, x_BTD)
    live_C = jnp.repeat(masks[unit], y_BTC.shape[-1] // masks[unit].shape[0])
    y_BTC *= live_C.astype(y_BTC.dtype)
    return add(config, writer, layer, x_BTD, y_BTC), y_BTC

  def forward(x_MBTD, xs):
    def one(x_BTD):
      mid_BTD, _ = half("K", *xs, x_BTD)
      return mid_BTD, half("F", *xs, mid_BTD)[0]

    mid, out = jax.lax.map(one, x_MBTD)
    return cut(out), (x_MBTD, cut(mid))

  def head_loss(x_BTD, tokens_BT, valid_B):
    logits = decoder.apply(outer, x_BTD[:, :-1], method=Decoder.head)
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1)
    return -jnp.sum(valid_B * jnp.mean(picked[..., 0], axis=-1))

  def backward(unit, xs, x_MBTD, dy_MBTD):
    """Scores of a half's units, and the gradient in front of it."""
    layer, masks, place = xs
    weight = linear_algebra.as_matrix(WRITERS[unit], layer[WRITERS[unit]])

    def one(total, args):
      x_BTD, dy_BTD, valid_B = args
      _, vjp, y_BTC = jax.vjp(
        lambda x: half(unit, layer, masks, place, x), x_BTD, has_aux=True
      )
      g_BTD = dy_BTD.astype(jnp.float32) * config.residual_scale
      y_BTC = y_BTC.astype(jnp.float32) * valid_B[:, None, None]
      found = (
        linear_algebra.product("btc,bte->ce", y_BTC, y_BTC),
        linear_algebra.product("btd,bte->de", g_BTD, g_BTD),
      )
      return jax.tree.map(jnp.add, total, found), vjp(dy_BTD)[0]

    zeros = tuple(jnp.zeros((n, n), jnp.float32) for n in weight.shape)
    xs_M = (x_MBTD, dy_MBTD, valid_MB)
    (gram, hessian), dx_MBTD = jax.lax.scan(one, zeros, xs_M)
    gram, hessian = sharding.whole((gram, hessian), mesh)
    units = masks[unit].shape[0]
    live = jnp.sum(masks[unit]) * (weight.shape[0] // units)
    ridge = jnp.where(tokens >= ENOUGH * live, WEAK, STRONG)
    return cut(dx_MBTD), unit_scores(
      gram / tokens, hessian, weight, ridge, units
    )

  def reverse(dx_MBTD, inputs):
    xs, x_MBTD, mid_MBTD = inputs
    dx_MBTD, mlp = backward("F", xs, mid_MBTD, dx_MBTD)
    dx_MBTD, attention = backward("K", xs, x_MBTD, dx_MBTD)
    return dx_MBTD, {"K": attention, "F": mlp}

  x_MBTD = cut(decoder.apply(outer, tokens_MBT, method=Decoder.embed))
  xs = (layers, masks, places(config))
  x_MBTD, (ins, mids) = jax.lax.scan(forward, x_MBTD, xs)
  loss_M, dx_MBTD = jax.lax.map(
    lambda a: jax.value_and_grad(head_loss)(*a),
    (x_MBTD, tokens_MBT, valid_MB),
  )
  _, scores = jax.lax.scan(reverse, cut(dx_MBTD), (xs, ins, mids), reverse=True)
  losses_M = loss_M / jnp.sum(valid_MB, axis=1)
  return sharding.whole({"loss_M": losses_M, "scores": scores}, mesh)


def unit_scores(
  gram_CC: jax.Array,
  hessian_DD: jax.Array,
  weight_CD: jax.Array,
  ridge: jax.Array,
  units: int,
) -> jax.Array:
  """trace(B_JJ^-1 W_J H W_J^T) of each unit, [units], float32.

  Args:
    gram_CC: G of the matrix's input, mean over tokens.
    hessian_DD: H of its output, summed over tokens.
    weight_CD: W; the rows of a unit follow one another.
    ridge: in units of G's median diagonal.
  """
  C = weight_CD.shape[0]
  J = C // units
  lower_CC, scale_C = linear_algebra.factor(gram_CC, ridge)
  # B = scale^-1 (L L^T)^-1 scale^-1, so that B_JJ^-1 is scaled the other way.
  inverse_CC = jax.scipy.linalg.cho_solve((lower_CC, True), jnp.eye(C))
  scaled_CD = weight_CD.astype(jnp.float32) * scale_C[:, None]
  right_CD = linear_algebra.product("cd,de->ce", scaled_CD, hessian_DD)
  if J == 1:
    energy_C = jnp.sum(right_CD * scaled_CD, axis=-1)
    return energy_C / jnp.diagonal(inverse_CC)
  split = lambda x: x.reshape(units, J, -1)
  curvature_UJJ = linear_algebra.product(
    "ujd,uid->uji", split(right_CD), split(scaled_CD)
  )
  index = jnp.arange(units)
  inverse_UJJ = inverse_CC.reshape(units, J, units, J)[index, :, index]
  solved = jnp.linalg.solve(inverse_UJJ, curvature_UJJ)
  return jnp.trace(solved, axis1=1, axis2=2)
