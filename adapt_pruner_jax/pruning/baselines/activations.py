"""The calibration pass of the baselines: a minibatch, half layer by half layer.

What a method measures is reduced minibatch by minibatch, so memory does not
grow with the number of samples. Layers keep their own sizes; equal ones share
one compiled program. The batch is cut over the mesh.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import embedding, placement, sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.layer import attention_inputs, place, run_half
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.pruning.task import Masked


def batches(
  tokens_NT: np.ndarray, batch: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, np.ndarray]]:
  """Minibatches [B, T] in order, each with which of its rows are real, [B]."""
  batch = placement.together(batch, len(tokens_NT), mesh)
  tokens_MBT, valid_MB = placement.minibatches(tokens_NT, batch, mesh)
  yield from zip(tokens_MBT, np.asarray(valid_MB), strict=True)


def pair(masked: Masked) -> tuple[ModelConfig, Params]:
  """A masked model in dense coordinates, layer by layer."""
  stacked, config = masked.stacked, surgery.dense(masked.task.full)
  params = {n: stacked[n] for n in model_config.outer_names(config)}
  for i in range(config.num_layers):
    names = model_config.layer_names(config, i)
    params[axes.layer_name(i)] = {n: stacked["layers"][n][i] for n in names}
  return config, params


def half(
  config: ModelConfig,
  params: Params,
  layer: int,
  unit: str,
  x_BTD: jax.Array,
  mesh: Mesh,
  mask: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs the attention (unit K) or the MLP (F) of a layer.

  Args:
    x_BTD: the residual stream in front of it.
    mask: units that count, bool [K] or [F]; None = all.

  Returns:
    The residual stream behind it, and its activations, the input of `o`
    [B, T, K, G, H] or of `down` [B, T, F] as they are without the mask; None
    if this half is absent.
  """
  one = config.with_layers([layer])
  return _half(one, unit, params[axes.layer_name(layer)], x_BTD, mask, mesh)


@partial(jax.jit, static_argnames=("config", "unit", "mesh"))
def _half(config, unit, layer, x_BTD, mask, mesh):
  x_BTD = placement.cut_rows(x_BTD, mesh)
  inputs = attention_inputs(config, x_BTD.shape[1])
  masks = None if mask is None else {unit: mask}
  args = config, layer, place(config, 0), inputs, x_BTD, masks
  x_BTD, tap = run_half(unit, *args)
  return x_BTD, tap.fed[unit]


def embed(
  config: ModelConfig, params: Params, tokens_BT: jax.Array, mesh: Mesh
) -> jax.Array:
  """The residual stream in front of the first layer, [B, T, D].

  Args:
    config, params: of the model.
    tokens_BT: int token ids.
    mesh: devices that the rows are cut over.
  """
  outer = {n: params[n] for n in model_config.outer_names(config)}
  return _embed(config, outer, tokens_BT, mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _embed(config, outer, tokens_BT, mesh):
  x_BTD = embedding.embed(config, outer, tokens_BT, mesh)
  return placement.cut_rows(x_BTD, mesh)


def reduced(fn: Callable) -> Callable:
  """`fn(*arrays)` compiled, its results whole on the host; the last argument
  of what is returned is the mesh."""

  @partial(jax.jit, static_argnames="mesh")
  def on_devices(*arrays, mesh):
    return sharding.whole(fn(*arrays), mesh)

  return lambda *arrays, mesh: jax.device_get(on_devices(*arrays, mesh=mesh))
