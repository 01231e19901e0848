"""The backward walk: a masked model's loss, and its gradients half by half.

Taken in dense, stacked coordinates (`surgery.expand`), so that one executable
serves every step of every stage. Forward, the residual stream in front of each
half layer is stored. Backward, a reverse scan over the layers hands each half
with the gradients behind it to a `Visitor`, minibatch by minibatch: one layer's
sums over minibatches exist at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import embedding, sharding
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.decoder import Decoder, output_name
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.layer import (
  Place,
  Tap,
  attention_inputs,
  places,
  run_half,
  run_layer,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import output_loss


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
  """A model in dense coordinates and the units of it that count.

  Attributes:
    config: equal layers (`surgery.dense`): K and F are the stacked sizes.
    stacked: from `surgery.expand`.
    masks: {"K": bool [L, K], "F": bool [L, F]}, the units that are left.
    mesh: devices that minibatches are cut over; None = wherever they are.
    attention: as `prune.attention`.
  """

  config: ModelConfig
  stacked: Params
  masks: dict[str, jax.Array]
  mesh: Mesh | None = None
  attention: str = "auto"


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
  """One half of a layer, as a function of the stream and of its weights."""

  unit: str
  config: ModelConfig
  weights: Params  # of the whole layer
  place: Place
  inputs: AttentionInputs
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
      loss's gradient behind it, and valid_B: the sums with this minibatch,
      and the gradient in front of the half.
    finish: of a `Half` and its sums, what is kept.
  """

  start: Callable[[Half], Any]
  add: Callable[..., tuple[Any, jax.Array]]
  finish: Callable[[Half, Any], Any]


class Found(NamedTuple):
  """What a walk brings back.

  Attributes:
    loss_M: the loss of each minibatch, float32.
    observed: what was observed, each array with [L, M] in front.
    kept: {"K": ..., "F": ...}, what the visitor kept of each half, each array
      with [L] in front; {} without a visitor.
  """

  loss_M: jax.Array
  observed: Any
  kept: dict[str, Any]


def walk(
  model: Stacked,
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  counts_MB: jax.Array,
  visitor: Visitor | None = None,
  observe: Callable[..., Any] | None = None,
) -> Found:
  """Walks through a masked model and back; to be called within `jit`.

  Args:
    model: in dense coordinates.
    tokens_MBT: M minibatches of B sequences.
    valid_MB: False for rows that only pad.
    counts_MB: what the mean next-token loss of each row counts for in the loss;
      0 for rows that only pad.
    visitor: sees each half on the way back; None = there is no way back.
    observe: of each layer and minibatch, what of (x_BTD in front, x_BTD behind,
      valid_B) is reported.

  Returns:
    The losses, what was observed, and what the visitor kept.
  """
  config, stacked = model.config, model.stacked
  kernel = Kernel(model.attention, model.mesh)
  inputs = attention_inputs(config, tokens_MBT.shape[-1], kernel=kernel)
  layers = stacked["layers"], places(config), model.masks
  forward = _forward(model, inputs, valid_MB, observe)
  x_MBTD = embed(config, stacked, tokens_MBT, model.mesh)
  x_MBTD, (ins, mids, observed) = jax.lax.scan(forward, x_MBTD, layers)

  objective = output_loss.Objective(config, model.mesh)
  matrix = output(config, stacked, model.mesh)

  def loss(x_BTD, tokens_BT, counts_B):
    x_BTD = normed(config, stacked, x_BTD[:, :-1])
    targets_BT = tokens_BT[:, 1:]
    each_BT = counts_B[:, None] / targets_BT.shape[1]
    weights_BT = jnp.broadcast_to(each_BT, targets_BT.shape)
    tokens = targets_BT, weights_BT
    return output_loss.loss(objective, matrix, x_BTD, *tokens)[0]

  ends = x_MBTD, tokens_MBT, counts_MB
  if visitor is None:
    return Found(jax.lax.map(lambda end: loss(*end), ends), observed, {})
  gradient = jax.value_and_grad(loss)
  loss_M, dx_MBTD = jax.lax.map(lambda end: gradient(*end), ends)
  dx_MBTD = cut(dx_MBTD, model.mesh)
  backward = _backward(model, inputs, valid_MB, visitor)
  layers = layers, {"K": ins, "F": mids}
  _, kept = jax.lax.scan(backward, dx_MBTD, layers, reverse=True)
  return Found(loss_M, observed, kept)


