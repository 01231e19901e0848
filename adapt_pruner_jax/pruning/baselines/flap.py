"""FLAP: remove what fluctuates least, put its mean back as a bias (2312.11983).

The statistics are of the inputs of `o` and `down`, of the model as it is now;
a pruned unit is replaced by its mean, which becomes a bias of the matrix that
read it. Every layer gains both biases, and they count as parameters.

The published code knows only models with as many KV heads as query heads. With
fewer, a unit here is a KV group with its own, contiguous query heads: its score
is the mean over its G * H channels, its weight in the global budget its size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import WRITERS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  allotment,
  exact_target,
  steps,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.baselines import activations
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Counts,
  Masked,
  Measured,
  PruneTask,
  Scores,
)

# What is measured is the inputs of the matrices that write to the stream.
BIAS = {u: f"{writer}_bias" for u, writer in WRITERS.items()}


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


Statistics = dict[str, list[Moments]]  # of each layer, by unit letter


# ---- The method --------------------------------------------------------------


def prepare(task: PruneTask) -> PruneTask:
  """The task with the biases that FLAP adds, which count as parameters.

  Raises:
    UserError: a target out of reach.
  """
  full = dataclasses.replace(task.full, o_bias=True, down_bias=True)
  task = dataclasses.replace(task, full=full)
  exact_target.check_reachable(task, dict.fromkeys(UNITS, 0))
  return task


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores as `prune.flap.metric` and `.structure` say."""
  pair, flap = activations.pair(masked), masked.task.settings.flap
  moments = _moments_of(masked, pair, tokens_NT)
  found = unit_scores(
    pair, moments, flap.metric, flap.structure, masked.masks, masked.task.mesh
  )
  return Measured(found, facts=moments)


def fluctuation(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """How much of what a unit adds fluctuates, for any allotment.

  The sum over its channels of their fluctuation times the squared norm of the
  weights that read them (WIFV), neither squared nor standardised: units of
  attention and MLP, and of different layers, can be compared.
  """
  pair, found = activations.pair(masked), {}
  moments, (_, params) = _moments_of(masked, pair, tokens_NT), pair
  for u, mask_LU in masked.masks.items():
    found[u] = np.zeros(mask_LU.shape)
    for i, of_layer in enumerate(moments[u]):
      weight = params[axes.layer_name(i)][WRITERS[u]]
      score = channel_scores(weight, of_layer, "WIFV", masked.task.mesh)
      found[u][i] = score.reshape(len(score), -1).sum(1)
  return Measured(found, facts=moments)


def allot(masked: Masked, measured: Measured) -> Allotted:
  """The lowest units, or shares, as `prune.flap.structure` says."""
  counts_at = counter(masked.task, masked.masks, measured.scores)
  return allotment.by_ratio(masked, measured, counts_at)


def finish(masked: Masked, left: Kept, measured: Measured | None) -> steps.Pair:
  """The smaller pair, with what is gone replaced by its mean, as biases."""
  task = masked.task
  moments = measured.facts if measured and masked.step.number == 1 else None
  if moments is None:  # of several steps, or of one that another call took
    whole = dataclasses.replace(masked.step, masks=task.begin)
    masked_before = dataclasses.replace(masked, step=whole)
    pair = activations.pair(masked_before)
    moments = _moments_of(masked_before, pair, task.samples(0))
  keep = surgery.to_masks(left, task.full)
  layers = compensated(masked.stacked["layers"], moments, keep, task.mesh)
  stacked = masked.stacked | {"layers": layers}
  return surgery.compact(stacked, left, task.full, task.mesh)


def _moments_of(
  masked: Masked, pair: tuple[ModelConfig, Params], tokens_NT: np.ndarray
) -> Statistics:
  task = masked.task
  return statistics(*pair, tokens_NT, task.batch, task.mesh, masked.masks)


# ---- What is measured --------------------------------------------------------


def statistics(
  config: ModelConfig,
  params: Params,
  tokens_NT: np.ndarray,
  batch: int,
  mesh: Mesh,
  masks: Masks | None = None,
) -> Statistics:
  """Moments of the inputs of `o` and `down` of each layer, in one pass.

  Args:
    masks: units that count, bool [L, K] and [L, F]; None = all.
  """
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
        mask = None if masks is None else masks[unit][i]
        x_BTD, y = activations.half(config, params, i, unit, x_BTD, mesh, mask)
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
  pair: tuple[ModelConfig, Params],
  moments: Statistics,
  metric: str,
  structure: str,
  masks: Masks,
  mesh: Mesh,
) -> Scores:
  """Scores of the units, {"K": [L, K], "F": [L, F]}; 0 where masked.

  Adaptive structures compare layers, so they standardise the channels of a
  module and average over a group; uniform ones sum. Channels of attention are
  squared, those of the MLP are not, as published.

  Args:
    pair: in dense coordinates.
    masks: units that are left.
  """
  _, params = pair
  adaptive = structure.startswith("AL")
  found = {u: np.zeros(m.shape) for u, m in masks.items()}
  for unit, mask_LU in masks.items():
    for i, mask_U in enumerate(mask_LU):
      weight = params[axes.layer_name(i)][WRITERS[unit]]
      score = channel_scores(weight, moments[unit][i], metric, mesh)[mask_U]
      if unit == "K":
        score = score**2
      if adaptive:
        score = _standard(score)
      if unit == "K":
        score = score.mean((1, 2)) if adaptive else score.sum((1, 2))
      found[unit][i, mask_U] = score
  return found


