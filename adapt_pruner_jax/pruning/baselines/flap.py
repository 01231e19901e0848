"""FLAP: remove what fluctuates least, put its mean back as a bias (2312.11983).

The statistics are of the inputs of `o` and `down`, of the model as it is now;
a pruned unit is replaced by its mean, which becomes a bias of the matrix that
read it. Every layer gains both biases, and they count as parameters.

The published code knows only models with as many KV heads as query heads. With
fewer, a unit here is a KV group with its own, contiguous query heads: its score
is the mean over its G * H channels, its weight in the global budget its size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import ranking, surgery, targets, task
from adapt_pruner_jax.pruning.baselines import activations, budget
from adapt_pruner_jax.pruning.baselines.budget import Counts
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import Pruned, Samples, Step

READER = {"K": "o", "F": "down"}  # the matrix whose inputs are measured
BIAS = {"K": "o_bias", "F": "down_bias"}


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Statistics of the channels of one unit letter in one layer, float64.

  Updated sequence by sequence as the published code does: the fluctuation
  uses the new mean, and the first sequence does not contribute.
  """

  sequences: int
  mean: np.ndarray  # [K, G, H] or [F]
  fluctuation: np.ndarray  # sums over the tokens of a sequence, as is
  square: np.ndarray

  def add(self, mean: np.ndarray, spread: np.ndarray, T: int) -> "Moments":
    """With one more sequence of T tokens; spread = sum_t (x_t - mean)^2."""
    n = self.sequences
    new_mean = (n * self.mean + mean) / (n + 1)
    fluctuation = self.fluctuation
    if n:
      around = spread + T * (mean - new_mean) ** 2
      fluctuation = fluctuation * (n - 1) / n + around / (n + 1)
    square = (n * self.square + spread + T * mean**2) / (n + 1)
    return Moments(n + 1, new_mean, fluctuation, square)


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
  groups: int | None = None,
) -> Pruned:
  """Prunes a model to `target` parameters, the new biases included.

  Arguments as of `prune.prune`; an interrupted call starts again.

  Args:
    ratio: prune this share of the attention and MLP weights, whatever size
      results.
    groups: KV groups to remove in all (structures ALMM, ULMM); default the
      same ratio as of the channels.

  Raises:
    UserError: a bad layer range, or a target out of reach.
  """
  budget.check_target(target, ratio)
  full, kept, mesh = budget.defaults(config, full, kept, mesh)
  full = dataclasses.replace(full, o_bias=True, down_bias=True)
  prunable = targets.prunable_modules(full, settings)
  before = surgery.to_masks(kept, full)
  if ratio is None:
    nothing = dict.fromkeys(UNITS, 0)
    budget.check_reachable(full, before, prunable, target, nothing)
  moments = statistics(config, params, samples(0), batch, mesh)
  scores = unit_scores(
    config, params, moments, settings.flap_metric, settings.flap_structure, mesh
  )
  scores = {u: _spread(scores[u], kept[u], full, u) for u in UNITS}
  counts_at = counter(full, before, scores, prunable, settings, groups)
  if ratio is None:
    masks = budget.solve(
      full,
      before,
      scores,
      counts_at,
      prunable,
      target,
      settings.round_ffn_to,
    )
  else:
    order = ranking.ranking(scores, before)
    masks = ranking.remove(before, order, counts_at(ratio))
  left = surgery.to_kept(masks)
  here = surgery.relative_to(kept, left)
  config, params = compensate(config, params, moments, here, mesh)
  config, params = surgery.gather(config, params, here, mesh)
  size = surgery.count(full, masks)
  step = budget.step(1, full, before, masks, size, scores=scores)
  record = task.record(step)
  if log is not None:
    log(record, step)
  return Pruned(config, params, left, [record])


