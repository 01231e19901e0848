"""Allotment by search: counts are tried out on the masked model.

Units of each module are ranked once, by any score; a candidate is how many of
each module stay, and its masks are data, so that all candidates share one
compiled program. What is minimised is the divergence from the dense model,
KL(dense || masked) in nats a token, on tokens of the step, or of a tuning text
of its own (`prune.search.source`). The search climbs
from the best of a few starts: a candidate that is better replaces the one that
it was made from (as evolution of one parent and one child).

Tyr-the-Pruner (arXiv 2503.09657) also searches how much goes where, over copies
of pruned layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import agreement, placement, stopping
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import attention_inputs, places, run_layer
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  allotment,
  budgets,
  choice,
  ends,
  exact_target,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
)
from adapt_pruner_jax.training import output_loss

NEIGHBOURS = 4  # layers whose MLPs a candidate changes together, at most
SHARE = (0.02, 0.13)  # of an MLP's channels that a candidate moves
GROUP = 0.3  # probability that a candidate moves KV groups


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
  """What may be searched.

  Attributes:
    full: sizes of the original.
    masks: units that are left.
    prunable: modules that may lose units.
    target: of the budget, to end at.
    settings: say what is counted, and what widths become multiples of.
  """

  full: ModelConfig
  masks: Masks
  prunable: Masks
  target: int
  settings: Prune

  @property
  def rounding(self) -> dict[str, int]:
    """What widths become multiples of, by unit letter."""
    return self.settings.rounding()


def search(masked: Masked, measured: Measured) -> Allotted:
  """The best counts that `prune.search.evaluations` candidates have shown.

  In `prune.search.steps` steps of equally many parameters. The same seed, step
  and tokens give the same counts.

  Raises:
    UserError: there is no target, or it is out of reach.
  """
  task, settings = masked.task, masked.task.settings
  goal = allotment.step_goal(masked, settings.search.steps)
  space = Space(
    task.full,
    masked.masks,
    targets.prunable_modules(task.full, settings),
    goal,
    settings,
  )
  order = choice.order(measured.scores, masked.masks)
  divergence = _divergence(masked)
  rise = lambda c: divergence(choice.remove(masked.masks, order, c))
  random = np.random.default_rng((task.seed % 2**32, masked.number))
  found = [(rise(c), c) for c in starts(space, measured)]
  best, counts = min(found, key=lambda f: f[0])
  begun = best
  for _ in range(settings.search.evaluations - len(found)):
    child = candidate(space, counts, random)
    if child is None or all((child[u] == counts[u]).all() for u in UNITS):
      continue
    value = rise(child)
    if value < best:
      best, counts = value, child
  facts = {"evaluations": settings.search.evaluations}
  facts |= {"start": begun, "end": best}
  return Allotted(counts, facts=facts)


def starts(space: Space, measured: Measured) -> list[Counts]:
  """Counts to begin with: the ranking's, the same share of every MLP, and the
  means of the two, with the ranking's KV groups and with all."""
  ranked = allotment.choose(
    space.full,
    measured.scores,
    space.masks,
    space.prunable,
    space.target,
    space.target,
    settings=space.settings,
  )
  left = surgery.widths(space.masks)
  none = np.zeros_like(left["K"])
  even = met(space, {"K": none, "F": np.zeros_like(left["F"])})
  # Where the MLPs alone cannot reach the target, the ranking is all there is.
  wanted = [ranked]
  if even is not None:
    mean = (ranked["F"] + even["F"]) // 2
    wanted += [even, {"K": none, "F": mean}, {"K": ranked["K"], "F": mean}]
  found = [met(space, w) for w in wanted]
  found = [c for c in found if c is not None]
  if not found:
    least = _size(space, ranked)
    raise exact_target.unreachable(space.target, least, space.settings)
  return found


def candidate(
  space: Space, counts: Counts, random: np.random.Generator
) -> Counts | None:
  """Counts near others, at the target; None if they cannot meet it.

  Either a KV group of one layer goes or comes back, or some channels of up to
  four neighbouring MLPs do; all other MLPs make up for it.
  """
  left = surgery.widths(space.masks)
  counts = {u: n.copy() for u, n in counts.items()}
  unit = "K" if random.random() < GROUP else "F"
  layers = np.flatnonzero(space.prunable[unit] & (left[unit] > 1))
  if not len(layers):
    return None
  first = random.integers(len(layers))
  sign = random.choice((-1, 1))
  if unit == "K":
    counts["K"][layers[first]] += sign * space.rounding["K"]
  else:
    some = layers[first : first + random.integers(1, NEIGHBOURS + 1)]
    counts["F"][some] += (
      sign * random.uniform(*SHARE) * left["F"][some]
    ).astype(int)
  return met(space, counts)


