"""Device memory of scoring, refit and training, before there are any weights.

The programs are compiled for abstract arrays on the intended mesh and asked for
their buffers: those of TPUs by the TPU compiler, which needs no TPU, each phase
in a process of its own (`compiling`). Where training is unrolled over layers,
it is compiled for two and for three of them and extended in a straight line.

Other devices that are not here have virtual CPU devices for stand-ins, in a
process of its own. Then scoring is compiled in float32 (in half precision
XLA's CPU backend keeps float32 copies that no accelerator needs), and training
is added up by hand: that backend neither reorders a program to use less memory,
which undoes rematerialisation, nor scatters gradients as it reduces them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import each_device, placement, sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.devices import meant_mesh, nodes
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import (
  arrays,
  compiling,
  elsewhere,
  training_memory,
)
from adapt_pruner_jax.planning.arrays import Bytes
from adapt_pruner_jax.pruning import passes, surgery
from adapt_pruner_jax.pruning.scores import KINDS
from adapt_pruner_jax.training import memory as training_size
from adapt_pruner_jax.training.step import check_rows

# Scores that walk back through the model, each by its own program.
WALKS = ("curvature", "fisher", "surgeon")


def measure(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: Sequence[jax.Device] | int | str,
  size: float = 0.0,
  kind: str = "",
) -> dict[str, Bytes]:
  """Measures {"scoring": bytes, "refit": ..., "refit by loss": ...,
  "training": ...} of a run.

  Refits and training are left out where there are none, scoring where scores
  are neither of `pruning.scores` nor of WALKS.

  Args:
    full: the original model.
    student: the largest model that is trained.
    devices: those that the programs are compiled for, how many stand-ins, or a
      slice of TPUs, such as "v5e:2x4".
    size: bytes of memory of one, for `train.remat=auto`; 0 = theirs.
    kind: what stand-ins stand in for, as in `models.devices.DEVICES`.

  Raises:
    UserError: a mesh or a batch that does not fit the number of devices.
  """
  models = config, full, student
  if isinstance(devices, str):
    found = {}
    for phase in phases(config):
      found |= elsewhere.ask(*models, devices, size, kind, [phase])
    return found
  if not isinstance(devices, int):
    return measure_here(*models, devices, size, kind, True, phases(config))
  if jax.default_backend() == "cpu" and jax.device_count() >= devices:
    here = jax.devices()[:devices]
    return measure_here(*models, here, size, kind, False, phases(config))
  return elsewhere.ask(*models, devices, size, kind, phases(config))


def phases(config: Config) -> list[str]:
  """Which phases of a run are measured."""
  scores = config.prune.pair()[1] in (*KINDS, *WALKS)
  return [
    name
    for name, there in (
      ("scoring", scores),
      ("refit", config.prune.solves()),
      ("refit by loss", config.prune.refit_passes),
      ("training", config.train.tokens),
    )
    if there
  ]


def measure_here(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: Sequence[jax.Device],
  size: float,
  kind: str,
  real: bool,
  wanted: Sequence[str],
) -> dict[str, Bytes]:
  wanted_mesh = dataclasses.asdict(config.mesh)
  if not real:  # what stands in says nothing of nodes
    wanted_mesh["slices"] = config.mesh.slices or nodes(kind, len(devices))
  mesh = sharding.make_mesh(**wanted_mesh, devices=devices)
  sharding.require_experts(full, mesh)
  seen = mesh if real else meant_mesh(mesh, kind)
  if config.train.tokens:
    check_rows(config.data.batch, config.train.accumulation, mesh)

  def trained(config: Config) -> Bytes:
    made = _with_remat(config, full, student, seen, size)
    if real:
      return training_memory.training(made, full, student, mesh)
    given = made, full, student, mesh, seen
    return training_memory.estimated_training(*given)

  def measured(phase: str) -> Bytes:
    if phase == "training":
      return trained(config)
    if phase == "refit by loss":
      found = trained(_refit_as_training(config, mesh))
    elif phase == "refit":
      found = refitting(config, full, mesh)
    else:
      found = scoring(config, full, mesh, real)
    return found | beside(config, full, student, mesh, seen)

  return {phase: measured(phase) for phase in wanted}


def beside(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  mesh: Mesh,
  seen: Mesh,
) -> Bytes:
  """Adds up what later stages have beside a prune: moments, a teacher.

  Args:
    seen: the mesh, of the devices that are meant.
  """
  found, settings = {}, config.train
  if config.prune.stages == 1 or not settings.tokens:
    return found
  if settings.carry_moments and not settings.lora_rank:
    moments = jnp.dtype(settings.moments)
    found["moments of recovery"] = 2 * arrays.model_bytes(
      student, moments, mesh
    )
  if settings.has_teacher_beside():
    dtype = training_memory.teacher_dtype(config, full, seen)
    found["teacher of recovery"] = arrays.model_bytes(full, dtype, mesh)
  return found


def _with_remat(config, full, student, seen, size) -> Config:
  """The recipe with what `train.remat=auto` becomes on these devices."""
  settings, data = config.train, config.data
  teacher = full if settings.has_teacher_beside() else None
  shape = data.batch // settings.accumulation, data.seq_len
  settings = training_size.with_remat(
    settings, student, teacher, shape, seen, size
  )
  return dataclasses.replace(config, train=settings)


def _refit_as_training(config: Config, mesh: Mesh) -> Config:
  """The recipe of a training that does what a refit by the loss does."""
  from adapt_pruner_jax.pruning import refit_loss

  of, by = config.calibration, config.prune
  batch = min(by.refit_batch or of.batch, of.refit_samples)
  rows = placement.padded_rows(batch, mesh)
  data = dataclasses.replace(config.data, batch=rows, seq_len=of.seq_len)
  settings = refit_loss.as_training(by.refit_rate, by.refit_temperature)
  return dataclasses.replace(config, train=settings, data=data)


def _walk(config: Config, mesh: Mesh) -> tuple[passes.Programs, dict]:
  """The programs that score units, and their arguments by name."""
  from adapt_pruner_jax.pruning import curvature, fisher, scores
  from adapt_pruner_jax.pruning.baselines import surgeon

  kind = config.prune.pair()[1]
  how = {"mesh": mesh, "attention": config.prune.attention}
  if kind in KINDS:
    own = {"kind": kind, "measure": config.prune.layer_importance}
    return scores.PROGRAMS, how | own
  if kind == "surgeon":
    how["kind"] = surgeon.kind_of(config.prune)
  rooms = {"curvature": curvature, "fisher": fisher, "surgeon": surgeon}
  return rooms[kind].PROGRAMS, how


def scoring(
  config: Config, full: ModelConfig, mesh: Mesh, real: bool = True
) -> Bytes:
  """Measures a pruning step: the model, its stacked copy, and the rest.

  Args:
    config: the recipe.
    full: the original model; scores are always taken at its size.
    mesh: real devices, or stand-ins.
    real: whether they are those that the run is meant for.
  """
  dtype = arrays.weight_dtype(config)
  kind = dtype if real else jnp.dtype("float32")
  lowered, end, (M, B, T), before = lower_scoring(config, full, mesh, kind)
  given = stacked_params(config, full, kind, mesh), before
  temporary = compiling.temporary(lowered, given, mesh)
  if end is not None:
    temporary = max(temporary, compiling.temporary(end, given, mesh))
  if not real and dtype.itemsize == 2:
    # The residual stream in front of each half layer is what is stored.
    parts = each_device.parts_of(mesh, each_device.row_axes(mesh, B))
    width = 2 * full.num_layers * full.stream_width()
    numbers = M * (B // parts) * T * width
    temporary -= 2 * numbers
  found, stacked = {}, stacked_params(config, full, dtype, mesh)
  if not config.prune.stream_layers:  # which are in the host's memory
    found["weights"] = arrays.model_bytes(full, dtype, mesh)
  found["stacked copy"] = arrays.size(stacked)
  if before is not None:
    found["sums between passes"] = arrays.size(before)
  # While the copy is made there is one more, when the rest is not there yet.
  return found | {"temporary": max(temporary, found["stacked copy"])}


def lower_scoring(
  config: Config, full: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Lowered, Lowered | None, tuple[int, int, int], Any]:
  """Lowers the programs that score units.

  Args:
    config, full, mesh: as `scoring`'s.
    dtype: of the stacked weights.

  Returns:
    The program of a pass; the one that ends several; M minibatches, B rows and
    T tokens that a pass takes; and the sums that it goes on from. The second
    and the fourth are None if all is done in one pass.
  """
  recipe, whole = config.calibration, sharding.replicated(mesh)
  shape = recipe.samples, recipe.seq_len
  layers, masks = full.num_layers, {}
  for unit, width in full.units().items():
    mask = layers, *surgery.mask_shape(full, unit, max(width))
    masks[unit] = jax.ShapeDtypeStruct(mask, bool, sharding=whole)
  programs, how = _walk(config, mesh)
  stacked = stacked_params(config, full, dtype, mesh)
  model = surgery.dense(full), stacked, masks
  programs, how, batch, most, handed_on = passes.prepared(
    programs,
    model,
    shape,
    arrays.weight_dtype(config),
    recipe.batch,
    recipe.pass_tokens,
    how,
  )
  nobody = np.zeros(shape, np.int32)
  tokens_MBT, valid_MB = placement.passes(nobody, batch, mesh, most)[0]
  M, B, T = tokens_MBT.shape
  args = (
    *model,
    jax.ShapeDtypeStruct((M, B, T), jnp.int32, sharding=whole),
    jax.ShapeDtypeStruct((M, B), bool, sharding=whole),
  )
  before, end = None, None
  if recipe.samples > M * B:
    before = handed_on()
  with jax.default_matmul_precision(config.prune.precision):
    walk = programs.walk.lower(*args, before=before, **how)
    if before is not None:
      end = programs.end.lower(*model, before, length=T, **how)
  return walk, end, (M, B, T), before


def stacked_params(
  config: Config, full: ModelConfig, dtype: jnp.dtype, mesh: Mesh
) -> Any:
  """What is scored, as abstract arrays, where the recipe keeps it."""
  stacked = arrays.stacked_params(full, dtype, mesh)
  return arrays.streamed(stacked) if config.prune.stream_layers else stacked


def refitting(config: Config, full: ModelConfig, mesh: Mesh) -> Bytes:
  """Adds up a refit: `refit_held`, and what the fullest program needs."""
  recipe, wide = config.calibration, surgery.dense(full)
  shards = placement.batch_shards(mesh)
  rows = -(-min(recipe.batch, recipe.refit_samples) // shards)
  C, outputs = _channels(full), 0
  if config.prune.refit_all:  # what gate and up give, and should give
    most = max(2 * wide.ffn_widths[0], 3 * max(wide.head_channels()))
    outputs = full.hidden_size + most
  fed = 2 * 4 * rows * recipe.seq_len * max(C, outputs)  # in, weighted
  if full.experts:
    F, E = wide.ffn_widths[0], full.hidden_size
    sent = rows * recipe.seq_len * full.experts_per_token
    fed = max(fed, 4 * sent * (2 * F + 3 * E))
  temporary = max(_solving(C, full, mesh), fed)
  return refit_held(config, full, mesh) | {"temporary": temporary}


def refit_held(config: Config, full: ModelConfig, mesh: Mesh) -> Bytes:
  """Adds up what a refit holds: two models, two residual streams, one least
  squares.

  Each device has one layer of both models whole, and sums of its own rows. In
  the middle of a prune the second model is the stacked one.
  """
  dtype, recipe = arrays.weight_dtype(config), config.calibration
  shards, D = placement.batch_shards(mesh), full.hidden_size
  width = full.stream_width()
  rows = -(-min(recipe.batch, recipe.refit_samples) // shards)
  number = -(-recipe.refit_samples // shards)
  wide, C = surgery.dense(full), _channels(full)
  one_layer = sum(
    math.prod(axes.shape(name, wide.sizes(0)))
    for name in model_config.layer_names(wide)
  )
  equations = C**2 + C * D
  if config.prune.refit_all:
    outputs = max(2 * wide.ffn_widths[0], 3 * max(wide.head_channels()))
    equations = max(equations, D**2 + D * outputs)
  if full.experts:  # each with equations of its own
    F = wide.ffn_widths[0]
    equations = max(equations, full.experts * (F**2 + F * D))
  return {
    "weights": 2 * arrays.model_bytes(full, dtype, mesh),
    # Of both models; a minibatch at a time moves behind a half layer.
    "streams": 4 * recipe.seq_len * width * (2 * number + rows),
    "layers": 2 * dtype.itemsize * one_layer,
    "least squares": 2 * 4 * equations,  # summed, and of a minibatch
  }


def _channels(full: ModelConfig) -> int:
  """The most inputs of a matrix."""
  wide = surgery.dense(full)
  mlp = 0 if full.experts else wide.ffn_widths[0]
  return max(*wide.head_channels(), mlp, full.hidden_size)


def _solving(channels: int, full: ModelConfig, mesh: Mesh) -> int:
  """Bytes that the largest least squares needs, solved on the mesh."""
  from adapt_pruner_jax.pruning import least_squares

  whole = sharding.replicated(mesh)
  divides = channels % placement.batch_shards(mesh) == 0
  cut = placement.batch_sharding(mesh) if divides else whole
  array = lambda where, *shape: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=where
  )
  matrix = channels, full.hidden_size
  given = (
    *(array(cut, channels, channels), {"down": array(cut, *matrix)}),
    *({"down": array(whole, *matrix)}, array(whole)),
  )
  lowered = least_squares.solve.lower(*given, mesh=mesh)
  return compiling.temporary(lowered, given, mesh)