def statistics(
  config: ModelConfig,
  params: Params,
  tokens_NT: np.ndarray,
  batch: int,
  mesh: Mesh,
) -> dict[str, list[Moments]]:
  """Moments of the inputs of `o` and `down` of each layer, in one pass."""
  found = {
    "K": [
      _empty((k, config.queries_per_group, config.head_dim))
      for k in config.kv_groups
    ],
    "F": [_empty((f,)) for f in config.ffn_widths],
  }
  T = tokens_NT.shape[1]
  for tokens_BT, valid_B in activations.batches(tokens_NT, batch, mesh):
    x_BTD = activations.embed(config, params, tokens_BT, mesh)
    for i in range(config.num_layers):
      for unit in UNITS:
        x_BTD, y = activations.half(config, params, i, unit, x_BTD, mesh)
        if y is None:
          continue
        means, spreads = _moments(y, mesh=mesh)
        for b in np.flatnonzero(valid_B):
          found[unit][i] = found[unit][i].add(means[b], spreads[b], T)
  return found


def channel_scores(
  weight: jax.Array, moments: Moments, metric: str, mesh: Mesh
) -> np.ndarray:
  """Score of each input channel of `o` or `down`, float64 [K, G, H] or [F].

  Args:
    metric: IFV fluctuation; WIFV the same times the squared norm of the
      weights that read the channel; WIFN mean |weight| x 2-norm of the channel.
  """
  size, square = weight_sizes(weight, mesh=mesh)
  if metric == "IFV":
    return moments.fluctuation
  if metric == "WIFV":
    return moments.fluctuation * square
  return size * np.sqrt(moments.square)


def unit_scores(
  config: ModelConfig,
  params: Params,
  moments: dict[str, list[Moments]],
  metric: str,
  structure: str,
  mesh: Mesh,
) -> dict[str, list[np.ndarray]]:
  """Scores of the units of each layer, {"K": [K] a layer, "F": [F] ...}.

  Adaptive structures compare layers, so they standardise the channels of a
  module and average over a group; uniform ones sum. Channels of attention are
  squared, those of the MLP are not, as published.
  """
  adaptive = structure.startswith("AL")
  found = {u: [] for u in UNITS}
  for unit in UNITS:
    for i in range(config.num_layers):
      if not config.units()[unit][i]:
        found[unit].append(np.zeros(0))
        continue
      weight = params[axes.layer_name(i)][READER[unit]]
      score = channel_scores(weight, moments[unit][i], metric, mesh)
      if unit == "K":
        score = score**2
      if adaptive:
        score = _standard(score)
      if unit == "K":
        score = score.mean((1, 2)) if adaptive else score.sum((1, 2))
      found[unit].append(score)
  return found