def met(space: Space, counts: Counts) -> Counts | None:
  """Counts that end at the target, within a channel; None if none do.

  The widths that `counts` leave of the prunable MLPs are scaled alike.
  """
  left = surgery.widths(space.masks)
  rounding, most = space.rounding, {}
  for u in UNITS:
    least = np.minimum(left[u], rounding[u])
    most[u] = np.where(space.prunable[u], left[u] - least, 0)
  counts = {u: np.clip(counts[u], 0, most[u]) for u in UNITS}
  keep = np.maximum(left["F"] - counts["F"], 1)

  def at(scale: float) -> Counts:
    gone = np.clip(left["F"] - np.floor(keep * scale).astype(int), 0, most["F"])
    both = {"K": counts["K"], "F": gone}
    return exact_target.rounded(both, space.masks, rounding)

  low, high = 0.0, float(max(left["F"] / keep))
  if _size(space, at(low)) > space.target:
    return None
  for _ in range(40):
    middle = (low + high) / 2
    if _size(space, at(middle)) > space.target:
      high = middle
    else:
      low = middle
  # Between the two scales lies less than a block of every MLP.
  return exact_target.trim(
    *(space.full, space.masks, at(low), space.prunable, space.target),
    space.settings,
  )


def _size(space: Space, counts: Counts) -> int:
  left = surgery.widths(space.masks)
  width = {u: left[u] - counts[u] for u in UNITS}
  return budgets.of_widths(space.full, width, space.settings)


# ---- The divergence ----------------------------------------------------------


def _divergence(masked: Masked):
  """Of masks: the divergence of the masked model from the task's, in nats."""
  task = masked.task
  tokens_NT = (task.tuning or task.samples)(masked.step.number)
  wanted = task.settings.search.tokens
  if wanted > tokens_NT.size:
    raise UserError(
      f"--config.prune.search.tokens={wanted} is more than the "
      f"{tokens_NT.size} calibration tokens of a step: lower it, or give more "
      "--config.calibration.samples"
    )
  rows = -(-wanted // tokens_NT.shape[1])
  some_NT = tokens_NT[np.linspace(0, len(tokens_NT) - 1, rows).astype(int)]
  tokens_MBT, valid_MB = placement.minibatches(some_NT, task.batch, task.mesh)
  config = surgery.dense(task.full)
  place = partial(placement.replicate, mesh=task.mesh)
  dense = task.stacked()
  dense_MBTD = last_stream(
    config, dense, place(task.begin), tokens_MBT, mesh=task.mesh
  )
  outer = {n: dense[n] for n in model_config.outer_names(config)}
  given = tokens_MBT, valid_MB, dense_MBTD, outer

  def divergence(masks: Masks) -> float:
    stopping.moment()
    found = mean_divergence(
      config, masked.stacked, place(masks), *given, mesh=task.mesh
    )
    return agreement.from_writer(float(found))

  return divergence


@partial(jax.jit, static_argnames=("config", "mesh"))
def last_stream(
  config: ModelConfig,
  stacked: Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  *,
  mesh: Mesh | None = None,
) -> jax.Array:
  """The residual stream behind the last layer of a masked model, [M,B,T,D].

  Args:
    config: equal layers (`surgery.dense`).
    stacked: from `surgery.expand`.
    masks: units that count, bool (or gates, float) [L, K] and [L, F].
    tokens_MBT: M minibatches of B sequences.
    mesh: devices that minibatches are cut over.
  """
  inputs = attention_inputs(config, tokens_MBT.shape[-1])
  x_MBTD = ends.embed(config, stacked, tokens_MBT, mesh)

  def forward(x_MBTD, layer):
    weights, place, masks = placement.fetched(layer)
    one = lambda x: run_layer(config, weights, place, inputs, x, masks)[0]
    return jax.lax.map(one, x_MBTD), None

  layers = stacked["layers"], places(config), masks
  return jax.lax.scan(forward, x_MBTD, layers)[0]


@partial(jax.jit, static_argnames=("config", "mesh"))
def mean_divergence(
  config: ModelConfig,
  stacked: Params,
  masks: dict[str, jax.Array],
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  dense_MBTD: jax.Array,
  dense: Params,
  *,
  mesh: Mesh | None = None,
) -> jax.Array:
  """KL(dense || masked), nats a token, over all positions of the valid rows.

  Args:
    config, stacked, masks, tokens_MBT, mesh: as `last_stream`'s.
    valid_MB: False for rows that only pad.
    dense_MBTD: `last_stream` of the dense model, whose logits are made anew
      since they are too many to keep.
    dense: its params outside the layers.
  """
  x_MBTD = last_stream(config, stacked, masks, tokens_MBT, mesh=mesh)
  matrix = ends.output(config, stacked, mesh)
  dense_matrix = ends.output(config, dense, mesh)

  def one(minibatch):
    x_BTD, dense_BTD, valid_B = minibatch
    student = ends.normed(config, stacked, x_BTD), matrix
    teacher = ends.normed(config, dense, dense_BTD), dense_matrix
    weights_BT = jnp.broadcast_to(valid_B[:, None], x_BTD.shape[:2])
    return output_loss.divergence(
      (config, config), mesh, student, teacher, weights_BT
    )

  sums_M = jax.lax.map(one, (x_MBTD, dense_MBTD, valid_MB))
  return jnp.sum(sums_M) / (jnp.sum(valid_MB) * tokens_MBT.shape[-1])
