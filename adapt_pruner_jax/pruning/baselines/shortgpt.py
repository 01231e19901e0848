"""ShortGPT: drop the layers that change their input least (arXiv 2403.03853).

The block influence of a layer is 1 - the mean over tokens of the cosine of
the residual stream in front of and behind it. Measured once, on the whole
model; the lowest go first. The tools take the last layer's output behind the
final norm, which distorts its influence; here it is the stream itself.
"""

import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.layer import stream
from adapt_pruner_jax.pruning import (
  exact_target,
  scores,
  steps,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.baselines import activations
from adapt_pruner_jax.pruning.surgery import Kept
from adapt_pruner_jax.pruning.task import Allotted, Masked, Measured


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Block influence of each layer; its units share it."""
  task, total_L = masked.task, np.zeros(masked.task.full.num_layers)
  pair, masks = activations.pair(masked), masked.masks
  for tokens_BT, valid_B in activations.batches(
    tokens_NT, task.batch, task.mesh
  ):
    x_BTD = activations.embed(*pair, tokens_BT, task.mesh)
    for i in range(len(total_L)):
      y_BTD = x_BTD
      for unit in axes.UNITS:
        y_BTD, _ = activations.half(
          *pair, i, unit, y_BTD, task.mesh, masks[unit][i]
        )
      around = (stream(pair[0], x) for x in (x_BTD, y_BTD))
      total_L[i] += _change(*around, valid_B, mesh=task.mesh)
      x_BTD = y_BTD
  influence_L = total_L / tokens_NT.size
  spread = {
    u: np.broadcast_to(influence_L.reshape(-1, *(1,) * (m.ndim - 1)), m.shape)
    for u, m in masks.items()
  }
  return Measured(spread, importance_L=influence_L)


def allot(masked: Masked, measured: Measured) -> Allotted:
  """All units of as few layers as bring the model to its target.

  A dropped layer stays in the numbering, without units.

  Raises:
    UserError: dropping all layers but one, or all that may go, does not reach
      the target.
  """
  exact_target.check_target(masked.task)
  task, width = masked.task, surgery.widths(masked.masks)
  influence_L = measured.importance_L
  there = np.flatnonzero(droppable(masked))
  lowest = there[np.argsort(influence_L[there], kind="stable")]
  all_ = len(lowest) == np.count_nonzero(width["K"] + width["F"])
  for dropped in range(len(lowest) + (not all_)):
    counts = dropping(masked, lowest[:dropped])
    left = {u: w - counts[u] for u, w in width.items()}
    size = surgery.count_widths(task.full, left)
    if size <= task.target:
      return Allotted(counts, importance_L=influence_L)
  raise UserError(
    f"shortgpt cannot reach {task.target:,} parameters: without the {dropped} "
    f"layers that may go {size:,} remain; raise the target"
  )


def droppable(masked: Masked) -> np.ndarray:
  """Layers that are there and may go as a whole, bool [L]."""
  task, width = masked.task, surgery.widths(masked.masks)
  prunable = targets.prunable_modules(task.full, task.settings)
  may_L = width["K"] + width["F"] > 0
  for u in axes.UNITS:
    may_L &= prunable[u] | (width[u] == 0)
  return may_L


def dropping(masked: Masked, layers: np.ndarray) -> dict[str, np.ndarray]:
  """The counts that remove these layers."""
  width = surgery.widths(masked.masks)
  gone_L = np.isin(np.arange(masked.task.full.num_layers), layers)
  return {u: np.where(gone_L, w, 0) for u, w in width.items()}


def finish(masked: Masked, left: Kept, measured: Measured | None) -> steps.Pair:
  """The smaller pair; what is left of an absent layer adds nothing."""
  config, params = steps.gathered(masked, left, measured)
  for i in range(config.num_layers):
    if not config.kv_groups[i] and not config.ffn_widths[i]:
      name = axes.layer_name(i)
      params[name] = {
        n: jnp.zeros_like(x) if n.endswith("bias") else x
        for n, x in params[name].items()
      }
  return config, params


@activations.reduced
def _change(x_BTD, y_BTD, valid_B):
  change_BT = 1 - scores.similarity(x_BTD, y_BTD, "cosine")
  return jnp.sum(change_BT * valid_B[:, None])