def counter(
  full: ModelConfig,
  masks: Masks,
  scores: dict[str, np.ndarray],
  prunable: Masks,
  settings: Prune,
  groups: int | None = None,
) -> Callable[[float], Counts]:
  """How many units each module loses at a ratio, for each structure.

  AL: all layers compete, UL: each layer gives the same share. AM: heads and
  channels compete, each head with the weight of its parameters; MM: they have
  budgets of their own, in which `groups` are removed.
  """
  there = {u: masks[u] & prunable[u][:, None] for u in UNITS}
  total = surgery.widths(there)
  # Weights of a KV group, in those of a channel: an integer, as published.
  weight = {"K": (2 * full.queries_per_group + 2) * full.head_dim // 3, "F": 1}
  cost = {
    "K": (2 * full.queries_per_group + 2) * full.head_dim,
    "F": 3,
  }  # both times D

  def below(threshold: dict[str, float]) -> Counts:
    return {
      u: (there[u] & (scores[u] <= threshold[u])).sum(axis=1) for u in UNITS
    }

  listed = np.concatenate([scores[u][there[u]] for u in UNITS])
  weights = np.concatenate([np.full(there[u].sum(), weight[u]) for u in UNITS])
  order = np.argsort(-listed, kind="stable")
  running = np.cumsum(weights[order])

  def competing(ratio: float) -> Counts:
    if ratio == 0:
      return below(dict.fromkeys(UNITS, -np.inf))
    at = np.argmin(np.abs(running - running[-1] * (1 - ratio)))
    return below(dict.fromkeys(UNITS, listed[order[at]]))

  def lowest(numbers: dict[str, int]) -> Counts:
    """The lowest of all layers together."""
    threshold = {}
    for u in UNITS:
      listed = np.sort(scores[u][there[u]])
      threshold[u] = listed[numbers[u] - 1] if numbers[u] else -np.inf
    return below(threshold)

  def channels(ratio: float, K: np.ndarray, F: np.ndarray, gone) -> np.ndarray:
    """MLP channels that go when `gone` of K groups go, of F channels."""
    wanted = ratio * (K * cost["K"] + F * cost["F"]) - gone * cost["K"]
    return np.clip(wanted / cost["F"], 0, F).astype(int)

  def counts_at(ratio: float) -> Counts:
    K, F = total["K"], total["F"]
    if settings.flap_structure == "ALAM":
      return competing(ratio)
    if settings.flap_structure == "ULUM":
      return {u: (ratio * total[u]).astype(int) for u in UNITS}
    if settings.flap_structure == "ULMM":
      each = (
        (ratio * K).astype(int) if groups is None else groups // full.num_layers
      )
      gone = np.minimum(each, K)
      return {"K": gone, "F": channels(ratio, K, F, gone)}
    gone = int(ratio * K.sum()) if groups is None else groups
    return lowest(
      {"K": gone, "F": int(channels(ratio, K.sum(), F.sum(), gone))}
    )

  return counts_at


def compensate(
  config: ModelConfig,
  params: Params,
  moments: dict[str, list[Moments]],
  keep: Kept,
  mesh: Mesh,
) -> tuple[ModelConfig, Params]:
  """The model with what the units not in `keep` add on average as biases."""
  params = dict(params)
  for i in range(config.num_layers):
    name, sizes = axes.layer_name(i), config.sizes(i)
    layer = dict(params[name])
    for unit, bias_name in BIAS.items():
      dtype = params["embedding"].dtype
      bias = layer.get(bias_name, np.zeros(axes.shape(bias_name, sizes), dtype))
      if config.units()[unit][i]:
        mean = moments[unit][i].mean.copy()
        mean[keep[unit][i]] = 0
        weight = layer[READER[unit]]
        bias = _output(weight, mean.astype(np.float32), bias, mesh=mesh)
      layer[bias_name] = bias
    params[name] = layer
  config = dataclasses.replace(config, o_bias=True, down_bias=True)
  return config, params


def _empty(shape: tuple[int, ...]) -> Moments:
  return Moments(0, np.zeros(shape), np.zeros(shape), np.zeros(shape))


def _standard(score: np.ndarray) -> np.ndarray:
  """Standard scores; of one channel, or of equal ones, 0."""
  spread = score.std(ddof=1) if score.size > 1 else 0.0
  return (score - score.mean()) / spread if spread else score * 0


def _spread(
  scores: list[np.ndarray], kept: Any, full: ModelConfig, unit: str
) -> np.ndarray:
  """Scores of layers, in the original numbering: [L, units], 0 elsewhere."""
  wide = np.zeros((full.num_layers, max(full.units()[unit])))
  for row, score, units in zip(wide, scores, kept, strict=True):
    row[units] = score
  return wide


@activations.reduced
def _moments(y):
  """Mean over the tokens of each sequence, and sum of squares around it."""
  y = y.astype(jnp.float32)
  mean = jnp.mean(y, axis=1)
  return mean, jnp.sum((y - mean[:, None]) ** 2, axis=1)


@activations.reduced
def weight_sizes(weight):
  """Mean size and sum of squares of the weights that read each channel."""
  weight = weight.astype(jnp.float32)
  return jnp.mean(jnp.abs(weight), axis=-1), jnp.sum(weight**2, axis=-1)


@activations.reduced
def _output(weight, mean, bias):
  """The bias of `o` or `down`, with `mean` as another input added."""
  wide = weight.astype(jnp.float32).reshape(mean.size, -1)
  added = jnp.matmul(mean.ravel(), wide, precision="highest")
  return (bias.astype(jnp.float32) + added).astype(bias.dtype)
