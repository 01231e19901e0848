"""Least squares for the experts of a layer: each by tokens of its own.

For each expert, with x its channels in the pruned model and W its matrix,

  W <- argmin  sum over its tokens g^2 |x W - y|^2  +  ridge |W - W_now|^2

Its tokens are those that the dense model's router sends to it, g is the weight
that it has there, y what the dense expert says of them from the dense stream.
W_now is what the dense matrix has for the channels that are left: an expert of
few tokens stays near that, since its ridge grows as they get fewer, and one
that held-out tokens do not find better keeps it.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.distributed import agreement, each_device, sharding
from adapt_pruner_jax.models import axes, experts, grouped
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import linear_algebra
from adapt_pruner_jax.pruning.median import median
from adapt_pruner_jax.pruning.streams import (
  CAP,
  ENOUGH,
  WEAK,
  Stream,
  Weights,
)

MATRIX = "moe_down"
READ = ("mlp_norm", "mlp_norm_bias", "router", "router_bias")
READ += ("router_scale", "expert_scale", "moe_norm")
ROWS = PartitionSpec(axes.BATCH)


def refit(
  config: ModelConfig,
  dense_layer: Params,
  layer: Params,
  streams: tuple[Stream, Stream],
  fit: Weights,
  held: Weights,
  channels: int,
  ridge: float,
  mesh: Mesh,
) -> tuple[Params, list[dict]]:
  """The matrix that experts write with, if any got better, and its record.

  Args:
    config: of both models, in dense coordinates.
    dense_layer, layer: of the dense model and of the pruned one.
    streams: of both, in front of the half.
    fit, held: of the tokens to fit, and those that judge.
    channels: that each expert has left.
    ridge: as `refit.refit`'s; 0 = by the tokens of each expert.
    mesh: devices that rows are cut over.
  """
  used = (*READ, *(n for n in axes.AXES if n.startswith("moe_")))
  given = [
    {n: tree[n] for n in used if n in tree} for tree in (dense_layer, layer)
  ]
  add_up = partial(_over_minibatches, config, mesh, streams)
  gram_XFF, moment_XFE, rows_X = add_up(_equations, given, fit)
  ridge_X = _ridges(np.asarray(jax.device_get(rows_X)), channels, ridge)
  old_XFE = layer[MATRIX]
  new_XFE = _solve(gram_XFF, moment_XFE, old_XFE, ridge_X, mesh=mesh)
  before = add_up(_energies, given, held)
  given[1] = given[1] | {MATRIX: new_XFE}
  after = add_up(_energies, given, held)
  before, after = agreement.from_writer(jax.device_get((before, after)))
  # Written so that NaN, from equations too singular to solve, loses.
  better_X = after[0] < before[0]
  lacks = before[0].sum(), np.where(better_X, after[0], before[0]).sum()
  shares = [float(np.sqrt(x / max(before[1].sum(), 1e-30))) for x in lacks]
  record = {
    "matrix": MATRIX,
    "ridge": float(np.median(ridge_X)),
    "before": shares[0],
    "after": shares[1],
    "refitted": bool(better_X.any()),
    "experts": int(better_X.sum()),
  }
  if not better_X.any():
    return {}, [record]
  return {MATRIX: _chosen(better_X, new_XFE, old_XFE)}, [record]


def _ridges(rows_X: np.ndarray, channels: int, ridge: float) -> np.ndarray:
  """WEAK from ENOUGH tokens a channel on, as much stronger as there are fewer.

  Args:
    rows_X: tokens of each expert.
    channels: of each expert.
    ridge: in place of all; 0 = none is given.
  """
  short_X = np.maximum(1, ENOUGH * channels / np.maximum(rows_X, 1))
  given_X = np.full(len(rows_X), ridge) if ridge else WEAK * short_X
  return given_X.astype(np.float32)


# ---- On the devices ----------------------------------------------------------


def _over_minibatches(config, mesh, streams, fn, given, weights):
  """Sums of `fn` over the minibatches that count, and over devices."""
  total = None
  for z_BTD, u_BTD, tokens in zip(*streams, weights, strict=True):
    if tokens is None:
      continue
    args = fn, config, given, z_BTD, u_BTD, tokens
    found = _of_devices(*args, mesh=mesh)
    total = found if total is None else _plus(total, found)
  return _added_up(total, mesh=mesh)


@partial(jax.jit, static_argnames=("fn", "config", "mesh"))
def _of_devices(fn, config, given, z_BTD, u_BTD, tokens, *, mesh):
  """Sums of each device over its rows, [N, ...]."""

  def alone(given, *rows):
    found = fn(_rows(config, *given, *rows, cut=mesh.size > 1))
    return jax.tree.map(lambda x: x[None], found)

  return jax.shard_map(
    alone,
    mesh=mesh,
    in_specs=(PartitionSpec(), ROWS, ROWS, ROWS),
    out_specs=ROWS,
    check_vma=False,
  )(given, z_BTD, u_BTD, tokens)


class _Rows(NamedTuple):
  """A device's rows of a minibatch, sorted by the dense model's experts.

  Attributes:
    fed_PF: channels of the pruned model.
    target_PE: what the dense expert says, without biases, which both have
      alike.
    lacks_PE: what the pruned one lacks of it.
    counts_P: 1 for rows of tokens that count.
    weight_P: g^2 of these, lowered where the input's energy exceeds CAP
      medians.
    expert_P: whose row it is.
    sizes_X: rows of each expert.
  """

  fed_PF: jax.Array
  target_PE: jax.Array
  lacks_PE: jax.Array
  counts_P: jax.Array
  weight_P: jax.Array
  expert_P: jax.Array
  sizes_X: jax.Array

  def by_expert(self, x_P: jax.Array) -> jax.Array:
    """The sum over each expert's rows."""
    zeros_X = jnp.zeros(len(self.sizes_X), jnp.float32)
    return zeros_X.at[self.expert_P].add(x_P)


