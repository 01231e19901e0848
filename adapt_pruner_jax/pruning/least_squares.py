"""Ridge least squares for the matrices of a layer, layer by layer.

Two residual streams pass the layers: z of the dense model, u of the pruned one.
One layer and one Gram matrix exist at a time, in dense coordinates, so that one
executable serves all layers: removed units have zero weights, hence inputs of
zero, and stay zero. The equations are in `refit`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import agreement, placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.layer import (
  HALVES,
  NAMES,
  WRITERS,
  Place,
  places,
  writer_of,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  linear_algebra,
  refit_experts,
  streams,
)
from adapt_pruner_jax.pruning.normal_equations import (
  Parts,
  Task,
  added_up,
  energies,
  given,
  of_minibatch,
  total,
)
from adapt_pruner_jax.pruning.streams import (
  ENOUGH,
  STRONG,
  WEAK,
  Stream,
  Weights,
)


def layers(
  config: ModelConfig,
  outer: Params,
  layer_at: Callable[[int], tuple[Params, Params, dict[str, np.ndarray]]],
  tokens_NT: np.ndarray,
  batch: int,
  ridge: float,
  refit_all: bool,
  mesh: Mesh,
) -> Iterator[tuple[int, Params, list[dict]]]:
  """Refits layer by layer, in dense coordinates.

  Args:
    config: of the pruned model, in dense coordinates; it may have output
      biases that the dense model does not have.
    outer: parameters outside the layers.
    tokens_NT, batch, ridge, refit_all, mesh: as `refit.refit`'s.
    layer_at: gives of layer i the dense weights, the pruned ones, zero where
      units are removed, and the masks {"K": bool [K], "F": bool [F]}.

  Yields:
    i, the matrices that changed, and the records of the layer.
  """
  check(config, refit_all)
  z, fit, held = streams.start(config, outer, tokens_NT, batch, mesh)
  u = z
  for i, place in enumerate(map(Place, *places(config))):
    dense_layer, layer, masks = layer_at(i)
    # Gathered once, not in each program of each minibatch.
    dense_layer, layer = _gathered((dense_layer, layer), mesh=mesh)
    dense = _without_biases(config, dense_layer)
    if u is z and _same(dense_layer, layer):
      for writer in (writer_of(unit, layer) for unit in axes.UNITS):
        streams.advance(dense, writer, dense_layer, place, z, mesh)
      yield i, {}, []
      continue
    u = list(u) if u is z else u
    changed, records = {}, []
    placed = placement.replicate(masks, mesh)

    for unit in axes.UNITS:
      writer = writer_of(unit, layer)
      # What it should give is made of the dense stream in front of the half.
      in_front = f"{NAMES[unit]}_post_norm" in layer
      in_front |= writer == refit_experts.MATRIX
      readers = tuple(name for name in HALVES[writer] if name in layer)
      for names in [readers] * refit_all + [(writer,)]:
        if names == (writer,) and not in_front:
          streams.advance(dense, writer, dense_layer, place, z, mesh)
        if not masks[unit].any():
          continue
        if names == (refit_experts.MATRIX,):
          left = int(masks[unit][0].sum())
          both = dense_layer, layer, (z, u), fit, held
          new, found = refit_experts.refit(config, *both, left, ridge, mesh)
        else:
          task = Task(config, names, mesh)
          parts = Parts(dense_layer, layer, placed, place)
          strength = ridge or _ridge(task, masks, tokens_NT)
          new, found = _refit(task, parts, z, u, fit, held, strength)
          found = [r | {"ridge": strength} for r in found]
        layer, changed = layer | new, changed | new
        records += [{"layer": i} | r for r in found]
      if in_front:
        streams.advance(dense, writer, dense_layer, place, z, mesh)
      streams.advance(config, writer, layer, place, u, mesh)
    yield i, changed, records


def check(config: ModelConfig, refit_all: bool = False) -> None:
  """Raises a UserError for a model that least squares cannot refit.

  Args:
    config: of the model.
    refit_all: as `refit.refit`'s.
  """
  if config.residual:
    raise UserError(
      "this model cannot be refitted by least squares: SliceGPT changes the "
      "residual width"
    )
  if config.experts and refit_all:
    raise UserError(
      f"{config.family} is a mixture of experts, of which least squares refit "
      "what they write: give --config.prune.refit_all=False"
    )


# ---- One least-squares problem -----------------------------------------------


def _refit(
  task: Task,
  parts: Parts,
  z: Stream,
  u: Stream,
  fit: Weights,
  held: Weights,
  ridge: float,
) -> tuple[Params, list[dict]]:
  """The matrices that got better, and a record for each matrix.

  Args:
    z: the dense stream, behind the half for matrices that write to the stream
      with no norm between, in front of it for others.
    u: the pruned stream, in front of the half.
    fit, held: of the tokens to fit, and those that judge.
  """
  sums = lambda batch: of_minibatch(*given(task, parts, batch))
  equations = added_up(total(sums, task, parts, z, u, fit), mesh=task.mesh)
  old = {n: parts.layer[n] for n in task.names}
  new = solve(*equations, old, np.float32(ridge), mesh=task.mesh)
  changed = dataclasses.replace(parts, layer=parts.layer | new)
  judge = lambda batch: [
    energies(*given(task, which, batch)) for which in (parts, changed)
  ]
  found = jax.device_get(total(judge, task, parts, z, u, held))
  before, after = agreement.from_writer(found)
  records, better = [], {}
  for n in task.names:
    # Written so that NaN, from equations too singular to solve, loses.
    if after[n][0] < before[n][0]:
      better[n] = new[n]
    share = [
      float(np.sqrt(r / max(y, 1e-30))) for r, y in (before[n], after[n])
    ]
    record = {"matrix": n, "before": share[0], "after": share[1]}
    records.append(record | {"refitted": n in better})
  return better, records


def _ridge(task: Task, masks: dict[str, np.ndarray], tokens_NT) -> float:
  """WEAK or STRONG, by the tokens for each live input channel."""
  name, width = task.names[0], task.config.hidden_size
  if name in HALVES:  # whose input are the channels of units
    units, sizes = masks[axes.unit_of(name)], task.config.sizes()
    of_unit = (sizes.get(x, 1) for x in axes.AXES[name][:-1])
    width = int(units.sum()) * math.prod(of_unit)
  rows = len(tokens_NT) - streams.held_rows(tokens_NT)
  return WEAK if rows * tokens_NT.shape[1] >= ENOUGH * width else STRONG


def _without_biases(config: ModelConfig, layer: Params) -> ModelConfig:
  """The config of a dense layer, which may lack the pruned one's biases."""
  has = {f"{n}_bias": f"{n}_bias" in layer for n in WRITERS.values()}
  return dataclasses.replace(config, **has)


