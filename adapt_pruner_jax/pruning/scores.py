"""What a layer and a unit are worth: layer importance and group scores.

Both are taken in dense, stacked coordinates: params `[L, ...]` with the widest
layer's sizes, boolean masks over KV groups `[L, K]` and MLP channels `[L, F]`.
Shapes never change while a run prunes, so one executable serves every step of
every stage.

A Taylor score is |W * sum over minibatches of dLoss/dW|. The absolute value is
not linear, so one layer's gradient must be complete before it is reduced: the
minibatch loop is inside the walk over layers (`backward`). Only gradients of
scored matrices are taken.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import backward, passes
from adapt_pruner_jax.pruning.task import Masked, Measured

TAYLOR = ("taylor", "taylor_vectorize", "taylor_second", "taylor_mix")
SECOND = ("taylor_second", "taylor_mix")  # need each example's own gradient
KINDS = (*TAYLOR, "l1", "l2", "random")


def measure(masked: Masked, tokens_NT: np.ndarray, *, kind: str) -> Measured:
  """Unit scores of a kind, and the importance of each layer.

  Args:
    kind: one of KINDS. Random scores follow the task's seed and the step.
  """
  settings = masked.task.settings
  how = {"kind": kind, "measure": settings.layer_importance}
  found = passes.run(PROGRAMS, masked, tokens_NT, **how)
  if kind == "random":
    random = np.random.default_rng((masked.task.seed % 2**32, masked.number))
    scores = {u: random.random(mask.shape) for u, mask in masked.masks.items()}
  else:
    scores = group_scores(
      found["salience"], masked.masks, kind, settings.gqa_fold
    )
  importance_L = np.asarray(found["importance_ML"], np.float64).sum(0)
  return Measured(scores, found["loss_M"], importance_L)


def measure_by(
  programs: passes.Programs, masked: Masked, tokens_NT: np.ndarray
) -> Measured:
  """Unit scores that a walk through the masked model keeps.

  Args:
    programs: of the walk, such as `curvature.PROGRAMS`, which keeps scores of
      halves too where they may go (`prune.whole_halves`).
  """
  halves = masked.task.settings.whole_halves
  how = {"halves": True} if halves else {}
  found = passes.run(programs, masked, tokens_NT, **how)
  kept, wide = found["scores"], lambda x: np.asarray(x, np.float64)
  if not halves:
    scores = {u: wide(s) for u, s in kept.items()}
    return Measured(scores, found["loss_M"])
  scores, pieces = ({u: wide(s[i]) for u, s in kept.items()} for i in (0, 1))
  return Measured(scores, found["loss_M"], halves=pieces)


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


def _measure_step(
  config: ModelConfig,
  stacked: axes.Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  *,
  kind: str,
  measure: str,
  mesh: Mesh | None = None,
  attention: str = "auto",
  hosted: bool = False,
  before: backward.Sums | None = None,
) -> dict:
  """Losses, layer importances and salience of the masked model on one batch.

  Args:
    config: equal layers (`surgery.dense`): K and F are the stacked sizes.
    stacked: from `surgery.expand`.
    masks: units that are left, as `surgery.Masks`.
    tokens_MBT: M minibatches of B sequences.
    valid_MB: False for rows that only pad the last minibatch.
    kind: one of KINDS.
    measure: one of config.CHOICES["prune.layer_importance"].
    mesh: devices that the batch is cut over.
    attention: as `prune.attention`.
    hosted: as `backward.Stacked`'s.
    before: as `backward.walk`'s.

  Returns:
    loss_M (mean over the minibatch's predictions), importance_ML (mean over
    its tokens), salience {parameter: [L, ...]} for `group_scores`; {} of
    "random". Of `before`, the sums so far in place of salience.
  """
  rows_M1 = jnp.maximum(jnp.sum(valid_MB, axis=1, keepdims=True), 1)
  tokens_share_MB = valid_MB / rows_M1
  found = backward.walk(
    backward.Stacked(config, stacked, masks, mesh, attention, hosted),
    tokens_MBT,
    valid_MB,
    tokens_share_MB,
    _visitor(tokens_MBT.shape[-1], mesh, kind, measure),
    partial(_importance, measure),
    before,
  )
  if kind in TAYLOR:
    told = _told(found.kept)
  else:
    told = {"salience": magnitude(stacked["layers"], kind)}
  measured = {"loss_M": found.loss_M, "importance_ML": found.observed.T}
  return backward.results(found, mesh, measured, told)


def _visitor(
  T: int, mesh: Mesh, kind: str, measure: str
) -> backward.Visitor | None:
  del T, mesh, measure
  return _taylor(kind) if kind in TAYLOR else None


def _told(kept: dict) -> dict:
  """The salience of both halves' parameters."""
  return {"salience": {n: s for half in kept.values() for n, s in half.items()}}


PROGRAMS = passes.programs(_measure_step, _visitor, _told, "kind", "measure")
measure_step = PROGRAMS.walk


def _importance(measure, x_BTD, out_BTD, share_B) -> jax.Array:
  """Of a layer: minus the similarity's part of a minibatch's mean."""
  change_BT = similarity(x_BTD, out_BTD, measure)
  return -jnp.sum((share_B / x_BTD.shape[1])[:, None] * change_BT)


