"""ShortGPT: drop the layers that change their input least (arXiv 2403.03853).

The block influence of a layer is 1 - the mean over tokens of the cosine of
the residual stream in front of and behind it. Measured once, on the whole
model; the lowest go first. The tools take the last layer's output behind the
final norm, which distorts its influence; here it is the stream itself.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import scores, surgery, task
from adapt_pruner_jax.pruning.baselines import activations, budget
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
  layers: int | None = None,
) -> Pruned:
  """Drops as few whole layers as bring the model to `target` parameters.

  A dropped layer stays in the numbering, with K = F = 0. Arguments as of
  `prune.prune`; an interrupted call starts again.

  Args:
    layers: drop this many, whatever size results.

  Raises:
    UserError: dropping all layers but one does not reach the target.
  """
  budget.check_target(target, layers)
  full, kept, mesh = budget.defaults(config, full, kept, mesh)
  influence_L = influence(config, params, samples(0), batch, mesh)
  before = masks = surgery.to_masks(kept, full)
  there = np.flatnonzero(sum(m.sum(axis=1) for m in masks.values()))
  order = there[np.argsort(influence_L[there], kind="stable")]
  dropped = 0
  while (
    surgery.count(full, masks) > target if layers is None else dropped < layers
  ):
    if dropped == len(order) - 1:
      raise UserError(
        f"shortgpt cannot reach {target:,} parameters: with one layer left "
        f"{surgery.count(full, masks):,} remain; raise the target"
      )
    masks = {u: m.copy() for u, m in masks.items()}
    for mask in masks.values():
      mask[order[dropped]] = False
    dropped += 1
  left = surgery.to_kept(masks)
  config, params = surgery.gather(
    config, params, surgery.relative_to(kept, left), mesh
  )
  for layer in order[:dropped]:
    # What is left of an absent layer, its output biases, would still add.
    name = axes.layer_name(layer)
    params[name] = {
      n: jnp.zeros_like(x) if n.endswith("bias") else x
      for n, x in params[name].items()
    }
  step = budget.step(
    1, full, before, masks, surgery.count(full, masks), importance_L=influence_L
  )
  record = task.record(step)
  if log is not None:
    log(record, step)
  return Pruned(config, params, left, [record])


def influence(
  config: ModelConfig,
  params: Params,
  tokens_NT: np.ndarray,
  batch: int,
  mesh: Mesh,
) -> np.ndarray:
  """Block influence of each layer, float64 [L]."""
  total_L = np.zeros(config.num_layers)
  for tokens_BT, valid_B in activations.batches(tokens_NT, batch, mesh):
    x_BTD = activations.embed(config, params, tokens_BT, mesh)
    for i in range(config.num_layers):
      y_BTD, _ = activations.half(config, params, i, "K", x_BTD, mesh)
      y_BTD, _ = activations.half(config, params, i, "F", y_BTD, mesh)
      total_L[i] += _change(x_BTD, y_BTD, valid_B, mesh=mesh)
      x_BTD = y_BTD
  return total_L / tokens_NT.size


@activations.reduced
def _change(x_BTD, y_BTD, valid_B):
  change_BT = 1 - scores.similarity(x_BTD, y_BTD, "cosine")
  return jnp.sum(change_BT * valid_B[:, None])
