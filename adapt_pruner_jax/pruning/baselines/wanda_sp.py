"""Wanda-sp: weights times the size of their inputs, layer after layer.

The structured form of Wanda (arXiv 2306.11695) that FLAP's authors compare
with: an input channel of `o` or `down` scores mean |weight| x 2-norm of the
channel, a KV group the sum over its channels; every layer loses the same share.
Layers are pruned in order, each measured on what the pruned ones before it
give. Nothing compensates. Units of GQA as in `flap`.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery, targets, task
from adapt_pruner_jax.pruning.baselines import activations, budget, flap
from adapt_pruner_jax.pruning.surgery import Kept
from adapt_pruner_jax.pruning.task import Pruned, Samples, Step


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
  ratio: float | None = None,
  weights_only: bool = False,
) -> Pruned:
  """Prunes a model to `target` parameters.

  Arguments as of `prune.prune`; an interrupted call starts again.

  Args:
    ratio: prune this share of the units, whatever size results.
    weights_only: score by the 2-norms of the weights alone ("mag-sp").

  Raises:
    UserError: a bad layer range, or a target out of reach.
  """
  budget.check_target(target, ratio)
  full, kept, mesh = budget.defaults(config, full, kept, mesh)
  prunable = targets.prunable_modules(full, settings)
  before = surgery.to_masks(kept, full)
  if ratio is None:
    nothing = dict.fromkeys(UNITS, 0)
    budget.check_reachable(full, before, prunable, target, nothing)
  # How many go does not depend on the scores, which are not known yet.
  equal = {u: np.zeros(m.shape) for u, m in before.items()}
  uniform = dataclasses.replace(settings, flap_structure="ULUM")
  counts_at = flap.counter(full, before, equal, prunable, uniform)
  if ratio is None:
    masks = budget.solve(
      full,
      before,
      equal,
      counts_at,
      prunable,
      target,
      settings.round_ffn_to,
    )
    was, now = surgery.widths(before), surgery.widths(masks)
    counts = {u: was[u] - now[u] for u in UNITS}
  else:
    counts = counts_at(ratio)
  keep = surgery.everything(config)
  tokens_NT = samples(0)
  for layer in range(config.num_layers):
    scores = layer_scores(
      config, params, keep, layer, tokens_NT, batch, mesh, weights_only
    )
    for u, score in scores.items():
      gone = np.argsort(score, kind="stable")[: counts[u][layer]]
      left = np.delete(np.arange(len(score)), gone)
      keep[u] = (*keep[u][:layer], left, *keep[u][layer + 1 :])
  left = {
    u: tuple(k[i] for k, i in zip(kept[u], keep[u], strict=True)) for u in UNITS
  }
  masks = surgery.to_masks(left, full)
  config, params = surgery.gather(config, params, keep, mesh)
  step = budget.step(1, full, before, masks, surgery.count(full, masks))
  record = task.record(step)
  if log is not None:
    log(record, step)
  return Pruned(config, params, left, [record])


def layer_scores(
  config: ModelConfig,
  params: Params,
  keep: Kept,
  layer: int,
  tokens_NT: np.ndarray,
  batch: int,
  mesh: Mesh,
  weights_only: bool,
) -> dict[str, np.ndarray]:
  """Scores of the units of a layer, [K] and [F], behind pruned layers.

  Args:
    keep: units that are left in the layers before, as `config` numbers them.
  """
  masks = {
    u: [np.isin(np.arange(n), k) for n, k in zip(sizes, keep[u], strict=True)]
    for u, sizes in config.units().items()
  }
  square = dict.fromkeys(UNITS, 0.0)
  for tokens_BT, valid_B in activations.batches(tokens_NT, batch, mesh):
    if weights_only:
      break
    x_BTD = activations.embed(config, params, tokens_BT, mesh)
    for i in range(layer + 1):
      for u in UNITS:
        mask = None if i == layer else masks[u][i]
        x_BTD, y = activations.half(config, params, i, u, x_BTD, mesh, mask)
        if i == layer and y is not None:
          square[u] += _square(y, valid_B, mesh=mesh).astype(np.float64)
  scores = {}
  for u in UNITS:
    if not config.units()[u][layer]:
      scores[u] = np.zeros(0)
      continue
    weight = params[axes.layer_name(layer)][flap.READER[u]]
    size, norm = flap.weight_sizes(weight, mesh=mesh)
    score = np.sqrt(norm) if weights_only else size * np.sqrt(square[u])
    scores[u] = score.reshape(config.units()[u][layer], -1).sum(axis=1)
  return scores


@activations.reduced
def _square(y, valid_B):
  """Sum of squares of each channel, over all tokens."""
  y = y.astype(jnp.float32) * valid_B.reshape(-1, *[1] * (y.ndim - 1))
  return jnp.sum(y**2, axis=(0, 1))