def counter(
  task: PruneTask, masks: Masks, scores: Scores, groups: int | None = None
) -> exact_target.CountsAt:
  """How many units each module loses at a ratio, for each structure.

  AL: all layers compete, UL: each layer gives the same share. AM: heads and
  channels compete, each head with the weight of its parameters; MM: they have
  budgets of their own.

  Args:
    masks: units that are left.
    groups: KV groups that go in all under MM, whatever the ratio.
  """
  full, structure = task.full, task.settings.flap.structure
  prunable = targets.prunable_modules(full, task.settings)
  there = {u: masks[u] & prunable[u][:, None] for u in UNITS}
  total = surgery.widths(there)
  if structure == "ALAM":
    return _competing(full, there, scores)
  if structure == "ULUM":
    return lambda ratio: {u: (ratio * total[u]).astype(int) for u in UNITS}
  # Over D: parameters of a KV group, and of a channel.
  cost = {"K": (2 * full.queries_per_group + 2) * full.head_dim, "F": 3}

  def channels(ratio: float, K: np.ndarray, F: np.ndarray, gone) -> np.ndarray:
    """MLP channels that go when `gone` of K groups go, of F channels."""
    wanted = ratio * (K * cost["K"] + F * cost["F"]) - gone * cost["K"]
    return np.clip(wanted / cost["F"], 0, F).astype(int)

  def in_each_layer(ratio: float) -> Counts:
    K, F = total["K"], total["F"]
    each = (ratio * K).astype(int)
    if groups is not None:
      each = groups // full.num_layers
    gone = np.minimum(each, K)
    return {"K": gone, "F": channels(ratio, K, F, gone)}

  def anywhere(ratio: float) -> Counts:
    K, F = total["K"].sum(), total["F"].sum()
    gone = int(ratio * K) if groups is None else groups
    numbers = {"K": gone, "F": int(channels(ratio, K, F, gone))}
    threshold = {}
    for u in UNITS:
      listed = np.sort(scores[u][there[u]])
      threshold[u] = listed[numbers[u] - 1] if numbers[u] else -np.inf
    return _below(threshold, there, scores)

  return in_each_layer if structure == "ULMM" else anywhere


def _competing(
  full: ModelConfig, there: Masks, scores: Scores
) -> exact_target.CountsAt:
  """Units of all modules in one list, each with the weight of its parameters.

  A KV group's weight, in channels, is an integer, as published.
  """
  weight = {"K": (2 * full.queries_per_group + 2) * full.head_dim // 3, "F": 1}
  listed = np.concatenate([scores[u][there[u]] for u in UNITS])
  weights = np.concatenate([np.full(there[u].sum(), weight[u]) for u in UNITS])
  order = np.argsort(-listed, kind="stable")
  running = np.cumsum(weights[order])

  def counts_at(ratio: float) -> Counts:
    if ratio == 0:
      return _below(dict.fromkeys(UNITS, -np.inf), there, scores)
    at = np.argmin(np.abs(running - running[-1] * (1 - ratio)))
    return _below(dict.fromkeys(UNITS, listed[order[at]]), there, scores)

  return counts_at


def _below(threshold: dict[str, float], there: Masks, scores: Scores) -> Counts:
  """Units of each module whose scores are not above a threshold."""
  return {
    u: (there[u] & (scores[u] <= threshold[u])).sum(axis=1) for u in UNITS
  }


def compensated(
  layers: Params, moments: Statistics, keep: Masks, mesh: Mesh
) -> Params:
  """Stacked layers with what other units add on average as biases.

  Args:
    layers: {name: [L, ...]}, with the biases of `o` and `down`.
    keep: units that stay; what they add is not in the biases.
  """
  layers = dict(layers)
  for unit, name in BIAS.items():
    biases = []
    for i, keep_U in enumerate(keep[unit]):
      mean = moments[unit][i].mean.copy()
      mean[keep_U] = 0
      weight, bias = layers[WRITERS[unit]][i], layers[name][i]
      biases.append(_output(weight, mean.astype(np.float32), bias, mesh=mesh))
    layers[name] = np.stack(biases)
  return layers


def _empty(shape: tuple[int, ...]) -> Moments:
  return Moments(0, np.zeros(shape), np.zeros(shape), np.zeros(shape))


def _standard(score: np.ndarray) -> np.ndarray:
  """Standard scores; of one channel, or of equal ones, 0."""
  spread = score.std(ddof=1) if score.size > 1 else 0.0
  return (score - score.mean()) / spread if spread else score * 0


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
