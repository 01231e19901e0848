"""Refit: what is left of a layer learns to stand in for what was removed.

From the embedding on, two residual streams pass the layers in float32: z of
the dense model and u of the pruned one. At each matrix W that writes to the
stream (`o`, then `down`), with x its input in the pruned model, ridge least
squares makes u land on z:

  W <- argmin  sum over tokens |u + x W - z|^2  +  ridge |W - W_now|^2

The target holds the error that earlier layers have left, so each layer corrects
those before it. Where a norm is behind the matrix (Gemma 2, OLMo 2) the target
is what the dense model gives to that norm, from its own stream. Experts are
refitted one by one (`refit_experts`). No parameter is added. `refit_all` also
refits the matrices that read the stream, to what the dense model computes in
their place.

How they are solved is in `least_squares`. In large models the first token of a
sequence can have activations a thousand times larger than the rest; no token
counts for more than `streams.CAP` typical ones.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import placement, sharding, stopping
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import least_squares, surgery
from adapt_pruner_jax.pruning.surgery import Kept, Masks
from adapt_pruner_jax.pruning.task import Masked


def refit(
  dense: tuple[ModelConfig, Params],
  pruned: tuple[ModelConfig, Params],
  kept: Kept,
  tokens_NT: np.ndarray,
  batch: int,
  *,
  ridge: float = 0.0,
  refit_all: bool = False,
  mesh: Mesh | None = None,
) -> tuple[Params, list[dict]]:
  """Refits a pruned model to the one that it was cut from.

  Args:
    dense: the model before pruning.
    pruned: the model after it, by any method that keeps the residual width.
    kept: the units of `dense` that are left, in its numbering
      (`surgery.relative_to` translates).
    tokens_NT: calibration tokens; the last tenth of the rows is held out.
    batch: sequences at a time.
    ridge: in units of the median energy of a matrix's input channels; 0 =
      weak where there are enough tokens for each channel, else strong
      (`least_squares`).
    refit_all: refit q, k, v, gate and up too.
    mesh: devices that the batch is cut over; default one.

  Returns:
    The new params, and a record for each matrix: {"layer", "matrix", "ridge",
    "before", "after", "refitted"}, with the norm of the held-out residual over
    that of the target, before and after. A matrix keeps its old weights where
    the residual would not fall. Layers in front of the first pruned one
    have no records.

  Raises:
    UserError: fewer than two rows, or a model that cannot be refitted.
  """
  (dense_config, dense_params), (config, params) = dense, pruned
  mesh = mesh or sharding.one_device()
  wide_dense = surgery.dense(dense_config)
  wide = config.with_units(wide_dense.units())
  masks = surgery.to_masks(kept, dense_config)
  everything = surgery.everything(dense_config)

  def layer_at(i: int) -> tuple[Params, Params, Masks]:
    stopping.moment()
    return (
      _widened(dense_params, i, everything, wide_dense, mesh),
      _widened(params, i, kept, wide, mesh),
      {u: m[i] for u, m in masks.items()},
    )

  outer = {n: params[n] for n in model_config.outer_names(config)}
  new, records = dict(params), []
  for i, matrices, found in least_squares.layers(
    wide, outer, layer_at, tokens_NT, batch, ridge, refit_all, mesh
  ):
    name = axes.layer_name(i)
    new[name] = params[name] | _narrowed(matrices, i, kept, mesh)
    records += found
  return new, records


def refit_masked(
  masked: Masked, masks: Masks, tokens_NT: np.ndarray
) -> tuple[Params, list[dict]]:
  """Refits what the masks leave of a model to the one that the task began with.

  Args:
    masked: the model under way, whose stacked layers are donated;
      `masked.masks` may be of a later step.
    masks: units that are left.
    tokens_NT: calibration tokens, of the step.

  Returns:
    The new stacked params, and a record a matrix.
  """
  task, stacked = masked.task, masked.stacked
  config = surgery.dense(task.full)
  placed = placement.replicate(masks, task.mesh)
  new, records = dict(stacked["layers"]), []

  names = functools.partial(model_config.layer_names, config)

  def layer_at(i: int) -> tuple[Params, Params, Masks]:
    stopping.moment()
    return (
      _widened(task.params, i, task.kept, config, task.mesh),
      _layer({n: new[n] for n in names(i)}, placed, i),
      {u: m[i] for u, m in masks.items()},
    )

  outer = {n: stacked[n] for n in model_config.outer_names(config)}
  ridge = task.settings.refit_ridge
  for i, changed, found in least_squares.layers(
    config, outer, layer_at, tokens_NT, task.batch, ridge, False, task.mesh
  ):
    for n, weight in changed.items():
      new[n] = _setter(new[n].sharding)(new[n], weight, i)
    records += found
  return stacked | {"layers": new}, records


def _widened(
  params: Params, i: int, kept: Kept, wide: ModelConfig, mesh: Mesh
) -> Params:
  """Layer i in dense coordinates, zero where units are not kept."""
  at = {u: kept[u][i] for u in axes.UNITS}
  layer, sizes = params[axes.layer_name(i)], wide.sizes(i)
  names = model_config.layer_names(wide, i)
  shapes = {n: axes.shape(n, sizes) for n in names}
  if {n: x.shape for n, x in layer.items()} == shapes:
    return layer
  zero = np.zeros((), params["embedding"].dtype)
  fn = lambda layer: surgery.widen(layer, at, wide, zero, i)
  return surgery.transform(fn, layer, mesh)


def _narrowed(matrices: Params, i: int, kept: Kept, mesh: Mesh) -> Params:
  """The kept units of matrices of layer i."""
  at = {u: kept[u][i] for u in axes.UNITS}
  take = lambda tree: {n: axes.take(n, w, at) for n, w in tree.items()}
  return surgery.transform(take, matrices, mesh)


@jax.jit
def _layer(layers: Params, masks: dict[str, jax.Array], i: int) -> Params:
  """Layer i of stacked params, zero where units are masked."""
  masks = {u: m[i] for u, m in masks.items()}
  return {n: axes.mask(n, w[i], masks) for n, w in layers.items()}


@functools.cache
def _setter(where: jax.sharding.Sharding) -> Callable[..., jax.Array]:
  """Puts a weight in a stack, in place, of arrays that lie there."""
  put = lambda stacked, weight, i: stacked.at[i].set(weight)
  return jax.jit(put, donate_argnums=0, out_shardings=where)
