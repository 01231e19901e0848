"""What a layer and a unit are worth: layer importance and group scores.

Both are taken in dense, stacked coordinates: params `[L, ...]` with the widest
layer's sizes, boolean masks over KV groups `[L, K]` and MLP channels `[L, F]`.
Shapes never change while a run prunes, so one executable serves every step of
every stage.

A Taylor score is |W * sum over minibatches of dLoss/dW|. The absolute value is
not linear, so one layer's gradient must be complete before it is reduced. The
minibatch loop is therefore inside a reverse scan over layers: one layer's
gradient exists at a time, and what is stored is the residual stream in front of
each half layer. Only gradients of scored matrices are taken.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.attention import attention_mask
from adapt_pruner_jax.models.decoder import Block, Decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.pruning.task import Masked, Measured

TAYLOR = ("taylor", "taylor_vectorize", "taylor_second", "taylor_mix")
SECOND = ("taylor_second", "taylor_mix")  # need each example's own gradient
KINDS = (*TAYLOR, "l1", "l2", "random")


def measure(masked: Masked, tokens_NT: np.ndarray, *, kind: str) -> Measured:
  """Unit scores of a kind, and the importance of each layer.

  Args:
    kind: one of KINDS. Random scores follow the task's seed and the step.
  """
  task, settings = masked.task, masked.task.settings
  tokens_MBT, valid_MB = placement.minibatches(tokens_NT, task.batch, task.mesh)
  found = measure_step(
    surgery.dense(task.full),
    masked.stacked,
    placement.replicate(masked.masks, task.mesh),
    tokens_MBT,
    valid_MB,
    kind=kind,
    measure=settings.layer_importance,
    mesh=task.mesh,
  )
  found = jax.device_get(found)
  if kind == "random":
    random = np.random.default_rng((task.seed % 2**32, masked.number))
    scores = {u: random.random(mask.shape) for u, mask in masked.masks.items()}
  else:
    scores = group_scores(
      found["salience"], masked.masks, kind, settings.gqa_fold
    )
  importance_L = np.asarray(found["importance_ML"], np.float64).sum(0)
  return Measured(scores, found["loss_M"], importance_L)


def with_importance(
  measure_units: Callable[[Masked, np.ndarray], Measured],
  masked: Masked,
  tokens_NT: np.ndarray,
) -> Measured:
  """What a score measures, with the importance of the layers beside it."""
  measured = measure_units(masked, tokens_NT)
  if measured.importance_L is not None:
    return measured
  forward = measure(masked, tokens_NT, kind="random")
  return dataclasses.replace(
    measured, importance_L=forward.importance_L, losses_M=forward.losses_M
  )


@partial(jax.jit, static_argnames=("config", "kind", "measure", "mesh"))
def measure_step(
  config: ModelConfig,
  stacked: axes.Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  *,
  kind: str,
  measure: str,
  mesh: Mesh | None = None,
) -> dict:
  """Losses, layer importances and salience of the masked model on one batch.

  Args:
    config: equal layers (`surgery.dense`): K and F are the stacked sizes.
    stacked: from `surgery.expand`.
    masks: {"K": bool [L, K], "F": bool [L, F]}, the units that are left.
    tokens_MBT: M minibatches of B sequences.
    valid_MB: False for rows that only pad the last minibatch.
    kind: one of config.CHOICES["prune.group_importance"].
    measure: one of config.CHOICES["prune.layer_importance"].
    mesh: devices that the batch is cut over.

  Returns:
    loss_M (mean over the minibatch's predictions), importance_ML (mean over
    its tokens), salience (of `salience_of`, without "random").
  """
  M, B, T = tokens_MBT.shape
  decoder = Decoder(config)
  layers = stacked["layers"]
  outer = {"params": {k: v for k, v in stacked.items() if k != "layers"}}
  block = Block(config, config.kv_groups[0], config.ffn_widths[0])
  rows_1T = jnp.arange(T)[None]
  ropes = jax.tree.map(
    lambda *tables: jnp.stack(tables), *config.rope_tables(rows_1T)
  )
  rope_id_L = jnp.asarray(config.rope_ids())
  window_L = jnp.asarray(config.window or (0,) * config.num_layers)
  tokens_share_MB = valid_MB / jnp.sum(valid_MB, axis=1, keepdims=True) / T

  def half(method, layer, mask, place, x_BTD):
    variables = {"params": layer}
    window, rope_id = place
    if method is Block.mlp:
      return block.apply(variables, x_BTD, mask, method=method)
    seen = None
    if any(config.window):
      seen = attention_mask(rows_1T, None, window)
    rope = tuple(table[rope_id] for table in ropes)
    return block.apply(variables, x_BTD, rope, seen, mask, method=method)

  def cut(x):
    if mesh is None:
      return x
    where = PartitionSpec(None, sharding.BATCH)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, where))

  def forward(x_MBTD, xs):
    layer, mask, place = xs

    def one(args):
      x_BTD, share_B = args
      mid_BTD = half(Block.attention, layer, mask, place, x_BTD)
      out_BTD = half(Block.mlp, layer, mask, place, mid_BTD)
      change_BT = similarity(x_BTD, out_BTD, measure)
      importance = -jnp.sum(share_B[:, None] * change_BT)
      return mid_BTD, out_BTD, importance

    mid, out, importance_M = jax.lax.map(one, (x_MBTD, tokens_share_MB))
    return cut(out), (x_MBTD, cut(mid), importance_M)

  def head_loss(x_BTD, tokens_BT, share_B):
    logits = decoder.apply(outer, x_BTD[:, :-1], method=Decoder.head)
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1)
    return -jnp.sum(share_B[:, None] * picked[..., 0]) * T / (T - 1)

  x_MBTD = cut(decoder.apply(outer, tokens_MBT, method=Decoder.embed))
  xs = (layers, masks, (window_L, rope_id_L))
  x_MBTD, (ins, mids, importance_LM) = jax.lax.scan(forward, x_MBTD, xs)
  result = {"importance_ML": importance_LM.T}
  if kind not in TAYLOR:
    losses = jax.lax.map(
      lambda a: head_loss(*a), (x_MBTD, tokens_MBT, tokens_share_MB)
    )
    result |= {"loss_M": losses, "salience": magnitude(layers, kind)}
    return sharding.whole(result, mesh)

  loss_M, dx_MBTD = jax.lax.map(
    lambda a: jax.value_and_grad(head_loss)(*a),
    (x_MBTD, tokens_MBT, tokens_share_MB),
  )

  def backward(method, unit, xs, x_MBTD, dy_MBTD):
    """Salience of one half layer, and the gradient in front of it."""
    layer, mask, place = xs
    scored = {n: layer[n] for n in axes.SCORED[unit]}

    def run(w, x_BTD):
      return half(method, layer | w, mask, place, x_BTD)

    def squares(x_BTD, dy_BTD, rows):
      """Sum over examples of their own gradients squared."""

      def example(x_TD, dy_TD):
        _, vjp = jax.vjp(lambda w: run(w, x_TD[None]), scored)
        return vjp(dy_TD[None])[0]

      dw_B = jax.vmap(example)(x_BTD, dy_BTD)  # of their shares of the loss
      return jax.tree.map(lambda d: jnp.sum((rows * d) ** 2, axis=0), dw_B)

    def one(total, args):
      x_BTD, dy_BTD, rows = args
      _, vjp = jax.vjp(run, scored, x_BTD)
      dw, dx_BTD = vjp(dy_BTD)
      found = [dw] + [squares(x_BTD, dy_BTD, rows)] * (kind in SECOND)
      return jax.tree.map(
        lambda t, d: t + d.astype(t.dtype), total, found
      ), dx_BTD

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), scored)
    zeros = [zeros] * (2 if kind in SECOND else 1)
    rows_M = valid_MB.sum(axis=1)
    sums, dx_MBTD = jax.lax.scan(one, zeros, (x_MBTD, dy_MBTD, rows_M))
    salience = {
      n: _per_unit(
        n, _taylor(w, *(s[n] for s in sums), rows_M=rows_M, kind=kind), kind
      )
      for n, w in scored.items()
    }
    return cut(dx_MBTD), salience

  def reverse(dx_MBTD, inputs):
    xs, x_MBTD, mid_MBTD = inputs
    dx_MBTD, mlp = backward(Block.mlp, "F", xs, mid_MBTD, dx_MBTD)
    dx_MBTD, attention = backward(Block.attention, "K", xs, x_MBTD, dx_MBTD)
    return dx_MBTD, mlp | attention

  _, salience = jax.lax.scan(
    reverse, cut(dx_MBTD), (xs, ins, mids), reverse=True
  )
  result |= {"loss_M": loss_M, "salience": salience}
  return sharding.whole(result, mesh)


def magnitude(layers: axes.Params, kind: str) -> dict[str, jax.Array]:
  """Salience without gradients: sums of |W| (l1) or W^2 (l2); {} for random."""
  if kind == "random":
    return {}
  names = axes.SCORED["K"] + axes.SCORED["F"]
  return {
    n: jax.vmap(partial(_per_unit, n, kind=kind))(layers[n]) for n in names
  }


def group_scores(
  salience: dict[str, np.ndarray],
  masks: dict[str, np.ndarray],
  kind: str,
  fold: str,
) -> dict[str, np.ndarray]:
  """Scores of KV groups [L, K] and MLP channels [L, F], float64 on the host.

  Matrices of a unit are summed (Taylor) or averaged (magnitude). A query
  head counts for the KV group that it attends with ("aligned"), or, as in the
  authors' code, for group `head mod groups`, heads and groups numbered among
  those that are left ("reference"). Values of masked units mean nothing.
  """
  salience = {n: np.asarray(s, np.float64) for n, s in salience.items()}
  aligned = fold == "aligned"
  for name in ("q", "o"):
    s_LKG = salience[name]
    salience[name] = (
      s_LKG.sum(-1) if aligned else _reference_fold(s_LKG, masks["K"])
    )
  combine = np.sum if kind in TAYLOR else np.mean
  return {
    unit: combine([salience[n] for n in names], axis=0)
    for unit, names in axes.SCORED.items()
  }


def _reference_fold(s_LKG: np.ndarray, mask_LK: np.ndarray) -> np.ndarray:
  """Credits query head h of a layer to KV group h mod (number of groups)."""
  folded_LK = np.zeros(s_LKG.shape[:2])
  for folded_K, s_KG, mask_K in zip(folded_LK, s_LKG, mask_LK, strict=True):
    heads = s_KG[mask_K].ravel()  # current numbering: group-major
    if len(heads):
      folded_K[mask_K] = heads.reshape(-1, mask_K.sum()).sum(0)
  return folded_LK


def similarity(x: jax.Array, y: jax.Array, measure: str) -> jax.Array:
  """Per token, float32; the importance of a layer is minus its mean."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  if measure == "cosine":
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-8)
  # Distances, not similarities: with the same minus as for the cosine the
  # authors prune a layer more the further it moves its input.
  order = {"euclidean": 2, "manhattan": 1}[measure]
  return jnp.linalg.norm(x - y, ord=order, axis=-1)


