"""Runs of consecutive layers, stacked: one `lax.scan` each, compiled once.

A program with its layers written out one after the other takes as many times as
long to compile. Pruned layers differ in size, but a few runs of them, padded
with zeros to the run's own maximum, cost little more arithmetic. A tree of
stacked layers has `layers_0_7: {name: [7, ...]}` where the plain one has
`layer_0`, ..., `layer_6`.

What pads a layer is zero and stays zero in training, exactly: a padded head
attends with values of zero and a padded channel is act(0) * 0, so they write
nothing, and since their rows of `o` or `down` are zero, no gradient comes back
to them. Adam leaves zeros with zero gradients alone, and so does weight decay.
Only a norm over all heads together sees padding, in what it divides by; it gets
a mask. A half that a layer of the run lacks is all padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.models import experts, layer, remat
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import BATCH, Params
from adapt_pruner_jax.models.model_config import ModelConfig

PREFIX = "layers_"


def run_name(first: int, end: int) -> str:
  """Key of layers first ... end - 1 in a tree of stacked layers."""
  return f"{PREFIX}{first}_{end}"


def bounds(tree: Any) -> tuple[tuple[int, int], ...]:
  """The first layer and the end of each run in a tree; () = not stacked."""
  names = [name for name in tree if name.startswith(PREFIX)]
  found = [name.removeprefix(PREFIX).split("_") for name in names]
  return tuple(sorted((int(first), int(end)) for first, end in found))


def scan_layers(
  config: ModelConfig,
  tree: Any,
  weights_of: Callable[[Any], Params],
  inputs: AttentionInputs,
  x_BTD: jax.Array,
  recomputed: str = "none",
  counts_BT: jax.Array | None = None,
) -> tuple[jax.Array, experts.Load | None]:
  """Runs all layers of a tree that is stacked.

  Args:
    config: of the model, with the true size of each layer.
    tree: stacked layers, {"layers_0_7": anything with a leading layer dim}.
    weights_of: makes a layer's parameters of a slice of that.
    inputs: what attention knows about the rows.
    x_BTD: the residual stream in front of the first layer.
    recomputed: what the backward pass computes once more, as of `remat`.
    counts_BT: tokens that count for the load; None = it is not asked for.

  Returns:
    The residual stream behind the last layer, [B, T, D], and how all experts
    are loaded.
  """
  load, seen = None, (inputs, counts_BT)
  for first, end in bounds(tree):
    stacked = tree[run_name(first, end)]
    args = config, first, end, stacked, weights_of, seen, x_BTD
    x_BTD, each = _scan(*args, recomputed)
    load = experts.add(load, jax.tree.map(lambda x: x.sum(0), each))
  return x_BTD, load


def _scan(config, first, end, stacked, weights_of, seen, x_BTD, recomputed):
  """`scan_layers` of one run."""
  inputs, counts_BT = seen
  fixed, places = _places(config, first, end)
  groups = np.array(config.kv_groups[first:end])
  has_mlp = np.array(config.ffn_widths[first:end]) > 0

  def one(x_BTD, xs):
    x_BTD = _by_rows(x_BTD, inputs.kernel.mesh)
    part, place, count, counts = xs
    weights, masks = weights_of(part), None
    if "moe_down_bias" in weights:  # no unit's: what pads a layer would learn
      weights = weights | {"moe_down_bias": weights["moe_down_bias"] * counts}
    if config.qk_norm == "all":
      masks = {"K": np.arange(layer.count("K", weights)) < count}
    place = layer.Place(**fixed, **place)
    x_BTD, tap = layer.run_layer(config, weights, place, inputs, x_BTD, masks)
    load = experts.load(tap.fed["F"], counts_BT)
    return x_BTD, jax.tree.map(lambda n: n * counts, load)

  body = remat.layer(one, recomputed, scanned=True)
  return jax.lax.scan(body, x_BTD, (stacked, places, groups, has_mlp))


def _by_rows(x_BTD: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Rows cut over the devices: what is gathered is weights, layer by layer."""
  if mesh is None:
    return x_BTD
  rows = NamedSharding(mesh, PartitionSpec(BATCH))
  return jax.lax.with_sharding_constraint(x_BTD, rows)


def _places(config, first, end):
  """What the places of a run have in common, and what to scan over."""
  parts = layer.places(config)._asdict()
  parts = {name: values[first:end] for name, values in parts.items()}
  fixed = {n: int(v[0]) for n, v in parts.items() if (v == v[0]).all()}
  return fixed, {n: v for n, v in parts.items() if n not in fixed}
