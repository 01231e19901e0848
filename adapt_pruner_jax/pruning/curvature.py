"""Curvature: remove what the rest of its matrix can stand in for.

The score of a unit is the second-order increase of the loss when it is removed
and the rest of the matrix that it feeds, `o` or `down`, is refitted (`refit`):

  s = trace(B_JJ^-1 W_J H W_J^T),   B = (G + ridge)^-1

with J the unit's input channels of the matrix W [C, D], G = mean of x x^T its
input's Gram matrix, and H = sum of g g^T over tokens, g the loss's gradient at
its output. For one channel it is w^T H w / B_cc, as in Optimal Brain Surgeon
with the Kronecker factors of K-FAC. Only activations and their gradients are
needed, and one layer's G exists at a time.

Scores of all modules have one unit of measure, so one ranking by score per
parameter replaces the schedule; no module may lose more than `cap` of its units
a step, which keeps the assumption of independent units honest. The score
says what can be reconstructed: use it with a refit.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import WRITERS, masked
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  backward,
  linear_algebra,
  ranking,
  refit,
  surgery,
  targets,
  task,
)
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import Pruned, Samples, Step

ENOUGH = 4  # tokens per input channel from which a weak ridge is best
WEAK, STRONG = 1e-3, 0.1


def prune(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  *,
  target: int | None = None,
  batch: int = 32,
  mesh: Mesh | None = None,
  full: ModelConfig | None = None,
  kept: Kept | None = None,
  seed: int = 0,
  after: Step | None = None,
  log: Callable[[dict, Step], None] | None = None,
) -> Pruned:
  """Prunes a model as `prune.prune` does, with the same arguments.

  With `settings.refit` a number, every so many steps what is left is refitted
  to the model that was given, on the tokens of the step; the refit at the
  end is the caller's. A call that goes on from a step (`after`) does the
  refits before it again, which gives the weights that it had.

  Raises:
    UserError: a model that cannot be refitted, a bad layer range, or a target
      out of reach.
  """
  del seed  # nothing is drawn
  linear_algebra.check(config)
  full, kept = full or config, kept or surgery.everything(config)
  mesh = mesh or sharding.one_device()
  begin = surgery.to_masks(kept, full)
  original = stacked = surgery.expand(config, params, kept, full, mesh)
  step = after or Step(0, begin, {}, surgery.count(full, begin))

  def refitted(masks: Masks, tokens: np.ndarray) -> tuple[Params, list[dict]]:
    return _refit(
      full, original, stacked, begin, masks, tokens, batch, settings, mesh
    )

  for number, masks in step.refitted.items():
    stacked, _ = refitted(masks, samples(number - 1))
  trace = []
  while not _done(step, settings, target):
    tokens = samples(step.number)
    step = _next_step(
      full, stacked, settings, tokens, target, batch, mesh, begin, step
    )
    refits = {}
    if _refits(settings, step.number) and not _done(step, settings, target):
      stacked, refits["refit"] = refitted(step.masks, tokens)
      at = step.refitted | {step.number: step.masks}
      step = dataclasses.replace(step, refitted=at)
    trace.append(task.record(step) | refits)
    if log is not None:
      log(trace[-1], step)
  left = surgery.to_kept(step.masks)
  return Pruned(*surgery.compact(stacked, left, full, mesh), left, trace)


def _next_step(
  full: ModelConfig,
  stacked: Params,
  settings: Prune,
  tokens: np.ndarray,
  target: int | None,
  batch: int,
  mesh: Mesh,
  begin: Masks,
  after: Step,
) -> Step:
  """Removes `curvature_step` of the full model's parameters, or a bit more.

  Args:
    stacked: the weights as the refits so far have left them.
    begin: units at the start of the stage.
  """
  number = after.number + 1
  prunable = targets.prunable_modules(full, settings)
  tokens_MBT, valid_MB = placement.minibatches(tokens, batch, mesh)
  found = measure_step(
    surgery.dense(full),
    stacked,
    placement.replicate(after.masks, mesh),
    tokens_MBT,
    valid_MB,
    mesh=mesh,
  )
  found = jax.device_get(found)
  step_size = math.ceil(
    model_config.count_params(full) * settings.curvature_step
  )
  scores = {u: np.asarray(s, np.float64) for u, s in found["scores"].items()}
  _check_finite(scores, after.masks, number)
  counts = choose(
    full,
    scores,
    after.masks,
    prunable,
    after.params - step_size,
    target if target is not None else 0,
    cap=settings.cap,
    round_to=settings.round_ffn_to,
  )
  if not any(n.any() for n in counts.values()):
    raise UserError(
      f"pruning stopped at {after.params:,} parameters: nothing more can be "
      "removed from the layers that may be pruned; "
      + (
        "give more of them (--config.prune.attention_layers, .mlp_layers) or "
        "a larger target"
        if target
        else "lower --config.prune.max_steps"
      )
    )
  order = ranking.ranking(scores, after.masks)
  masks = ranking.remove(after.masks, order, counts)
  importance = _importance(full, scores, after.masks)
  return Step(
    number,
    masks,
    _sparsity(begin, masks),
    surgery.count(full, masks),
    after.refitted,
    losses_M=found["loss_M"],
    importance_L=np.mean([np.nan_to_num(importance[u]) for u in UNITS], axis=0),
    relative=importance,
    scores=scores,
  )


def _check_finite(
  scores: dict[str, np.ndarray], masks: Masks, number: int
) -> None:
  for u, s_LU in scores.items():
    bad = np.flatnonzero((masks[u] & ~np.isfinite(s_LU)).any(1))
    if len(bad):
      raise UserError(
        f"pruning step {number}: scores of layer {bad[0]}'s "
        f"{'MLP' if u == 'F' else 'attention'} are not finite: give more "
        "calibration tokens (--config.calibration.samples), or "
        "--config.model.dtype=float32"
      )


def _done(step: Step, settings: Prune, target: int | None) -> bool:
  if settings.max_steps and step.number >= settings.max_steps:
    return True
  return target is not None and step.params <= target


def _refits(settings: Prune, number: int) -> bool:
  return settings.refit.isdigit() and number % int(settings.refit) == 0


# ---- Which units go ----------------------------------------------------------


def choose(
  full: ModelConfig,
  scores: dict[str, np.ndarray],
  masks: Masks,
  prunable: Masks,
  aim: int,
  target: int,
  cap: float = 1.0,
  round_to: int = 1,
) -> dict[str, np.ndarray]:
  """Units to remove from each module, {"K": int [L], "F": ...}.

  One ranking of all modules by score per parameter. Units go until `aim`
  parameters are left, and never below `target` by an MLP channel (block of
  `round_to`) or more, as long as there are channels: a KV group that would is
  passed over. At least one unit (block) stays in each module.

  Args:
    scores: [L, K] and [L, F]; those of removed units mean nothing.
    prunable: modules that may lose units, bool [L] each.
    cap: most that a module may lose, as a share of its units; at least one.
  """
  cost = model_config.unit_cost(full)
  left, size = surgery.widths(masks), surgery.count(full, masks)
  aim = max(aim, target)
  found = []  # (score per parameter, unit, layer, number of units)
  for u in UNITS:
    block = round_to if u == "F" else 1
    for layer in np.flatnonzero(prunable[u]):
      width = int(left[u][layer])
      score = np.sort(scores[u][layer][masks[u][layer]], kind="stable")
      most, taken = max(int(cap * width), 1), 0
      while width - taken > block:
        n = (width - taken) % block or block
        if taken and taken + n > most:
          break
        price = score[taken : taken + n].mean() / cost[u]
        found.append((price, u, int(layer), n))
        taken += n
  # Ties: attention before MLP of the same layer, then the lower index.
  found.sort(key=lambda a: (a[0], a[2], a[1] != "K"))
  counts = {u: np.zeros(full.num_layers, np.int64) for u in UNITS}
  fine = any(a[1] == "F" for a in found)
  for _, u, layer, n in found:
    if size <= aim:
      break
    if u == "K" and fine and size - n * cost[u] < target:
      continue
    counts[u][layer] += n
    size -= n * cost[u]
  return counts


def _importance(full, scores, masks) -> dict[str, np.ndarray]:
  """Mean score per parameter of each module, over the largest; [L] each."""
  cost = model_config.unit_cost(full)
  mean = {
    u: np.array(
      [
        s[m].mean() / cost[u] if m.any() else np.nan
        for s, m in zip(scores[u], masks[u], strict=True)
      ]
    )
    for u in UNITS
  }
  most = np.nanmax(np.concatenate(list(mean.values())))
  return {u: m / most if most else m for u, m in mean.items()}


def _sparsity(begin: Masks, masks: Masks) -> dict[str, np.ndarray]:
  """Share of each module's units that the stage has removed, [L] each."""
  first, now = surgery.widths(begin), surgery.widths(masks)
  return {u: 1 - now[u] / np.maximum(first[u], 1) for u in UNITS}


