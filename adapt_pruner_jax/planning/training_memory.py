"""Device memory of recovery training, compiled or added up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays, compiling
from adapt_pruner_jax.planning.arrays import Bytes
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.training import lora, memory, optimizer, stacking
from adapt_pruner_jax.training.step import (
  abstract_batch,
  abstract_state,
  likeliest,
  make_step,
)

FEW_LAYERS = (2, 3)  # layers of the training programs that are compiled


def training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Measures a train step, by compiling it: whole where layers are scanned,
  else with few of them.

  Args:
    config: the recipe; `train.remat` is not `auto`.
    full: the original model, which may be the teacher.
    student: the largest model that is trained.
    mesh: the devices that it is compiled for.
  """
  found = held(config, full, student, mesh)
  if stacking.choose(student, config.train, mesh, config.train.tokens):
    given = config, full, student, student.num_layers, mesh
    return found | {"temporary": compiled_train(*given)}
  few, more = (
    compiled_train(config, full, student, layers, mesh) for layers in FEW_LAYERS
  )
  slope = max(more - few, 0) / (FEW_LAYERS[1] - FEW_LAYERS[0])
  temporary = few + slope * (student.num_layers - FEW_LAYERS[0])
  return found | {"temporary": round(temporary)}


def estimated_training(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  mesh: Mesh,
  seen: Mesh | None = None,
) -> Bytes:
  """Adds up what a train step keeps; `training` without compiling.

  Args:
    config, full, student, mesh: as `training`'s; the devices may be stand-ins.
    seen: the mesh, of the devices that are meant; default those.
  """
  settings, seen = config.train, seen or mesh
  shape = config.data.batch // settings.accumulation, config.data.seq_len
  temporary = memory.temporary(student, settings, shape, seen)
  between = held(config, full, student, mesh, seen)
  # Alone, a device may keep a copy of the weights, if these are wider.
  whole = arrays.weight_dtype(config).itemsize == 4 and not settings.lora_base
  half = jnp.dtype(settings.dtype).itemsize == 2
  if half and whole and mesh.size == 1:
    temporary += between["weights"] // 2
  gradients = arrays.size(train_state(config, full, student, mesh, seen)[0])
  return between | {"gradients": gradients, "temporary": round(temporary)}


def held(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  mesh: Mesh,
  seen: Mesh | None = None,
) -> Bytes:
  """Adds up what is there between train steps; arguments as of
  `estimated_training`."""
  given = config, full, student, mesh, seen
  trained, base, teacher, state = train_state(*given)
  found = {
    "weights": arrays.size(trained) + arrays.size(base),
    "optimizer": arrays.size(state),
  }
  return found | ({"teacher": arrays.size(teacher)} if teacher else {})


def teacher_dtype(config: Config, full: ModelConfig, seen: Mesh) -> jnp.dtype:
  """Of the dense model that runs beside: stacked, that of the arithmetic; else
  as it is stored, float32 at most."""
  stacked = stacking.choose(full, config.train, seen)
  dtype = config.train.dtype if stacked else config.model.dtype
  return jnp.dtype(dtype or jnp.float32)


def train_state(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  mesh: Mesh,
  seen: Mesh | None = None,
) -> tuple[Any, Any, Any, Any]:
  """Makes abstract (trained, base, teacher's params, optimizer state), each
  layer apart; arguments as of `estimated_training`."""
  settings = config.train
  params = arrays.placed(arrays.float32_params(student), mesh)
  teacher = None
  if settings.has_teacher_beside():
    dtype = teacher_dtype(config, full, seen or mesh)
    teacher = model_config.abstract_params(full, dtype)
    teacher = arrays.placed(teacher, mesh)
  trained, base = params, None
  if settings.lora_rank:
    adapters = lora.abstract_adapters(student, settings.lora_rank, mesh)
    trained = arrays.with_shardings(*adapters)
    base = model_config.abstract_params(student, arrays.weight_dtype(config))
    base = arrays.placed(base, mesh)
    if settings.lora_base == "int8":
      base = lora.in_int8(base, mesh)
  transform = optimizer.of(settings)
  where = optimizer.state_shardings(
    transform, trained, jax.tree.map(lambda x: x.sharding, trained), mesh
  )
  state = arrays.with_shardings(jax.eval_shape(transform.init, trained), where)
  return trained, base, teacher, state


def compiled_train(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  layers: int,
  mesh: Mesh,
) -> int:
  """Compiles a train step of so many layers, all as the widest one.

  Returns:
    Bytes that it needs on a device beside its arguments.
  """
  full, student = (few_layers(c, layers) for c in (full, student))
  settings = config.train
  runs = stacking.choose(student, settings, mesh, settings.tokens)
  trained, base, taught, _ = train_state(config, full, student, mesh)
  if base is not None:
    base = stacking.abstract(runs, base, mesh)
  teacher = None
  if taught is not None:
    teacher = stacking.abstract_teacher((full, taught), settings, mesh)
  rank = settings.lora_rank
  trained, state = abstract_state(student, settings, mesh, rank, runs)
  given = student, settings, lambda step: 1.0, mesh
  step = make_step(*given, base=base, teacher=teacher, runs=runs)
  shape = config.data.batch, config.data.seq_len
  batch = abstract_batch(*shape, mesh, likeliest(settings, student))
  arguments = trained, state, base, teacher and teacher[1], batch
  lowered = step.lower(trained, state, batch)
  return compiling.temporary(lowered, arguments, mesh)


def few_layers(config: ModelConfig, layers: int) -> ModelConfig:
  """The model with its first layers only, each as wide as the widest."""
  first = [i % config.num_layers for i in range(layers)]
  return surgery.dense(config).with_layers(first)
