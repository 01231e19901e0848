"""The sums over tokens of a layer's least squares (`least_squares`).

Of each minibatch they are made in programs that all layers share. What a matrix
multiplies, and what its half writes, are programs of the streams' (`streams`):
attention is compiled in one place.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import each_device, placement, sharding
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.layer import HALVES, NAMES, stream
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import float32_product, linear_algebra, streams
from adapt_pruner_jax.pruning.median import median
from adapt_pruner_jax.pruning.streams import CAP, Stream, Tokens, Weights


@dataclasses.dataclass(frozen=True)
class Task:
  """What an executable depends on."""

  config: ModelConfig
  names: tuple[str, ...]  # matrices of a layer that have the same input
  mesh: Mesh


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["dense_layer", "layer", "masks", "place"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """The layer of a task."""

  dense_layer: Params
  layer: Params
  masks: dict[str, jax.Array]
  place: Any


class Batch(NamedTuple):
  """A minibatch: what matrices multiply of each stream, and what tokens count.

  Attributes:
    z_BTD, u_BTD: the dense stream and the pruned one.
    tokens: what they count.
    fed: what the matrices multiply, made of the pruned stream.
    dense_fed: the same of the dense one, for matrices that are to give what
      they give there.
    given_BTD: what the half makes of the pruned stream, where it is to land on
      the dense one.
  """

  z_BTD: jax.Array
  u_BTD: jax.Array
  tokens: Tokens
  fed: jax.Array
  dense_fed: jax.Array | None = None
  given_BTD: jax.Array | None = None


def total(
  fn: Callable, task: Task, parts: Parts, z: Stream, u: Stream, weights: Weights
) -> Any:
  """Sum of `fn`, of a `Batch`, over the minibatches that count."""
  of, mesh, found = (task.config, task.names[0]), task.mesh, None
  for z_BTD, u_BTD, tokens in zip(z, u, weights, strict=True):
    if tokens is None:
      continue
    own = parts.layer, parts.place, u_BTD
    fed, dense_fed = streams.fed_to(*of, *own, mesh=mesh), None
    if not _to_the_stream(task, parts):
      dense = parts.dense_layer, parts.place, z_BTD
      dense_fed = streams.fed_to(*of, *dense, mesh=mesh)
    one = fn(Batch(z_BTD, u_BTD, tokens, fed, dense_fed))
    found = one if found is None else _plus(found, one)
  return found


def given(task: Task, parts: Parts, batch: Batch) -> tuple:
  """The arguments of a program, with what the half gives."""
  if not _to_the_stream(task, parts):
    return task, parts, batch
  config, unit = task.config, axes.unit_of(task.names[0])
  made = parts.layer, batch.u_BTD, batch.fed
  given_BTD = streams.written(config, unit, *made, mesh=task.mesh)
  return task, parts, batch._replace(given_BTD=given_BTD)


def _to_the_stream(task: Task, parts: Parts) -> bool:
  """Whether the matrix writes to the stream, with no norm between."""
  name = task.names[0]
  norm = f"{NAMES[axes.unit_of(name)]}_post_norm"
  return name in HALVES and norm not in parts.layer


@partial(jax.jit, static_argnames="task")
def of_minibatch(task, parts, batch):
  """The input's Gram matrix [N, C, C], moments with what lacks {n: [N, C, E]}.

  N devices: each sums over its rows, and they are added up when all is summed.
  """
  fed_BTC, found, weight_BT = _lacking(task, parts, batch)
  sums = partial(_sums_of_devices, task.mesh, fed_BTC * weight_BT[..., None])
  moments = {n: sums(lacks_BTE) for n, (lacks_BTE, _) in found.items()}
  return sums(fed_BTC), moments


def _sums_of_devices(mesh, x_BTC, y_BTE):
  """x^T y over the rows of each device, [N, C, E]."""
  N = placement.batch_shards(mesh)
  split = lambda x: placement.cut_rows(x.reshape(N, -1, *x.shape[1:]), mesh)
  found = float32_product.product("nbtc,nbte->nce", split(x_BTC), split(y_BTE))
  return placement.cut_rows(found, mesh)


@partial(jax.jit, static_argnames="mesh")
def added_up(sums, *, mesh):
  """Sums of the devices as one, of which each device has a part."""
  return jax.tree.map(lambda x: each_device.total(x, mesh), sums)


@partial(jax.jit, static_argnames="task")
def energies(task, parts, batch):
  """{name: energies (of what lacks, of the target)}."""
  _, found, weight_BT = _lacking(task, parts, batch)
  energy = lambda y_BTE: jnp.sum(weight_BT[..., None] * jnp.square(y_BTE))
  return sharding.whole(jax.tree.map(energy, found), task.mesh)


def _lacking(task, parts, batch):
  """A task on a minibatch.

  Returns:
    fed_BTC: the input of the matrices, in their dtype.
    {name: (what they lack, the target)}, float32 [B, T, outputs] each.
    weight_BT: lowered so that no token's input energy exceeds CAP medians.
  """
  config, names, layer = task.config, task.names, parts.layer
  z_BTD, u_BTD, (weight_BT, pads_BT), fed, dense_fed, given_BTD = batch
  found = {}
  if given_BTD is not None:
    scale = config.residual_scale
    z_BTE, u_BTE = stream(config, z_BTD), stream(config, u_BTD)
    lacks_BTE = (z_BTE - stream(config, given_BTD)) / scale
    found[names[0]] = lacks_BTE, (z_BTE - u_BTE) / scale
  else:
    dense = parts.dense_layer
    product = partial(float32_product.product, "btd,de->bte")
    for n in names:
      left = dense[n] if n in HALVES else axes.mask(n, dense[n], parts.masks)
      left = linear_algebra.as_matrix(n, left)
      target_BTE = product(_flat(dense_fed), left)
      weight = linear_algebra.as_matrix(n, layer[n])
      given_BTE = product(_flat(fed), weight)
      # Readers' biases are the same in both; FLAP's are the pruned model's own.
      if n in HALVES and (bias := f"{n}_bias") in layer:
        target_BTE += (dense.get(bias, 0) - layer[bias]).astype(jnp.float32)
      found[n] = target_BTE - given_BTE, target_BTE
  fed_BTC = _flat(fed)
  energy_BT = jnp.sum(jnp.square(fed_BTC.astype(jnp.float32)), axis=-1)
  most = CAP * median(*sharding.whole((energy_BT, ~pads_BT), task.mesh))
  weight_BT *= jnp.minimum(1, most / jnp.maximum(energy_BT, 1e-30))
  return fed_BTC, found, weight_BT


def _flat(fed):
  """The input of a matrix, [B, T, C]."""
  return fed.reshape(*fed.shape[:2], -1)


@partial(jax.jit, donate_argnums=0)
def _plus(total, found):
  return jax.tree.map(jnp.add, total, found)
