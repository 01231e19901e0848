"""Device memory of scoring, refit and training, before there are any weights.

The programs are compiled for abstract arrays on the intended mesh and asked for
their buffers (XLA's memory analysis). Training is unrolled over layers, so it
is compiled for two and for three of them and extended in a straight line.

Where the intended devices are not here, virtual CPU devices stand in for them,
in a process of its own. Then scoring is compiled in float32 (in half precision
XLA's CPU backend keeps float32 copies that no accelerator needs), and training
is added up by hand: that backend neither reorders a program to use less memory,
which undoes rematerialisation, nor scatters gradients as it reduces them.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from adapt_pruner_jax.config import Config, from_json
from adapt_pruner_jax.distributed import each_device, placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays, training_memory
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
  devices: Sequence[jax.Device] | int,
  size: float = 0.0,
) -> dict[str, Bytes]:
  """Measures {"scoring": bytes, "refit": ..., "refit by loss": ...,
  "training": ...} of a run.

  Refits and training are left out where there are none, scoring where scores
  are neither of `pruning.scores` nor of WALKS.

  Args:
    full: the original model.
    student: the largest model that is trained.
    devices: those that the programs are compiled for, or how many stand-ins.
    size: bytes of memory of one, for `train.remat=auto`; 0 = theirs.

  Raises:
    UserError: a mesh or a batch that does not fit the number of devices.
  """
  if not isinstance(devices, int):
    return _measure(config, full, student, devices, size, real=True)
  if jax.default_backend() == "cpu" and jax.device_count() >= devices:
    here = jax.devices()[:devices]
    return _measure(config, full, student, here, size, real=False)
  return _elsewhere(config, full, student, devices, size)


def _measure(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: Sequence[jax.Device],
  size: float,
  real: bool,
) -> dict[str, Bytes]:
  shape = dataclasses.asdict(config.mesh)
  mesh = sharding.make_mesh(**shape, devices=devices)
  sharding.require_experts(full, mesh)
  if config.train.tokens:
    check_rows(config.data.batch, config.train.accumulation, mesh)
  found = {}
  if config.prune.pair()[1] in (*KINDS, *WALKS):
    found["scoring"] = scoring(config, full, mesh, real)
  rule = (
    training_memory.training if real else training_memory.estimated_training
  )

  def trained(config: Config) -> Bytes:
    made = _with_remat(config, full, student, mesh, size)
    return rule(made, full, student, mesh)

  if config.prune.solves():
    found["refit"] = refitting(config, full, mesh)
  if config.prune.refit_passes:
    found["refit by loss"] = trained(_refit_as_training(config, mesh))
  if config.train.tokens:
    found["training"] = trained(config)
  return found


def _with_remat(config, full, student, mesh, size) -> Config:
  """The recipe with what `train.remat=auto` becomes."""
  settings, data = config.train, config.data
  teacher = full if settings.has_teacher_beside() else None
  shape = data.batch // settings.accumulation, data.seq_len
  settings = training_size.with_remat(
    settings, student, teacher, shape, mesh, size
  )
  return dataclasses.replace(config, train=settings)


def _refit_as_training(config: Config, mesh: Mesh) -> Config:
  """The recipe of a training that does what a refit by the loss does."""
  from adapt_pruner_jax.pruning import refit_loss

  of = config.calibration
  batch = min(config.prune.refit_batch or of.batch, of.refit_samples)
  rows = placement.padded_rows(batch, mesh)
  data = dataclasses.replace(config.data, batch=rows, seq_len=of.seq_len)
  settings = refit_loss.as_training(config.prune.refit_rate)
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
  lowered, (M, B, T), before = lower_scoring(
    config, full, mesh, dtype if real else jnp.dtype("float32")
  )
  temporary = arrays.temporary(lowered.compile())
  if not real and dtype.itemsize == 2:
    # The residual stream in front of each half layer is what is stored.
    parts = each_device.parts_of(mesh, each_device.row_axes(mesh, B))
    numbers = 2 * full.num_layers * M * (B // parts) * T * full.hidden_size
    temporary -= 2 * numbers
  found, stacked = {}, stacked_params(config, full, dtype, mesh)
  if not config.prune.stream_layers:  # which are in the host's memory
    found["weights"] = arrays.model_bytes(full, dtype, mesh)
  found["stacked copy"] = arrays.size(stacked)
  if before is not None:
    found["sums between passes"] = arrays.size(before)
  if config.train.carry_moments and config.prune.stages > 1:
    moments = jnp.dtype(config.train.moments)
    found["optimizer"] = 2 * arrays.model_bytes(full, moments, mesh)
  # While the copy is made there is one more, when the rest is not there yet.
  return found | {"temporary": max(temporary, found["stacked copy"])}


def lower_scoring(
  config: Config, full: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Lowered, tuple[int, int, int], Any]:
  """Lowers the program of a pass that scores units.

  Args:
    config, full, mesh: as `scoring`'s.
    dtype: of the stacked weights.

  Returns:
    The program; M minibatches, B rows and T tokens that it takes; and the sums
    that it goes on from, None if all is done in one pass.
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
  rows = passes.one_minibatch(shape, recipe.batch, mesh)
  handed_on = lambda: passes.sums(programs, (*model, *rows), how)
  most = passes.minibatches(
    full,
    arrays.weight_dtype(config),
    *(shape, recipe.batch, recipe.pass_tokens),
    mesh,
    handed_on,
  )
  nobody = np.zeros(shape, np.int32)
  tokens_MBT, valid_MB = placement.passes(nobody, recipe.batch, mesh, most)[0]
  M, B, T = tokens_MBT.shape
  args = (
    *model,
    jax.ShapeDtypeStruct((M, B, T), jnp.int32, sharding=whole),
    jax.ShapeDtypeStruct((M, B), bool, sharding=whole),
  )
  before = None
  if recipe.samples > M * B:
    before = handed_on()
  with jax.default_matmul_precision(config.prune.precision):
    lowered = programs.whole.lower(*args, before=before, **how)
  return lowered, (M, B, T), before


