"""Scoring in passes, so that memory does not grow with the calibration.

A walk (`backward`) keeps what each layer is given, 2 L D numbers a token. So a
program takes at most `calibration.pass_tokens` tokens, whole minibatches of
them, and hands on what it has summed: the last one makes scores of it. On one
device that is the same sum in the same order as in one pass.

On TPUs the host keeps what layers are given, where a device would keep more of
it than of those sums: each device has one layer's at a time, and one pass does,
which gathers weights and reduces sums once.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import each_device, placement, stopping
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
  """The two programs of a walk.

  Attributes:
    whole: goes through minibatches and ends with scores.
    part: hands its sums on; they are donated.
    hosted: of a mesh, the two as they are compiled where the host keeps what
      layers are given.
  """

  whole: Callable[..., dict]
  part: Callable[..., dict]
  hosted: Callable[[Mesh], "Programs"] | None = None


def programs(step: Callable[..., dict], *static: str) -> Programs:
  """Compiles a walk.

  Args:
    step: takes (config, stacked, masks, tokens_MBT, valid_MB), and by name
      mesh, attention, hosted, and before and last of `backward.walk`.
    static: names of other arguments that are no arrays.
  """
  names = ("config", "mesh", "attention", "hosted", "last", *static)

  def compiled(mesh=None):
    options = mesh and placement.hosted_options(mesh)
    jitted = partial(
      jax.jit, step, static_argnames=names, compiler_options=options
    )
    part = jitted(donate_argnames="before")
    return Programs(jitted(), partial(part, last=False))

  return compiled()._replace(hosted=cache(compiled))


def scored(visitor: Callable[..., backward.Visitor], *static: str) -> Programs:
  """Compiles a walk that scores units, as `backward.scored`.

  Its programs take equal layers (`surgery.dense`), what `surgery.expand` gives,
  masks {"K": bool [L, K], "F": bool [L, F]} of the units that are left, M
  minibatches of B sequences, and valid_MB, False for rows that only pad; by
  name mesh, attention as `prune.attention`, `hosted` of `backward.Stacked`,
  `before` and `last` of `backward.walk`, and what `static` names. They return
  loss_M, the mean over each minibatch's predictions, and scores, those of
  masked units meaning nothing; or, if it is not the last walk, the sums so far.

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
    last: bool = True,
    **how: Any,
  ) -> dict:
    where = mesh, attention, hosted
    model = backward.Stacked(config, stacked, masks, *where)
    own = visitor(tokens_MBT.shape[-1], mesh, **how)
    return backward.scored(model, tokens_MBT, valid_MB, own, before, last)

  return programs(step, *static)


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
  so_far, found = None, []
  for number, (tokens_MBT, valid_MB) in enumerate(parts, 1):
    stopping.moment()
    args = *model, *placement.replicate((tokens_MBT, valid_MB), task.mesh)
    if number == len(parts):
      result = programs.whole(*args, before=so_far, **how)
    else:
      if so_far is None:
        so_far = _nothing(handed_on())
      result = programs.part(*args, before=so_far, **how)
      so_far = result.pop("sums", None)
    found.append(jax.device_get(result))
  real = np.concatenate([valid_MB.any(1) for _, valid_MB in parts])
  whole = dict(found[-1])
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
    handed_on: `sums`, found when first asked for.
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
  rows = one_minibatch(shape_NT, batch, mesh)
  # Of the programs as they are: options of a compiler's are for the outermost.
  handed_on = cache(partial(sums, programs, (*model, *rows), how))
  most, hosted = a_pass(
    model[0], dtype, shape_NT, batch, pass_tokens, mesh, handed_on
  )
  if hosted:
    programs, how = programs.hosted(mesh), how | {"hosted": True}
  return Prepared(programs, how, batch, most, handed_on)


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
  a_token = 2 * full.num_layers * full.hidden_size * np.dtype(dtype).itemsize
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


def one_minibatch(
  shape_NT: tuple[int, int], batch: int, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of tokens_MBT and valid_MB, M being 1.

  Args:
    shape_NT, batch, mesh: as of `a_pass`.
  """
  N, T = shape_NT
  rows = placement.padded_rows(min(batch, N), mesh)
  shape = jax.ShapeDtypeStruct
  return shape((1, rows, T), jnp.int32), shape((1, rows), bool)


def _bytes(shapes: Any) -> int:
  """Of arrays, on one device."""
  own = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return sum(
    math.prod(own(x)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)
  )


def sums(programs: Programs, args: tuple, how: dict) -> Any:
  """Shapes of what a pass hands on, and where it lies; None = nothing.

  Args:
    programs: of the walk.
    args, how: its arguments, or their shapes.
  """
  config, *arrays = args
  found = jax.eval_shape(
    lambda *arrays: programs.part(config, *arrays, **how).get("sums"), *arrays
  )
  mesh, rows = how["mesh"], arrays[-1].shape[1]
  axes = each_device.row_axes(mesh, rows)

  def placed(x):
    where = each_device.cut_sum(x.shape, mesh, axes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(placed, found)


def _nothing(shapes: Any) -> Any:
  """Sums of nothing."""
  make = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  where = jax.tree.map(lambda x: x.sharding, shapes)
  return jax.jit(make, out_shardings=where)()