def _same(dense_layer: Params, layer: Params) -> bool:
  if dense_layer.keys() != layer.keys():
    return False
  return bool(_equal(dense_layer, layer))


# ---- On the devices ----------------------------------------------------------


@partial(jax.jit, static_argnames="mesh")
def _gathered(tree, *, mesh):
  return sharding.whole(tree, mesh)


@partial(jax.jit, static_argnames="mesh")
def solve(gram_CC, moments, weights, ridge, *, mesh=None):
  """Weights whose change solves the normal equations, in their dtype.

  Args:
    gram_CC: of the matrices' common input, summed over tokens.
    moments: {name: [C, outputs]}, of the input with what each matrix lacks.
    weights: {name: weight}, as they are now.
    ridge: in units of the Gram matrix's median diagonal.
    mesh: where it is solved, which decides how (`linear_algebra`).
  """
  changes, new = linear_algebra.solve(gram_CC, ridge, moments, mesh), {}
  for n, weight in weights.items():
    change = changes[n].reshape(weight.shape)
    new[n] = (weight.astype(jnp.float32) + change).astype(weight.dtype)
  # Like the layer's other matrices, or what reads them is compiled anew.
  return sharding.whole(new, mesh)


@jax.jit
def _equal(dense_layer, layer):
  equal = jax.tree.map(lambda x, y: jnp.all(x == y), dense_layer, layer)
  return jnp.all(jnp.stack(jax.tree.leaves(equal)))
