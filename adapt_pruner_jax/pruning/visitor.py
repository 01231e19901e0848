"""What a walk through a model visits (`backward`), and what it brings back."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.layer import Place, Tap, run_half
from adapt_pruner_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
  """One half of a layer, as a function of the stream and of its weights."""

  unit: str
  config: ModelConfig
  weights: Params  # of the whole layer
  place: Place
  inputs: AttentionInputs | None  # None = it is not run, only looked at
  masks: dict[str, jax.Array]  # {"K": bool [K], "F": bool [F]}

  def run(
    self, x_BTD: jax.Array, weights: Params | None = None
  ) -> tuple[jax.Array, Tap]:
    """The stream behind the half, as `layer.run_half`.

    Args:
      x_BTD: the stream in front of it.
      weights: some of the layer's, in place of its own.
    """
    weights = self.weights | (weights or {})
    args = self.config, weights, self.place, self.inputs, x_BTD, self.masks
    return run_half(self.unit, *args)

  def gated(self, gate_U: jax.Array) -> "Half":
    """The same half with numbers in place of its mask, to differentiate by."""
    return dataclasses.replace(self, masks=self.masks | {self.unit: gate_U})


class Visitor(NamedTuple):
  """What is summed over the minibatches of a half, and what is kept of it.

  Attributes:
    start: of a `Half`, sums of nothing.
    add: of a `Half`, the sums so far, x_BTD in front of the half, dy_BTD the
      loss's gradient behind it, valid_B, and how many rows of the minibatch
      are valid on all devices: the sums with this minibatch, and the gradient
      in front of the half.
    finish: of a `Half`, its sums, and `Sums` over what: what is kept.
  """

  start: Callable[[Half], Any]
  add: Callable[..., tuple[Any, jax.Array]]
  finish: Callable[[Half, Any, "Sums"], Any]


class Sums(NamedTuple):
  """What a visitor has summed, of all layers.

  Attributes:
    of_halves: {"K": ..., "F": ...}, each array with [L] in front.
    rows: valid ones that the sums are over.
    minibatches: so many that had any.
  """

  of_halves: dict[str, Any]
  rows: jax.Array
  minibatches: jax.Array


class Found(NamedTuple):
  """What a walk brings back.

  Attributes:
    loss_M: the loss of each minibatch, float32.
    observed: what was observed, summed over rows, each array with [L, M] in
      front.
    kept: {"K": ..., "F": ...}, what the visitor kept of each half, each array
      with [L] in front; {} without a visitor, and if the walk goes on.
    sums: of this walk and those before, if it goes on.
  """

  loss_M: jax.Array
  observed: Any
  kept: dict[str, Any]
  sums: Sums | None = None
