"""The forward pass of training: rows to the stream behind the final norm.

In the dtype of the arithmetic, of layers that are stacked or not, of a model or
of adapters beside one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.models import (
  axes,
  experts,
  layer,
  layer_runs,
  model_config,
)
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training.lora import beside

MATRICES = axes.SCORED["K"] + axes.SCORED["F"]  # of a layer


def frozen_ends(
  config: ModelConfig,
  settings: Train,
  params: Params,
  batch: Mapping[str, Any],
  mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
  """The stream behind the final norm of a model that is not trained, [B, T, D],
  and its output matrix.

  Args:
    config, params: of the model; its layers may be stacked.
    settings, batch, mesh: of the training.
  """
  frozen = dataclasses.replace(settings, remat="none")
  return ends(config, frozen, params, None, batch, mesh)[:2]


def ends(
  config: ModelConfig,
  settings: Train,
  trained: Any,
  base: Params | None,
  batch: Mapping[str, Any],
  mesh: Mesh,
) -> tuple[jax.Array, jax.Array, experts.Load | None]:
  """The stream behind the final norm, [B, T, D], the output matrix, and how
  experts are loaded, if the loss asks for that.

  Args:
    config, settings, batch, mesh: of the training; `remat` is not `auto`.
    trained: params, or the adapters of `base`; their layers may be stacked.
    base: the frozen params under LoRA.
  """
  alpha, kernel = settings.lora_alpha, Kernel(settings.attention, mesh)
  params = trained if base is None else base
  matrix, dtype = head_matrix(config, params), jnp.dtype(settings.dtype)
  x_BTD = embed(config, params, batch["tokens_BT"], mesh, dtype)
  positions_BT, segments_BT = batch["positions_BT"], batch["segments_BT"]
  counts_BT = segments_BT > 0 if config.router_loss_on else None
  if not layer_runs.bounds(trained):
    if base is not None:
      layers = {n: beside(base[n], f, alpha) for n, f in trained.items()}
      params = base | layers
    model = {"params": cast(params, settings)}
    decoder = Decoder(config, settings.remat, kernel)
    rows = x_BTD, segments_BT, positions_BT, counts_BT
    x_BTD, load = decoder.apply(model, *rows, method="loaded")
    return x_BTD, matrix, load

  def weights_of(part: Any) -> Params:
    return cast(part if base is None else beside(*part, alpha), settings)

  stacked = trained
  if base is not None:
    stacked = {name: (base[name], trained[name]) for name in trained}
  inputs = layer.attention_inputs(config, positions_BT, segments_BT, kernel)
  x_BTD, load = layer_runs.scan_layers(
    config, stacked, weights_of, inputs, x_BTD, settings.remat, counts_BT
  )
  names = model_config.outer_names(config)
  outer = {"params": cast({name: params[name] for name in names}, settings)}
  behind = Decoder(config.with_layers(()))
  return behind.apply(outer, x_BTD, method="normed"), matrix, load


def cast(params: Params, settings: Train) -> Params:
  """Params in the dtype of the arithmetic, but for what is in eight bits.

  Matrices of layers stay float32 if their gradients are to be summed so: they
  are rounded where they are multiplied (`arithmetic.project`).
  """
  whole = MATRICES if settings.gradient_dtype == "float32" else ()

  def one(name: str | None, _: int | None, p: jax.Array) -> jax.Array:
    if name in whole or p.dtype == jnp.int8:
      return p
    return p.astype(settings.dtype)

  return axes.map_named(one, params)
