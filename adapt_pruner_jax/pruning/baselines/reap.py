"""REAP: whole experts go, those that say least where they are asked.

Lasby et al., arXiv 2510.13999. An expert is worth the mean, over the tokens
that the router sends to it, of the router's weight times the norm of what it
says.
The lowest of each layer go, as many in each, with their rows of the router:
what is left is what a router logit of minus infinity for them would give.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, experts, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import exact_target, surgery, targets
from adapt_pruner_jax.pruning.baselines import activations
from adapt_pruner_jax.pruning.task import (
  Masked,
  Pruned,
  PruneTask,
  Step,
  in_one_step,
)


def check(config: ModelConfig, settings: Prune) -> None:
  """Raises a UserError for what has no experts to lose, before any work."""
  if not config.experts:
    raise UserError(
      f"reap drops whole experts, and {config.family} has none: choose another "
      "--config.prune.method"
    )
  if settings.stages > 1:
    raise UserError(
      "reap drops all experts at once: give --config.prune.stages=1"
    )
  target = targets.resolve_target(config, settings)
  if target is not None:
    remaining(config, target)


def remaining(config: ModelConfig, target: int) -> int:
  """The largest number of experts in every layer that the target leaves.

  Raises:
    UserError: fewer than a token is sent to.
  """
  size = lambda n: model_config.count_params(with_experts(config, n))
  one = size(2) - size(1)
  left = min(config.experts, 1 + (target - size(1)) // one)
  if left < config.experts_per_token:
    least = size(config.experts_per_token)
    raise UserError(
      f"reap cannot reach {target:,} parameters: each token is sent to "
      f"{config.experts_per_token} of {config.experts} experts, and with as "
      f"few left in each layer the model has {least:,}; raise the target, or "
      "prune inside the experts (--config.prune.method=adapt)"
    )
  return left


def with_experts(config: ModelConfig, number: int) -> ModelConfig:
  """The config with so many experts in every layer."""
  return dataclasses.replace(config, experts=number)


def prune(task: PruneTask) -> Pruned:
  """Drops as many experts of each layer as the target asks for.

  Raises:
    UserError: no target, or one that is out of reach.
  """
  exact_target.check_target(task)
  number = remaining(task.config, task.target)
  worth_LX = measure(task)
  keep = [np.sort(np.argsort(-w, kind="stable")[:number]) for w in worth_LX]
  keep = agreement.from_writer(keep)
  config, params = cut(task.config, task.params, keep, task.mesh)
  rows = zip(task.kept["F"], keep, strict=True)
  kept = task.kept | {"F": tuple(f[x] for f, x in rows), "X": tuple(keep)}
  facts = {"experts": [x.tolist() for x in keep]}
  return in_one_step(task, config, params, kept, facts)


def measure(task: PruneTask) -> np.ndarray:
  """What the experts are worth, float64 [L, X]; 0 = never asked."""
  stacked = task.stacked()
  pair = activations.pair(Masked(task, stacked, Step(0, task.begin, {}, 0)))
  total_LX, rows_LX = np.zeros((2, task.config.num_layers, task.config.experts))
  tokens_NT = task.samples(0)
  for tokens_BT, valid_B in activations.batches(
    tokens_NT, task.batch, task.mesh
  ):
    x_BTD = activations.embed(*pair, tokens_BT, task.mesh)
    counts_T = np.repeat(valid_B, tokens_BT.shape[1]).astype(np.float32)
    for i in range(len(total_LX)):
      x_BTD, _ = activations.half(*pair, i, "K", x_BTD, task.mesh)
      x_BTD, routed = activations.half(*pair, i, "F", x_BTD, task.mesh)
      down_XFE = pair[1][axes.layer_name(i)]["moe_down"]
      more = _added(routed, down_XFE, counts_T, mesh=task.mesh)
      total_LX[i] += more[0]
      rows_LX[i] += more[1]
  return total_LX / np.maximum(rows_LX, 1)


@activations.reduced
def _added(routed, down_XFE, counts_T):
  """Weight times norm, summed over each expert's rows; and its rows."""
  said_PE = experts.said(routed, down_XFE).astype(jnp.float32)
  counts_P = counts_T[routed.token_P]
  norm_P = jnp.linalg.norm(said_PE, axis=-1)
  weighted_P = routed.weight_P.astype(jnp.float32) * norm_P * counts_P
  add = lambda x_P: (
    jnp.zeros(len(down_XFE), jnp.float32).at[routed.expert_P].add(x_P)
  )
  return add(weighted_P), add(counts_P)


def cut(
  config: ModelConfig, params: Params, keep: Sequence[np.ndarray], mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """The model with these experts only, and their rows of the router.

  Args:
    config, params: the model.
    keep: of each layer, as many in each.
    mesh: where the arrays lie.
  """

  def one(name: str, layer: int | None, leaf: jax.Array) -> jax.Array:
    if layer is None or "X" not in axes.AXES[name]:
      return leaf
    return leaf.take(keep[layer], axis=axes.AXES[name].index("X"))

  cut_all = lambda params: axes.map_named(one, params)
  new = with_experts(config, len(keep[0]))
  return new, surgery.transform(cut_all, params, mesh)
