"""Minitron: keep what is active; drop layers by the loss (arXiv 2407.14679).

Forward passes only. A channel that `o` or `down` reads is worth the 2-norm over
sequences of its mean magnitude over tokens, which the paper found best; a KV
group the 2-norm of its channels. All layers get the same share, once, so that
the result has one shape but for the channels that meet the target exactly.
Layers go before (`prune.minitron.depth` of them, none by default: the paper
prefers width at its sizes): those without which the loss rises least, measured
one at a time on the whole model.

The published code ranks query heads inside their groups and keeps all KV heads;
the unit here is the KV group. It also cuts the residual width, by the same
statistic of the norms' outputs; here no method but SliceGPT touches it, so more
of the target falls on heads and channels. The paper then distils from the
original: `train.distill_alpha=1`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import WRITERS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  allotment,
  backward,
  exact_target,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.baselines import activations, shortgpt
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
  PruneTask,
  Scores,
)


def check(config: ModelConfig, settings: Prune) -> None:
  """Raises a UserError if no layer would be left."""
  depth, L = settings.minitron.depth, config.num_layers
  if depth >= L:
    raise UserError(
      f"--config.prune.minitron.depth={depth} drops all of the model's {L} "
      f"layers: give at most {L - 1}"
    )


def prepare(task: PruneTask) -> PruneTask:
  """The task as it is.

  Raises:
    UserError: a target out of reach.
  """
  exact_target.check_target(task)
  if not task.settings.minitron.depth:
    exact_target.check_reachable(task, task.settings.rounding())
  return task


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores of the units; of the layers the loss without each, if some go."""
  losses_L = None
  if masked.task.settings.minitron.depth:
    losses_L = losses_without(masked, tokens_NT)
  return Measured(unit_scores(masked, tokens_NT), importance_L=losses_L)


def allot(masked: Masked, measured: Measured) -> Allotted:
  """The layers that go, and of the others the same share.

  Raises:
    UserError: without these layers the model is below its target already, or
      not even the smallest width reaches it.
  """
  task, width = masked.task, surgery.widths(masked.masks)
  layers = _layers_to_drop(masked, measured)

  def without(number: int) -> tuple[Counts, int]:
    counts = shortgpt.dropping(masked, layers[:number])
    left = {u: w - counts[u] for u, w in width.items()}
    return counts, surgery.count_widths(task.full, left)

  number = len(layers)
  while without(number)[1] < task.target and not _is_last(task):
    number -= 1  # the others in later stages
  counts, size = without(number)
  if size < task.target:
    raise UserError(
      f"--config.prune.minitron.depth={task.settings.minitron.depth} leaves "
      f"{size:,} parameters, below the target {task.target:,}: drop fewer "
      "layers, or lower the target"
    )
  share = allotment.same_share(task, masked.masks)

  def counts_at(ratio: float) -> Counts:
    return {u: np.maximum(counts[u], n) for u, n in share(ratio).items()}

  found = allotment.by_ratio(masked, measured, counts_at)
  return dataclasses.replace(found, importance_L=measured.importance_L)


def _is_last(task: PruneTask) -> bool:
  """Whether it is not a stage before the last."""
  if not task.settings.has_target():
    return True
  return task.target <= targets.resolve_target(task.full, task.settings)


def _layers_to_drop(masked: Masked, measured: Measured) -> np.ndarray:
  """So many that `depth` of the original's layers are gone."""
  task, width = masked.task, surgery.widths(masked.masks)
  gone = np.count_nonzero(width["K"] + width["F"] == 0)
  wanted = max(task.settings.minitron.depth - gone, 0)
  there = np.flatnonzero(shortgpt.droppable(masked))
  if len(there) < wanted:
    raise UserError(
      f"--config.prune.minitron.depth={task.settings.minitron.depth}: only "
      f"{len(there)} layers may be dropped "
      "(--config.prune.attention_layers, .mlp_layers)"
    )
  if not wanted:
    return there[:0]
  return there[np.argsort(measured.importance_L[there], kind="stable")][:wanted]


# ---- What is measured --------------------------------------------------------


def unit_scores(masked: Masked, tokens_NT: np.ndarray) -> Scores:
  """2-norms over sequences, and over a group's channels, of mean magnitudes."""
  task, pair, masks = masked.task, activations.pair(masked), masked.masks
  total = {u: [0.0] * task.full.num_layers for u in UNITS}
  for tokens_BT, valid_B in activations.batches(
    tokens_NT, task.batch, task.mesh
  ):
    x_BTD = activations.embed(*pair, tokens_BT, task.mesh)
    for i in range(task.full.num_layers):
      for u in UNITS:
        x_BTD, y = activations.half(*pair, i, u, x_BTD, task.mesh, masks[u][i])
        found = _magnitudes(y, valid_B, mesh=task.mesh)
        total[u][i] += found.astype(np.float64)
  return {
    u: np.sqrt([t.reshape(m.shape[1], -1).sum(1) for t in total[u]])
    for u, m in masks.items()
  }


def losses_without(masked: Masked, tokens_NT: np.ndarray) -> np.ndarray:
  """The mean next-token loss without each of the layers in turn, [L]."""
  task = masked.task
  tokens_MBT, valid_MB = placement.minibatches(tokens_NT, task.batch, task.mesh)
  config, L = surgery.dense(task.full), task.full.num_layers
  found = []
  for layer in range(L):
    masks = {u: m.copy() for u, m in masked.masks.items()}
    for mask_LU in masks.values():
      mask_LU[layer] = False
    placed = placement.replicate(masks, task.mesh)
    loss = _loss(
      config, masked.stacked, placed, tokens_MBT, valid_MB, mesh=task.mesh
    )
    found.append(float(loss) / len(tokens_NT))
  return np.array(found)


@activations.reduced
def _magnitudes(y: jax.Array, valid_B: jax.Array) -> jax.Array:
  """Sum over sequences of squared mean magnitudes of channels."""
  mean = jnp.mean(jnp.abs(y.astype(jnp.float32)), axis=1)
  return jnp.sum(mean**2 * valid_B.reshape(-1, *[1] * (mean.ndim - 1)), axis=0)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _loss(
  config: ModelConfig,
  stacked: Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  *,
  mesh: Mesh,
) -> jax.Array:
  """The loss summed over sequences; a half without units adds no bias."""
  layers = dict(stacked["layers"])
  for u, writer in WRITERS.items():
    if (bias := f"{writer}_bias") in layers:
      layers[bias] *= jnp.any(masks[u], axis=1)[:, None]
  model = backward.Stacked(config, stacked | {"layers": layers}, masks, mesh)
  counts_MB = valid_MB.astype(jnp.float32)
  found = backward.walk(model, tokens_MBT, valid_MB, counts_MB)
  return sharding.whole(jnp.sum(found.loss_M), mesh)