def stacked_params(
  config: Config, full: ModelConfig, dtype: jnp.dtype, mesh: Mesh
) -> Any:
  """What is scored, as abstract arrays, where the recipe keeps it."""
  stacked = arrays.stacked_params(full, dtype, mesh)
  return arrays.streamed(stacked) if config.prune.stream_layers else stacked


def refitting(config: Config, full: ModelConfig, mesh: Mesh) -> Bytes:
  """Adds up a refit: two models, two residual streams, one least squares.

  Each device has one layer of both models whole, and sums of its own rows.
  """
  from adapt_pruner_jax.pruning import least_squares

  dtype, recipe = arrays.weight_dtype(config), config.calibration
  model_size = arrays.model_bytes(full, dtype, mesh)
  shards = placement.batch_shards(mesh)
  rows = -(-min(recipe.batch, recipe.refit_samples) // shards)
  number = -(-recipe.refit_samples // shards)
  stream = 4 * number * recipe.seq_len * full.hidden_size
  wide = surgery.dense(full)
  mlp = 0 if full.experts else wide.ffn_widths[0]
  channels = max(*wide.head_channels(), mlp, full.hidden_size)
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  matrix = {"down": array(channels, full.hidden_size)}
  solve = least_squares.solve.lower(
    array(channels, channels), matrix, matrix, array()
  )
  one_layer = sum(
    math.prod(axes.shape(name, wide.sizes(0)))
    for name in model_config.layer_names(wide)
  )
  fed = 2 * 4 * rows * recipe.seq_len * channels  # a matrix's input, weighted
  equations = channels**2 + channels * full.hidden_size
  if config.prune.refit_all:  # what gate and up give, and should give
    outputs = max(
      2 * wide.ffn_widths[0],
      3 * max(wide.head_channels()),
    )
    fed = max(fed, 2 * 4 * rows * recipe.seq_len * (full.hidden_size + outputs))
    equations = max(equations, full.hidden_size**2 + full.hidden_size * outputs)
  if full.experts:  # each with equations of its own
    F, E = wide.ffn_widths[0], full.hidden_size
    equations = max(equations, full.experts * (F**2 + F * E))
    sent = rows * recipe.seq_len * full.experts_per_token
    fed = max(fed, 4 * sent * (2 * F + 3 * E))
  return {
    "weights": 2 * model_size,
    # Of both models; a minibatch at a time moves behind a half layer.
    "streams": 2 * stream + 4 * rows * recipe.seq_len * full.hidden_size,
    "layers": 2 * dtype.itemsize * one_layer,
    "least squares": 2 * 4 * equations,  # summed, and of a minibatch
    "temporary": max(arrays.temporary(solve.compile()), fed),
  }


# ---- As many devices as are intended -----------------------------------------


def _elsewhere(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: int,
  size: float,
) -> dict[str, Bytes]:
  """`measure` with stand-ins, in a process that has enough of them."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  count = "--xla_force_host_platform_device_count"
  flags = [f for f in flags if not f.startswith(count)]
  environment = {
    **os.environ,
    "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"]),
    "NPROC": str(max(16, 2 * devices)),
    "JAX_PLATFORMS": "cpu",
  }
  task = {
    "config": dataclasses.asdict(config),
    "full": model_config.to_json(full),
    "student": model_config.to_json(student),
    "devices": devices,
    "size": size,
  }
  done = subprocess.run(
    [sys.executable, "-m", "adapt_pruner_jax.planning.memory"],
    input=json.dumps(task),
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode:
    raise RuntimeError(f"memory analysis failed:\n{done.stderr}")
  answer = json.loads(done.stdout.splitlines()[-1])
  if "error" in answer:
    raise UserError(answer["error"])
  return answer


def _answer(task: dict) -> dict:
  config = from_json(task["config"])
  full, student = (
    model_config.from_json(task[name]) for name in ("full", "student")
  )
  try:
    return measure(config, full, student, task["devices"], task["size"])
  except UserError as error:
    return {"error": str(error)}


if __name__ == "__main__":
  print(json.dumps(_answer(json.load(sys.stdin))))