def _taylor(kind: str) -> backward.Visitor:
  """Sums the gradients of a half's scored matrices; keeps their salience.

  Second-order kinds also sum the squares of each example's own gradient.
  """

  def scored(half):
    names = axes.SCORED[half.unit]
    return {n: half.weights[n] for n in names if n in half.weights}

  def start(half):
    zeros = jax.tree.map(
      lambda w: jnp.zeros(w.shape, jnp.float32), scored(half)
    )
    return [zeros] * (2 if kind in SECOND else 1)

  def squares(half, x_BTD, dy_BTD, rows):
    def example(x_TD, dy_TD):
      run = lambda w: half.run(x_TD[None], w)[0]
      return jax.vjp(run, scored(half))[1](dy_TD[None])[0]

    dw_B = jax.vmap(example)(x_BTD, dy_BTD)  # of their shares of the loss
    return jax.tree.map(lambda d: jnp.sum((rows * d) ** 2, axis=0), dw_B)

  def add(half, total, x_BTD, dy_BTD, valid_B, rows):
    del valid_B  # the gradients of rows that only pad are zero
    run = lambda w, x_BTD: half.run(x_BTD, w)[0]
    _, vjp = jax.vjp(run, scored(half), x_BTD)
    dw, dx_BTD = vjp(dy_BTD)
    found = [dw]
    if kind in SECOND:
      found.append(squares(half, x_BTD, dy_BTD, rows))
    plus = lambda t, d: t + d.astype(t.dtype)
    return jax.tree.map(plus, total, found), dx_BTD

  def finish(half, sums, seen):
    salience = {
      n: _expansion(w, [s[n] for s in sums], seen, kind)
      for n, w in scored(half).items()
    }
    return {n: _per_unit(n, s, kind) for n, s in salience.items()}

  return backward.Visitor(start, add, finish)


def magnitude(layers: axes.Params, kind: str) -> dict[str, jax.Array]:
  """Salience without gradients: sums of |W| (l1) or W^2 (l2); {} for random."""
  if kind == "random":
    return {}
  names = [n for unit in axes.UNITS for n in axes.SCORED[unit] if n in layers]
  return {
    n: jax.vmap(partial(_per_unit, n, kind=kind))(placement.fetched(layers[n]))
    for n in names
  }


def group_scores(
  salience: dict[str, np.ndarray],
  masks: dict[str, np.ndarray],
  kind: str,
  fold: str,
) -> dict[str, np.ndarray]:
  """Scores of KV groups [L, K] and MLP channels [L, F] (of experts [L, X, F]),
  float64 on the host.

  Matrices of a unit are summed (Taylor) or averaged (magnitude); those that a
  layer of another kind has are zero. A query
  head counts for the KV group that it attends with ("aligned"), or, as in the
  authors' code, for group `head mod groups`, heads and groups numbered among
  those that are left ("reference"). Values of masked units mean nothing.

  Args:
    salience: [L, K, G] of matrices of query heads, [L, K] of others of an
      attention or a delta net, [L, F] of an MLP's.
    masks: units that are left, [L, K] and [L, F].
    kind: one of KINDS but "random".
    fold: "aligned" or "reference".
  """
  of_units = {}
  for name, found in salience.items():
    mask_LU = masks[axes.unit_of(name)]
    s = np.zeros((*mask_LU.shape, *found.shape[mask_LU.ndim :]))
    s[:, : found.shape[1]] = found
    if {*axes.AXES[name]} & {*axes.QUERIES}:
      s = s.sum(-1) if fold == "aligned" else _reference_fold(s, mask_LU)
    of_units[name] = s
  return {
    unit: _combined([of_units[n] for n in names if n in of_units], kind)
    for unit, names in axes.SCORED.items()
  }


def _combined(matrices: list[np.ndarray], kind: str) -> np.ndarray:
  """The score of the matrices of a module, [L, U] each."""
  total_LU = np.sum(matrices, axis=0)
  if kind in TAYLOR:
    return total_LU
  of_units = tuple(range(1, total_LU.ndim))
  here_L = np.sum([m.any(axis=of_units, keepdims=True) for m in matrices], 0)
  return total_LU / np.maximum(here_L, 1)


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


def _expansion(w, sums, seen: backward.Sums, kind: str) -> jax.Array:
  """Salience of each weight: what its removal changes the loss by.

  To first order w g. To second order with the Fisher information A, the mean
  of the examples' squared gradients, in place of the Hessian's diagonal:
  w A w ("second") or w g - w A w / 2 ("mix"; LLM-Pruner, arXiv 2305.11627).
  """
  w, grad = w.astype(jnp.float32), sums[0]
  if kind not in SECOND:
    return w * grad
  curvature = w * (sums[1] / seen.rows) * w
  if kind == "taylor_second":
    return curvature
  return w * grad / seen.minibatches - curvature / 2  # grad: a sum of M means


def _per_unit(name: str, salience: jax.Array, kind: str) -> jax.Array:
  """Sums one layer's salience to its units and query heads.

  [K, G] of q, [K] of k, [F] of up, for instance.
  """
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
  inner = [letters.index(x) for x in letters if x in "HPAUY"]
  return jnp.sum(channel, axis=inner) if inner else channel
