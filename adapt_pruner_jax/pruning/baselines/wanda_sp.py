"""Wanda-sp: weights times the size of their inputs, layer after layer.

The structured form of Wanda (arXiv 2306.11695) that FLAP's authors compare
with: an input channel of `o` or `down` scores mean |weight| x 2-norm of the
channel, a KV group the sum over its channels; every layer loses the same share.
Layers are pruned in order, each measured on what the pruned ones before it
give. Nothing compensates. Units of GQA as in `flap`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import WRITERS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import allotment, choice, surgery, targets
from adapt_pruner_jax.pruning.baselines import activations, flap
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
  PruneTask,
)


def allot(masked: Masked, measured: Measured | None = None) -> Allotted:
  """The same share of each layer's units; scores do not matter."""
  del measured  # not known yet when `measure` asks
  total = surgery.widths(masked.masks)
  prunable = targets.prunable_modules(masked.task.full, masked.task.settings)
  equal = {u: np.zeros(m.shape) for u, m in masked.masks.items()}

  def counts_at(ratio: float) -> Counts:
    return {u: (ratio * total[u] * prunable[u]).astype(int) for u in UNITS}

  return allotment.by_ratio(masked, Measured(equal), counts_at)


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores of the units of each layer, behind pruned layers."""
  return in_order(masked, tokens_NT, allot(masked).counts)


def in_order(masked: Masked, tokens_NT: np.ndarray, counts: Counts) -> Measured:
  """The same when so many units go, {"K": int [L], "F": int [L]}."""
  masks = {u: m.copy() for u, m in masked.masks.items()}
  found = {u: np.zeros(m.shape) for u, m in masks.items()}
  task, pair = masked.task, activations.pair(masked)
  for layer in range(task.full.num_layers):
    scores = layer_scores(task, pair, masks, layer, tokens_NT)
    for u, score_U in scores.items():
      found[u][layer] = score_U
    now = {
      u: np.where(np.arange(len(n)) == layer, n, 0) for u, n in counts.items()
    }
    masks = choice.remove(masks, choice.order(found, masks), now)
  return Measured(found)


def layer_scores(
  task: PruneTask,
  pair: tuple[ModelConfig, Params],
  masks: Masks,
  layer: int,
  tokens_NT: np.ndarray,
) -> dict[str, np.ndarray]:
  """Scores of the units of a layer, [K] and [F].

  Args:
    pair: the model in dense coordinates, from `activations.pair`.
    masks: units that are left, in the layers before also after their removals.
  """
  (config, params), square = pair, dict.fromkeys(UNITS, 0.0)
  for tokens_BT, valid_B in activations.batches(
    tokens_NT, task.batch, task.mesh
  ):
    x_BTD = activations.embed(config, params, tokens_BT, task.mesh)
    for i in range(layer + 1):
      for u in UNITS:
        x_BTD, y = activations.half(
          config, params, i, u, x_BTD, task.mesh, masks[u][i]
        )
        if i == layer:
          square[u] += _square(y, valid_B, mesh=task.mesh).astype(np.float64)
  scores = {}
  for u in UNITS:
    weight = params[axes.layer_name(layer)][WRITERS[u]]
    size, _ = flap.weight_sizes(weight, mesh=task.mesh)
    score = size * np.sqrt(square[u])
    scores[u] = score.reshape(masks[u].shape[1], -1).sum(axis=1)
  return scores


@activations.reduced
def _square(y: jax.Array, valid_B: jax.Array) -> jax.Array:
  """Sum of squares of each channel, over all tokens."""
  y = y.astype(jnp.float32) * valid_B.reshape(-1, *[1] * (y.ndim - 1))
  return jnp.sum(y**2, axis=(0, 1))