def scored(
  model: Stacked,
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  visitor: Visitor,
) -> dict[str, Any]:
  """Walks for a score, the loss being the sum over rows of their mean losses.

  Args:
    model, tokens_MBT, valid_MB, visitor: as `walk`'s.

  Returns:
    On all devices: loss_M, the mean over each minibatch's rows, and scores,
    what the visitor kept.
  """
  counts_MB = valid_MB.astype(jnp.float32)
  found = walk(model, tokens_MBT, valid_MB, counts_MB, visitor)
  losses_M = found.loss_M / jnp.sum(valid_MB, axis=1)
  return sharding.whole({"loss_M": losses_M, "scores": found.kept}, model.mesh)


def embed(
  config: ModelConfig,
  stacked: Params,
  tokens_MBT: jax.Array,
  mesh: Mesh | None,
) -> jax.Array:
  """The stream in front of the first layer, [M, B, T, D]."""
  # Rows are cut in each minibatch, and so must lead.
  tokens_BMT = jnp.moveaxis(tokens_MBT, 1, 0)
  B, M, T = tokens_BMT.shape
  x_BXD = embedding.embed(
    config, stacked["embedding"], tokens_BMT.reshape(B, M * T), mesh
  )
  return cut(jnp.moveaxis(x_BXD.reshape(B, M, T, -1), 0, 1), mesh)


def normed(config: ModelConfig, stacked: Params, x_BTD: jax.Array) -> jax.Array:
  """The stream behind the final norm."""
  own = {n: stacked[n] for n in model_config.outer_names(config)}
  return Decoder(config).apply({"params": own}, x_BTD, method=Decoder.normed)


def output(
  config: ModelConfig, stacked: Params, mesh: Mesh | None
) -> output_loss.Placed:
  """The output matrix as `output_loss` takes it, for all minibatches."""
  return output_loss.place(config, stacked[output_name(config)], mesh)


def _forward(model, inputs, valid_MB, observe) -> Callable:
  """Of the stream in front of a layer and the layer: the stream behind it, and
  (in front, between its halves, what is observed)."""

  def forward(x_MBTD, layer):
    weights, place, masks = layer

    def one(minibatch):
      x_BTD, valid_B = minibatch
      args = model.config, weights, place, inputs, x_BTD, masks
      out_BTD, tap = run_layer(*args)
      observed = observe and observe(x_BTD, out_BTD, valid_B)
      return tap.between, out_BTD, observed

    mid, out, observed = jax.lax.map(one, (x_MBTD, valid_MB))
    return cut(out, model.mesh), (x_MBTD, cut(mid, model.mesh), observed)

  return forward


def _backward(model, inputs, valid_MB, visitor) -> Callable:
  """Of the gradients behind a layer, and the layer with the streams in front of
  its halves: the gradients in front of it, and what is kept of each half."""

  def backward(dx_MBTD, xs):
    (weights, place, masks), streams = xs
    kept = {}
    for unit in reversed(UNITS):
      half = Half(unit, model.config, weights, place, inputs, masks)

      def add(sums, minibatch, half=half):
        return visitor.add(half, sums, *minibatch)

      minibatches = streams[unit], dx_MBTD, valid_MB
      sums, dx_MBTD = jax.lax.scan(add, visitor.start(half), minibatches)
      dx_MBTD = cut(dx_MBTD, model.mesh)
      kept[unit] = visitor.finish(half, sums)
    return dx_MBTD, kept

  return backward


def cut(x_MBTD: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Rows of each minibatch over the devices."""
  if mesh is None:
    return x_MBTD
  where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
  return jax.lax.with_sharding_constraint(x_MBTD, where)