def _taylor(w, grad, square=None, *, rows_M, kind: str) -> jax.Array:
  """Salience of each weight: what its removal changes the loss by.

  To first order w g. To second order with the Fisher information A, the mean
  of the examples' squared gradients, in place of the Hessian's diagonal:
  w A w ("second") or w g - w A w / 2 ("mix"; LLM-Pruner, arXiv 2305.11627).
  """
  w = w.astype(jnp.float32)
  if kind not in SECOND:
    return w * grad
  curvature = w * (square / rows_M.sum()) * w
  if kind == "taylor_second":
    return curvature
  return w * grad / rows_M.size - curvature / 2  # grad: a sum of M means


def _per_unit(name: str, salience: jax.Array, kind: str) -> jax.Array:
  """Sums one layer's salience to [K, G] (q, o), [K] (k, v) or [F]."""
  letters = axes.AXES[name]
  salience = salience.astype(jnp.float32)
  if kind == "l2":
    salience = salience * salience
  elif kind != "taylor_vectorize":
    salience = jnp.abs(salience)
  width = next(x for x in letters if x in axes.RESIDUAL)
  channel = jnp.sum(salience, axis=letters.index(width))
  if kind == "taylor_vectorize":
    channel = jnp.abs(channel)
  letters = letters.replace(width, "")
  if "H" in letters:
    channel = jnp.sum(channel, axis=letters.index("H"))
  return channel
