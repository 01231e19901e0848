"""Two residual streams of a refit: of the dense model and of the pruned one.

Each is a list of minibatches, float32, that moves through the layers half by
half.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.layer import (
  HALVES,
  NAMES,
  attention_inputs,
  carry,
  norm,
  read,
  write,
)

HELD_OUT = 0.1  # share of the sequences that judge a refit
CAP = 10.0  # most that a token's input energy counts, in medians
ENOUGH = 20  # tokens per input channel from which a weak ridge is best
WEAK, STRONG = 0.1, 1.0  # ridges with enough tokens, and with fewer

Stream = list[jax.Array]  # minibatches [B, T, D], float32


class Tokens(NamedTuple):
  """What the tokens of a minibatch count, [B, T], and which only pad it."""

  weight_BT: jax.Array
  pads_BT: jax.Array


Weights = list[Tokens | None]  # None = none of them counts


def start(config, outer, tokens_NT, batch, mesh) -> tuple:
  """The stream in front of the layers, and the weights to fit and to judge."""
  N, T = tokens_NT.shape
  if N < 2:
    raise UserError(
      f"a refit needs at least 2 calibration sequences, not {N}: one to fit "
      "and one to judge; raise --config.calibration.samples or "
      ".refit_samples"
    )
  tokens_MBT, valid_MB = placement.minibatches(tokens_NT, batch, mesh)
  valid_MB = np.asarray(valid_MB)
  row_MB = valid_MB.ravel().cumsum().reshape(valid_MB.shape)  # from 1
  judge_MB = row_MB > N - held_rows(tokens_NT)

  def spread(rows_B, dtype):
    return placement.replicate(np.tile(rows_B[:, None], T).astype(dtype), mesh)

  def weights(rows_MB):
    return [
      Tokens(spread(rows_B, np.float32), spread(~valid_B, bool))
      if rows_B.any()
      else None
      for rows_B, valid_B in zip(rows_MB, valid_MB, strict=True)
    ]

  stream = [_embed(config, outer, t, mesh=mesh) for t in tokens_MBT]
  return stream, weights(valid_MB & ~judge_MB), weights(valid_MB & judge_MB)


def held_rows(tokens_NT: np.ndarray) -> int:
  return max(1, round(len(tokens_NT) * HELD_OUT))


def advance(config, writer, layer, place, stream, mesh) -> None:
  """Moves a stream behind a half, a minibatch at a time: none is kept twice."""
  unit = axes.unit_of(writer)
  for number, x_BTD in enumerate(stream):
    fed = fed_to(config, writer, layer, place, x_BTD, mesh=mesh)
    if config.reuses and unit == "K":
      x_BTD = _carry(config, layer, place, x_BTD, mesh=mesh)
    stream[number] = written(config, unit, layer, x_BTD, fed, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _embed(config, outer, tokens_BT, *, mesh):
  x_BTD = embed(config, outer, tokens_BT, mesh)
  return placement.cut_rows(x_BTD.astype(jnp.float32), mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _carry(config, layer, place, x_BTD, *, mesh):
  inputs = attention_inputs(config, x_BTD.shape[1])
  x_BTD = carry(config, layer, place, inputs, x_BTD)
  return placement.cut_rows(x_BTD, mesh)


@partial(jax.jit, static_argnames=("config", "unit", "mesh"))
def written(config, unit, layer, x_BTD, fed, *, mesh):
  """A stream behind a half, of what is fed to the half's matrix."""
  return placement.cut_rows(write(unit, config, layer, x_BTD, fed), mesh)


@partial(jax.jit, static_argnames=("config", "name", "mesh"))
def fed_to(config, name, layer, place, x_BTD, *, mesh):
  """What matrix `name` of a layer multiplies, in its dtype.

  A program of its own, since attention takes most of a compile: what writes it
  to a stream and what sums it up, of either model, share it.

  Args:
    x_BTD: the residual stream in front of the half.
  """
  x_BTD, unit = x_BTD.astype(layer[name].dtype), axes.unit_of(name)
  if name not in HALVES:
    return norm(config, layer, f"{NAMES[unit]}_norm", x_BTD)
  kernel, masks = Kernel(mesh=mesh), None
  inputs = attention_inputs(config, x_BTD.shape[1], kernel=kernel)
  if "q_norm_all" in layer:  # which counts the heads that are there
    masks = {"K": jnp.any(layer["q_norm_all"] != 0, axis=(1, 2))}
  return read(unit, config, layer, place, inputs, x_BTD, masks)[0]
