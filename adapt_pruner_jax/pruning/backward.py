"""The backward walk: a masked model's loss, and its gradients half by half.

Taken in dense, stacked coordinates (`surgery.expand`), so that one executable
serves every step of every stage. Forward, the residual stream in front of each
half layer is stored. Backward, a reverse scan over the layers hands each half
with the gradients behind it to a `Visitor`, minibatch by minibatch: one layer's
sums over minibatches exist at a time. On TPUs the streams, and the sums of
earlier walks, may wait in the host's memory.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import each_device, placement, sharding
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.layer import (
  attention_inputs,
  places,
  run_layer,
  stream,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import ends
from adapt_pruner_jax.pruning.visitor import Found, Half, Sums, Visitor
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
    hosted: the stream in front of each half is stored in the host's memory, and
      so are sums that are handed on.
  """

  config: ModelConfig
  stacked: Params
  masks: dict[str, jax.Array]
  mesh: Mesh | None = None
  attention: str = "auto"
  hosted: bool = False


def walk(
  model: Stacked,
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  counts_MB: jax.Array,
  visitor: Visitor | None = None,
  observe: Callable[..., Any] | None = None,
  before: Sums | None = None,
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
      share_B of each row in the minibatch) is summed over rows.
    before: of earlier walks over other minibatches, or `nothing`: with these
      minibatches they are handed on, for `ended`.

  Returns:
    The losses, what was observed, and what the visitor kept, or the sums.
  """
  config, stacked, mesh = model.config, model.stacked, model.mesh
  axes = each_device.row_axes(mesh, tokens_MBT.shape[1])
  kernel = Kernel(model.attention, mesh, alone=bool(axes))
  inputs = attention_inputs(config, tokens_MBT.shape[-1], kernel=kernel)
  rows = _Rows(valid_MB, inputs, mesh, axes)
  layers = _layers(model)
  x_MBTD = ends.embed(config, stacked, tokens_MBT, mesh)
  forward = _forward(model, rows, observe)
  x_MBTD, (ins, mids, observed) = jax.lax.scan(forward, x_MBTD, layers)

  objective = output_loss.Objective(config, model.mesh)
  matrix = ends.output(config, stacked, model.mesh)

  def loss(x_BTD, tokens_BT, counts_B):
    x_BTD = ends.normed(config, stacked, x_BTD[:, :-1])
    targets_BT = tokens_BT[:, 1:]
    each_BT = counts_B[:, None] / targets_BT.shape[1]
    weights_BT = jnp.broadcast_to(each_BT, targets_BT.shape)
    tokens = targets_BT, weights_BT
    return output_loss.loss(objective, matrix, x_BTD, *tokens)[0]

  behind = x_MBTD, tokens_MBT, counts_MB
  if visitor is None:
    return Found(jax.lax.map(lambda end: loss(*end), behind), observed, {})
  gradient = jax.value_and_grad(loss)
  loss_M, dx_MBTD = jax.lax.map(lambda end: gradient(*end), behind)
  dx_MBTD = rows.cut(dx_MBTD)
  seen = _counted(rows, before)
  backward = _backward(model, rows, visitor, seen, before is None)
  layers = jnp.arange(config.num_layers), layers, {"K": ins, "F": mids}
  carry = dx_MBTD, seen.of_halves
  (_, of_halves), kept = jax.lax.scan(backward, carry, layers, reverse=True)
  if before is None:
    return Found(loss_M, observed, kept)
  return Found(loss_M, observed, {}, seen._replace(of_halves=of_halves))


def nothing(model: Stacked, visitor: Visitor) -> Sums:
  """What the first of several walks goes on from."""

  def start(unit):
    return jax.vmap(lambda *layer: visitor.start(_half(unit, model, layer)))

  layers = _layers(model)
  of_halves = {unit: start(unit)(*layers) for unit in UNITS}
  return Sums(of_halves, jnp.int32(0), jnp.int32(0))


def ended(model: Stacked, visitor: Visitor, sums: Sums) -> dict[str, Any]:
  """What a visitor keeps of the sums that walks have handed on.

  Args:
    model, visitor: as `walk`'s.
    sums: of all minibatches.

  Returns:
    What it keeps of each half, as `Found`'s.
  """

  def one(xs):
    layer, of_halves = placement.fetched(xs)
    return {
      unit: visitor.finish(_half(unit, model, layer), of_halves[unit], sums)
      for unit in UNITS
    }

  return jax.lax.map(one, (_layers(model), sums.of_halves))


def scored(
  model: Stacked,
  tokens_MBT: jax.Array,
  valid_MB: jax.Array,
  visitor: Visitor,
  before: Sums | None = None,
) -> dict[str, Any]:
  """Walks for a score, the loss being the sum over rows of their mean losses.

  Args:
    model, tokens_MBT, valid_MB, visitor, before: as `walk`'s.

  Returns:
    On all devices: loss_M, the mean over each minibatch's rows, and scores,
    what the visitor kept; or, if they are handed on, `Sums` in their place.
  """
  counts_MB = valid_MB.astype(jnp.float32)
  args = model, tokens_MBT, valid_MB, counts_MB, visitor
  found = walk(*args, before=before)
  losses_M = found.loss_M / jnp.maximum(jnp.sum(valid_MB, axis=1), 1)
  told = {"scores": found.kept}
  return results(found, model.mesh, {"loss_M": losses_M}, told)


def results(
  found: Found, mesh: Mesh | None, measured: dict, told: dict
) -> dict[str, Any]:
  """What a walk's program returns: on all devices, but for `Sums`.

  Args:
    found: by the walk.
    mesh: the devices.
    measured: arrays.
    told: of what is kept, if no sums are handed on.
  """
  if found.sums is not None:
    return sharding.whole(measured, mesh) | {"sums": found.sums}
  return sharding.whole(measured | told, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """The rows of a walk, and the devices that they are cut over."""

  valid_MB: jax.Array
  inputs: AttentionInputs
  mesh: Mesh | None
  axes: each_device.Axes

  def cut(self, x_MBTD: jax.Array) -> jax.Array:
    """Rows of each minibatch over the devices."""
    return ends.cut(x_MBTD, self.mesh, self.axes)

  def run(self, fn: Callable, minibatches: Any, layer: Any, sums: Any) -> Any:
    """`fn(minibatches, layer)` on each device, as `each_device.run`."""
    args = self.mesh, self.axes, minibatches, layer, sums
    return each_device.run(fn, *args)


def _counted(rows: _Rows, before: Sums | None) -> Sums:
  """With these minibatches; of the halves, what was before them."""
  number = jnp.sum(rows.valid_MB)
  minibatches = jnp.sum(jnp.any(rows.valid_MB, axis=1))
  if before is None:
    return Sums({}, number, minibatches)
  number, minibatches = before.rows + number, before.minibatches + minibatches
  return Sums(before.of_halves, number, minibatches)


def _layers(model: Stacked) -> tuple:
  """Weights, places and masks, each array with [L] in front."""
  return model.stacked["layers"], places(model.config), model.masks


def _half(
  unit: str,
  model: Stacked,
  layer: tuple,
  inputs: AttentionInputs | None = None,
) -> Half:
  """Of one layer; without `inputs` it cannot run."""
  weights, place, masks = layer
  return Half(unit, model.config, weights, place, inputs, masks)


def _forward(model: Stacked, rows: _Rows, observe) -> Callable:
  """Of the stream in front of a layer and the layer: the stream behind it, and
  (in front, between its halves, what is observed)."""
  valid_MB = rows.valid_MB
  share_MB = valid_MB / jnp.maximum(jnp.sum(valid_MB, axis=1, keepdims=True), 1)

  def walk_through(minibatches, layer):
    weights, place, masks = layer

    def one(minibatch):
      x_BTD, share_B = minibatch
      args = model.config, weights, place, rows.inputs, x_BTD, masks
      out_BTD, tap = run_layer(*args)
      around = (stream(model.config, x) for x in (x_BTD, out_BTD))
      observed = observe and observe(*around, share_B)
      return (tap.between, out_BTD), observed

    return jax.lax.map(one, minibatches)

  def forward(x_MBTD, layer):
    layer = placement.fetched(layer)

    def observed():
      x_BTD, share_B = stream(model.config, x_MBTD[0]), share_MB[0]
      return observe and observe(x_BTD, x_BTD, share_B)

    like = jax.eval_shape(lambda: jax.tree.map(_of_all(share_MB), observed()))
    minibatches = x_MBTD, share_MB
    (mid, out), found = rows.run(walk_through, minibatches, layer, like)
    streams = x_MBTD, rows.cut(mid)
    if model.hosted:
      streams = jax.tree.map(placement.put_away, streams)
    return rows.cut(out), (*streams, found)

  return forward


def _of_all(share_MB: jax.Array) -> Callable:
  """Of what is observed of a minibatch: an array of its shape, of all."""
  return lambda x: jnp.broadcast_to(x, (len(share_MB), *x.shape))


def _backward(
  model: Stacked, rows: _Rows, visitor: Visitor, seen: Sums, only: bool
) -> Callable:
  """Of the gradients behind a layer and the sums so far, and the layer with the
  streams in front of its halves: the gradients in front of it, the sums, and
  what is kept of each half."""
  rows_M = jnp.sum(rows.valid_MB, axis=1)

  def back(unit, minibatches, given):
    layer, begin, rows_M = given
    half = _half(unit, model, layer, rows.inputs)
    x_MBTD, *behind = minibatches

    def add(so_far, minibatch):
      (sums, x_MBTD), (m, *behind) = so_far, minibatch
      sums, dx_BTD = visitor.add(half, sums, x_MBTD[m], *behind)
      return (sums, x_MBTD.at[m].set(dx_BTD)), None  # its gradient's place

    begin = visitor.start(half) if begin is None else begin
    each = jnp.arange(len(x_MBTD)), *behind, rows_M
    (sums, dx_MBTD), _ = jax.lax.scan(add, (begin, x_MBTD), each)
    return dx_MBTD, sums

  def backward(carry, xs):
    (dx_MBTD, before), (i, layer, streams) = carry, xs
    layer = placement.fetched(layer)
    kept, before = {}, dict(before)
    for unit in reversed(UNITS):
      half = _half(unit, model, layer, rows.inputs)
      x_MBTD = streams[unit]
      if model.hosted:
        x_MBTD, dx_MBTD = placement.taken_out(x_MBTD, dx_MBTD)
      earlier = jax.tree.map(lambda b: b[i], before.get(unit))
      earlier = placement.fetched(earlier)
      # Alone, a device goes on adding, as if there were just one walk.
      begin = earlier if not rows.axes else None
      dx_MBTD, sums = rows.run(
        partial(back, unit),
        (x_MBTD, dx_MBTD, rows.valid_MB),
        (layer, begin, rows_M),
        jax.eval_shape(lambda half=half: visitor.start(half)),
      )
      dx_MBTD = rows.cut(dx_MBTD)
      if earlier is not None and begin is None:
        sums = jax.tree.map(jnp.add, earlier, sums)
      if only:
        kept[unit] = visitor.finish(half, sums, seen)
      else:
        put = partial(placement.put_at, i)
        before[unit] = jax.tree.map(put, before[unit], sums)
    return (dx_MBTD, before), kept

  return backward