def _refit(
  full, original, stacked, begin, masks, tokens, batch, settings, mesh
) -> tuple[Params, list[dict]]:
  """Stacked params refitted to the original ones, and the records."""
  config = surgery.dense(full)
  begin = placement.replicate(begin, mesh)
  placed = placement.replicate(masks, mesh)

  def layer_at(i: int):
    return (
      _layer(original["layers"], begin, i),
      _layer(stacked["layers"], placed, i),
      {u: m[i] for u, m in masks.items()},
    )

  outer = {n: stacked[n] for n in model_config.outer_names(config)}
  new, records = dict(stacked["layers"]), []
  for i, changed, found in refit.layers(
    config, outer, layer_at, tokens, batch, settings.refit_ridge, False, mesh
  ):
    for n, weight in changed.items():
      new[n] = _set(new[n], weight, i)
    records += found
  return stacked | {"layers": new}, records


@jax.jit
def _layer(layers: Params, masks: dict[str, jax.Array], i) -> Params:
  """Layer i of stacked params, zero where units are masked."""
  masks = {u: m[i] for u, m in masks.items()}
  return {n: axes.mask(n, w[i], masks) for n, w in layers.items()}


@jax.jit
def _set(stacked, weight, i):
  return stacked.at[i].set(weight)


# ---- Scores ------------------------------------------------------------------


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
  found = backward.walk(
    backward.Stacked(config, stacked, masks, mesh),
    tokens_MBT,
    valid_MB,
    valid_MB.astype(jnp.float32),
    _grams(jnp.sum(valid_MB) * tokens_MBT.shape[-1], mesh),
  )
  losses_M = found.loss_M / jnp.sum(valid_MB, axis=1)
  return sharding.whole({"loss_M": losses_M, "scores": found.kept}, mesh)


