"""How much to prune where: the schedule, in float64 on the host.

A *module* is the attention (unit letter K, width counted in channels, head_dim
of them a unit) or the MLP (F, a unit is a channel) of one layer. Data about
modules is a dict {"K": [L], "F": [L]}. In float32 one module in a thousand gets
another count at full size, so everything here is float64 (arXiv 2502.03460,
section 3).
"""

import math

import numpy as np

MAX_SPARSITY = 0.99
Modules = dict[str, np.ndarray]


def relative_importance(importance_L: np.ndarray, prunable: Modules) -> Modules:
  """Importance centred and scaled to [-1, 1] over the prunable modules.

  Attention and MLP of a layer share its importance; a layer with both counts
  twice in the mean. Modules that are not prunable get NaN. Where all are
  equal, so that the paper's quotient is 0/0, all are 0.
  """
  importance = {
    u: np.where(p, importance_L, np.nan) for u, p in prunable.items()
  }
  listed = np.concatenate([importance[u][prunable[u]] for u in prunable])
  centred = {u: i - np.mean(listed) for u, i in importance.items()}
  scale = np.max(np.abs(listed - np.mean(listed)))
  return {u: c / scale if scale else c for u, c in centred.items()}


def next_sparsity(
  previous: Modules,
  relative: Modules,
  step: int,
  step_size: float,
  amplitude: float,
) -> Modules:
  """Sparsity of each module after `step` (from 1).

  S_t = clip(S_{t-1} + step_size - amplitude * r, 0, 0.99): the mean grows by
  `step_size`, more for unimportant layers. With amplitude 0 the schedule is
  t * step_size, not clipped. The order of the arithmetic is the authors': the
  most extreme module has r = +-1 exactly, where a different order can floor to
  a different count.

  Args:
    previous: sparsity of each module so far.
    relative: from `relative_importance`.
    step: number of the step, from 1.
    step_size: growth of the mean.
    amplitude: sparsity moved from important to unimportant modules a step.
  """
  if amplitude == 0:
    return {
      u: np.full_like(s, step / (1 / step_size)) for u, s in previous.items()
    }
  return {
    u: np.maximum(
      np.minimum(
        previous[u] + step_size - amplitude * relative[u], MAX_SPARSITY
      ),
      0,
    )
    for u in previous
  }


def removals(
  initial: np.ndarray,
  current: np.ndarray,
  sparsity: np.ndarray,
  group: int,
  round_to: int,
) -> np.ndarray:
  """Units to remove from the modules of one kind, int [L].

  Args:
    initial: units when the stage began, [L].
    current: units now, [L].
    sparsity: wanted, [L]; NaN = not prunable.
    group: channels a unit has (head_dim, or 1).
    round_to: kept widths are rounded up to a multiple of this many units.

  The kept width is floor(C0 (1 - S)) channels, rounded up to whole units and
  derived anew from C0 each step, so it does not drift. A removal that would
  leave nothing is refused whole, as is any from a module of one channel.
  """
  wanted = np.nan_to_num(np.asarray(sparsity, np.float64))
  keep_channels = np.trunc(initial * group * (1 - wanted)).astype(np.int64)
  n_channels = current * group - keep_channels
  n = np.maximum(n_channels, 0) // group
  if round_to > 1:
    keep = -(-(current - n) // round_to) * round_to
    n = np.maximum(current - keep, 0)
  refused = (n >= current) | (current * group == 1) | np.isnan(sparsity)
  return np.where(refused, 0, n)


def stage_targets(params: int, target: int, stages: int) -> list[int]:
  """Parameters after each stage: falling linearly to exactly `target`."""
  return [
    params - (params - target) * i // stages for i in range(1, stages + 1)
  ]


def token_shares(stages: int, kind: str) -> list[float]:
  """Share of the training tokens of each stage; they sum to 1.

  linear: 2i / (N(N+1)); constant: 1/N; cosine: proportional to
  1 - cos(pi i / N), which like linear gives late, damaged stages more.
  """
  weight = {
    "linear": lambda i: i,
    "constant": lambda i: 1,
    "cosine": lambda i: 1 - math.cos(math.pi * i / stages),
  }[kind]
  weights = [weight(i) for i in range(1, stages + 1)]
  return [w / sum(weights) for w in weights]


def stage_ends(steps: int, stages: int, kind: str) -> list[int]:
  """The train step at which each stage ends; the last ends with `steps`."""
  shares = token_shares(stages, kind)
  ends = [round(steps * sum(shares[:i])) for i in range(1, stages)]
  return [*ends, steps]
