"""Scoring in passes, so that memory does not grow with the calibration.

A walk (`backward`) keeps what each layer is given, 2 L D numbers a token. So a
program takes at most `calibration.pass_tokens` tokens, whole minibatches of
them, and hands on what it has summed; behind the last one a small program makes
scores of it. On one device that is the same sum in the same order as in one
pass.

On TPUs the host keeps what layers are given, where a device would keep more of
it than of those sums, and the sums too: each device has one layer's at a time.
So few passes do, each of which gathers weights and reduces sums once.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import (
  each_device,
  placement,
  sharding,
  stopping,
)
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import backward, surgery
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import Masked

# Of what layers are given, by default: on a device, and for each device in the
# host's memory, which is half of what a v5e's host has for a chip.
KEPT_BYTES = 1 << 29
HOSTED_BYTES = 24 << 30


class Pass(NamedTuple):
  """How much a program takes.

  Attributes:
    minibatches: at least one.
    hosted: as `backward.Stacked`'s.
  """

  minibatches: int
  hosted: bool = False


class Programs(NamedTuple):
  """The programs of a walk.

  Attributes:
    walk: goes through minibatches and ends with scores; or goes on from sums,
      which are donated, and hands them on.
    end: makes scores of sums.
    nothing: the sums of nothing; None where nothing is summed.
    hosted: of a mesh, walk and end as they are compiled where the host keeps
      what layers are given.
  """

  walk: Callable[..., dict]
  end: Callable[..., dict] | None = None
  nothing: Callable[..., backward.Sums | None] = lambda *_, **how: None
  hosted: Callable[[Mesh], "Programs"] | None = None


def programs(
  step: Callable[..., dict],
  visitor: Callable[..., backward.Visitor | None],
  told: Callable[[dict], dict],
  *static: str,
) -> Programs:
  """Compiles a walk.

  Args:
    step: takes (config, stacked, masks, tokens_MBT, valid_MB), and by name
      mesh, attention, hosted, and `before` of `backward.walk`.
    visitor: of the tokens of a row, the mesh, and what `static` names; None
      where there is no way back.
    told: of what the visitor keeps, what the step tells of it.
    static: names of other arguments that are no arrays.
  """
  names = ("config", "mesh", "attention", "hosted", *static)

  def made(fn, config, stacked, masks, *sums, length, mesh, **how):
    where = mesh, how.pop("attention", "auto"), how.pop("hosted", False)
    model = backward.Stacked(config, stacked, masks, *where)
    own = visitor(length, mesh, **how)
    return None if own is None else fn(model, own, *sums)

  def ended(*args):
    return sharding.whole(told(backward.ended(*args)), args[0].mesh)

  def end(config, stacked, masks, sums, **how):
    return made(ended, config, stacked, masks, sums, **how)

  def compiled(mesh=None):
    options = mesh and placement.hosted_options(mesh)
    jitted = partial(jax.jit, compiler_options=options)
    return Programs(
      jitted(step, static_argnames=names, donate_argnames="before"),
      jitted(end, static_argnames=(*names, "length")),
      partial(made, backward.nothing),
    )

  return compiled()._replace(hosted=cache(compiled))


def scored(visitor: Callable[..., backward.Visitor], *static: str) -> Programs:
  """Compiles a walk that scores units, as `backward.scored`.

  Its programs take equal layers (`surgery.dense`), what `surgery.expand` gives,
  masks {"K": bool [L, K], "F": bool [L, F]} of the units that are left, M
  minibatches of B sequences, and valid_MB, False for rows that only pad; by
  name mesh, attention as `prune.attention`, `hosted` of `backward.Stacked`,
  `before` of `backward.walk`, and what `static` names. They return loss_M, the
  mean over each minibatch's predictions, and scores, those of masked units
  meaning nothing; or, of `before`, the sums so far.

  Args:
    visitor: of the tokens of a row, the mesh, and what `static` names.
    static: names of arguments that are no arrays.
  """

  def step(
    config: ModelConfig,
    stacked: Params,
    masks: dict[str, jax.Array],
    tokens_MBT: jax.Array,
    valid_MB: jax.Array,
    *,
    mesh: Mesh,
    attention: str = "auto",
    hosted: bool = False,
    before: backward.Sums | None = None,
    **how: Any,
  ) -> dict:
    where = mesh, attention, hosted
    model = backward.Stacked(config, stacked, masks, *where)
    own = visitor(tokens_MBT.shape[-1], mesh, **how)
    return backward.scored(model, tokens_MBT, valid_MB, own, before)

  return programs(step, visitor, lambda kept: {"scores": kept}, *static)


def run(
  programs: Programs,
  masked: Masked,
  tokens_NT: np.ndarray,
  masks: Masks | None = None,
  **how: Any,
) -> dict:
  """What a walk finds, on the host, in as many passes as it needs.

  Args:
    programs: of the walk.
    masked: the model.
    tokens_NT: calibration tokens.
    masks: in place of the model's.
    how: more arguments of the walk.
  """
  task = masked.task
  how |= {"mesh": task.mesh, "attention": task.settings.attention}
  model = (
    surgery.dense(task.full),
    masked.stacked,
    placement.replicate(masks or masked.masks, task.mesh),
  )
  programs, how, batch, most, handed_on = prepared(
    programs,
    model,
    tokens_NT.shape,
    masked.stacked["embedding"].dtype,
    task.batch,
    task.pass_tokens,
    how,
  )
  parts = placement.passes(tokens_NT, batch, task.mesh, most)
  so_far, found = _nothing(handed_on()) if len(parts) > 1 else None, []
  for tokens_MBT, valid_MB in parts:
    stopping.moment()
    args = *model, *placement.replicate((tokens_MBT, valid_MB), task.mesh)
    result = programs.walk(*args, before=so_far, **how)
    so_far = result.pop("sums", None)
    found.append(jax.device_get(result))
  real = np.concatenate([valid_MB.any(1) for _, valid_MB in parts])
  whole = dict(found[-1])
  if so_far is not None:
    length = tokens_NT.shape[1]
    ended = programs.end(*model, so_far, length=length, **how)
    whole |= jax.device_get(ended)
  for name in ("loss_M", "importance_ML"):
    if name in whole:
      whole[name] = np.concatenate([f[name] for f in found])[real]
  return whole


class Prepared(NamedTuple):
  """How the walk over all calibration tokens goes.

  Attributes:
    programs, how: of the walk, as it keeps what layers are given.
    batch: samples of a minibatch.
    minibatches: of a pass.
    handed_on: `sums`, found when asked for.
  """

  programs: Programs
  how: dict
  batch: int
  minibatches: int
  handed_on: Callable[[], Any]


def prepared(
  programs: Programs,
  model: tuple,
  shape_NT: tuple[int, int],
  dtype: np.dtype,
  batch: int,
  pass_tokens: int,
  how: dict,
) -> Prepared:
  """Cuts the calibration tokens into minibatches and passes.

  Args:
    programs: of the walk.
    model: config, stacked and masks, or their shapes, of a program.
    shape_NT, dtype, pass_tokens: as `a_pass`'s.
    batch: samples of a minibatch, by the recipe.
    how: more arguments of the programs, `mesh` among them.
  """
  mesh = how["mesh"]
  batch = batch_of(batch, shape_NT[0], mesh, how)
  rows = placement.padded_rows(min(batch, shape_NT[0]), mesh)
  handed_on = partial(sums, programs, model, (rows, shape_NT[1]), how)
  most, hosted = a_pass(
    model[0], dtype, shape_NT, batch, pass_tokens, mesh, handed_on
  )
  if hosted:
    programs, how = programs.hosted(mesh), how | {"hosted": True}
  return Prepared(programs, how, batch, most, partial(handed_on, hosted=hosted))


def batch_of(batch: int, samples: int, mesh: Mesh, how: dict) -> int:
  """Samples of a minibatch, on many devices more than the recipe's `batch`.

  Sums over rows stay what they are; `taylor_mix` weighs means of minibatches
  against squares of rows, so it keeps the recipe's.

  Args:
    batch: of the recipe.
    samples: all there are.
    mesh: the devices.
    how: arguments of the walk.
  """
  if how.get("kind") == "taylor_mix":
    return batch
  return placement.together(batch, samples, mesh)


def a_pass(
  full: ModelConfig,
  dtype: np.dtype,
  shape_NT: tuple[int, int],
  batch: int,
  pass_tokens: int,
  mesh: Mesh,
  handed_on: Callable[[], Any] = lambda: None,
) -> Pass:
  """How many minibatches one takes, and where it keeps what layers are given.

  Args:
    full: the model.
    dtype: of its residual stream.
    shape_NT: of the calibration tokens.
    batch, pass_tokens: as `calibration`'s; 0 tokens = those for which what
      layers are given takes `KEPT_BYTES` on a device; or all, if that takes
      no more than what passes would hand on; or, on TPUs, `HOSTED_BYTES`.
    mesh: the devices.
    handed_on: `sums`, asked only if one pass may do.
  """
  N, T = shape_NT
  rows = placement.padded_rows(min(batch, N), mesh)
  parts = each_device.parts_of(mesh, each_device.row_axes(mesh, rows))
  numbers = 2 * full.num_layers * full.stream_width()
  a_token = numbers * np.dtype(dtype).itemsize
  fitting = lambda size: size * parts // a_token
  tokens, all_of_them = fitting(KEPT_BYTES), -(-N // rows) * rows * T
  hosted = False
  if pass_tokens:
    tokens = pass_tokens
  elif tokens < all_of_them <= fitting(_bytes(handed_on())):
    tokens = all_of_them
  elif tokens < all_of_them and placement.has_host_memory(mesh):
    tokens, hosted = fitting(HOSTED_BYTES), True
  return Pass(max(1, tokens // (rows * T)), hosted)


def _bytes(shapes: Any) -> int:
  """Of arrays, on one device."""
  own = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return sum(
    math.prod(own(x)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)
  )


def sums(
  programs: Programs,
  model: tuple,
  shape_BT: tuple[int, int],
  how: dict,
  hosted: bool = False,
) -> Any:
  """Shapes of what a pass hands on, and where it lies; None = nothing.

  Args:
    programs: of the walk.
    model, how: its config, stacked params and masks, or their shapes, and its
      arguments by name.
    shape_BT: of a minibatch.
    hosted: as `Pass`'s.
  """
  (config, *arrays), mesh = model, how["mesh"]
  nothing = partial(programs.nothing, config, length=shape_BT[1], **how)
  found = jax.eval_shape(nothing, *arrays)
  axes = each_device.row_axes(mesh, shape_BT[0])

  def placed(x):
    where = each_device.cut_sum(x.shape, mesh, axes)
    if hosted:
      where = placement.streamed(where, x.ndim)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(placed, found)


def _nothing(shapes: Any) -> Any:
  """Sums of nothing, an array at a time."""
  zeros = partial(jax.jit, jnp.zeros, static_argnums=(0, 1))

  def make(x):
    return zeros(out_shardings=x.sharding)(x.shape, x.dtype)

  return jax.tree.map(make, shapes)