def _grams(tokens: jax.Array, mesh: Mesh) -> backward.Visitor:
  """Sums Gram matrices: of a writing matrix's input, and of the gradient at its
  output; keeps the scores of its units.

  Args:
    tokens: how many the sums are over.
  """

  def matrix(half):
    writer = WRITERS[half.unit]
    return linear_algebra.as_matrix(writer, half.weights[writer])

  def start(half):
    return tuple(jnp.zeros((n, n), jnp.float32) for n in matrix(half).shape)

  def run(half, x_BTD):
    y_BTD, tap = half.run(x_BTD)
    fed = tap.fed[half.unit]
    return y_BTD, fed * masked(half.masks[half.unit], fed)

  def add(half, total, x_BTD, dy_BTD, valid_B):
    _, vjp, fed = jax.vjp(lambda x: run(half, x), x_BTD, has_aux=True)
    g_BTD = dy_BTD.astype(jnp.float32) * half.config.residual_scale
    fed_BTC = fed.reshape(*fed.shape[:2], -1).astype(jnp.float32)
    fed_BTC *= valid_B[:, None, None]
    found = (
      linear_algebra.product("btc,bte->ce", fed_BTC, fed_BTC),
      linear_algebra.product("btd,bte->de", g_BTD, g_BTD),
    )
    return jax.tree.map(jnp.add, total, found), vjp(dy_BTD)[0]

  def finish(half, sums):
    gram_CC, hessian_DD = sharding.whole(sums, mesh)
    weight_CD, mask_U = matrix(half), half.masks[half.unit]
    live = jnp.sum(mask_U) * (weight_CD.shape[0] // mask_U.shape[0])
    ridge = jnp.where(tokens >= ENOUGH * live, WEAK, STRONG)
    gram_CC = gram_CC / tokens
    return unit_scores(gram_CC, hessian_DD, weight_CD, ridge, len(mask_U))

  return backward.Visitor(start, add, finish)


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