def _rows(config, dense, layer, z_BTD, u_BTD, tokens, cut):
  """What both models make of a device's rows."""
  config = dataclasses.replace(config, shared_width=0)  # what is beside stays
  dtype, wide = layer[MATRIX].dtype, lambda x: x.astype(jnp.float32)
  normed = lambda weights, x: experts.normed(config, weights, x.astype(dtype))
  routed = experts.read(config, dense, normed(dense, z_BTD))
  h_TD = normed(layer, u_BTD).reshape(-1, u_BTD.shape[-1])
  h_TD = experts.to_experts(layer, h_TD)
  rows = h_TD[routed.token_P], routed.sizes_X, routed.expert_P
  fed_PF = wide(experts.channels(config, layer, *rows))
  said = lambda made_PF, weights: grouped.product(
    wide(made_PF), wide(weights[MATRIX]), routed.sizes_X
  )
  target_PE = said(routed.made_PF, dense)
  weight_P, pads_P = (x.reshape(-1)[routed.token_P] for x in tokens)
  energy_P = jnp.sum(jnp.square(fed_PF), axis=-1)
  everyone = energy_P, ~pads_P
  if cut:
    everyone = jax.lax.all_gather(everyone, axes.BATCH, tiled=True)
  most = CAP * median(*everyone)
  capped_P = jnp.minimum(1, most / jnp.maximum(energy_P, 1e-30))
  return _Rows(
    fed_PF=fed_PF,
    target_PE=target_PE,
    lacks_PE=target_PE - said(fed_PF, layer),
    counts_P=weight_P,
    weight_P=weight_P * capped_P * jnp.square(wide(routed.weight_P)),
    expert_P=routed.expert_P,
    sizes_X=routed.sizes_X,
  )


def _equations(rows: _Rows) -> tuple[jax.Array, ...]:
  """Gram matrices [X, F, F], moments [X, F, E], and tokens of each expert."""
  fed_PF = rows.fed_PF * rows.weight_P[:, None]
  gram_XFF = grouped.outer(fed_PF, rows.fed_PF, rows.sizes_X)
  moment_XFE = grouped.outer(fed_PF, rows.lacks_PE, rows.sizes_X)
  return gram_XFF, moment_XFE, rows.by_expert(rows.counts_P)


def _energies(rows: _Rows) -> tuple[jax.Array, ...]:
  """Of each expert: of what lacks, and of the target."""
  energy = lambda y_PE: rows.by_expert(
    rows.weight_P * jnp.sum(jnp.square(y_PE), axis=-1)
  )
  return energy(rows.lacks_PE), energy(rows.target_PE)


@partial(jax.jit, static_argnames="mesh")
def _added_up(sums, *, mesh):
  total = lambda x: each_device.total(x, mesh) if mesh.size > 1 else x[0]
  return sharding.whole(jax.tree.map(total, sums), mesh)


@partial(jax.jit, donate_argnums=0)
def _plus(total, found):
  return jax.tree.map(jnp.add, total, found)


@partial(jax.jit, static_argnames="mesh")
def _solve(gram_XFF, moment_XFE, old_XFE, ridge_X, *, mesh):
  """The matrices whose change solves each expert's equations."""
  scaled_XFF, scale_XF = jax.vmap(linear_algebra.scaled)(gram_XFF, ridge_X)
  right_XFE = moment_XFE / scale_XF[..., None]
  found_XFE = linear_algebra.solve_blocks(scaled_XFF, right_XFE, mesh)
  change_XFE = found_XFE / scale_XF[..., None]
  return (old_XFE.astype(jnp.float32) + change_XFE).astype(old_XFE.dtype)


@jax.jit
def _chosen(better_X, new_XFE, old_XFE):
  return jnp.where(better_X[:, None, None], new_XFE, old_XFE)
