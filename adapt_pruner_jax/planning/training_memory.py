"""Device memory of recovery training, compiled or added up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays
from adapt_pruner_jax.planning.arrays import Bytes
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.training import lora, memory, optimizer
from adapt_pruner_jax.training.step import (
  abstract_batch,
  likeliest,
  make_step,
)

FEW_LAYERS = (2, 3)  # layers of the training programs that are compiled


def training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Measures a train step, by compiling it with few layers.

  Args:
    config: the recipe; `train.remat` is not `auto`.
    full: the original model, which may be the teacher.
    student: the largest model that is trained.
    mesh: the devices that it is compiled for.
  """
  few, more = (
    arrays.temporary(compile_train(config, full, student, layers, mesh))
    for layers in FEW_LAYERS
  )
  slope = max(more - few, 0) / (FEW_LAYERS[1] - FEW_LAYERS[0])
  temporary = few + slope * (student.num_layers - FEW_LAYERS[0])
  found = held(config, full, student, mesh)
  return found | {"temporary": round(temporary)}


def estimated_training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Adds up what a train step keeps; `training` without compiling."""
  settings = config.train
  shape = config.data.batch // settings.accumulation, config.data.seq_len
  temporary = (
    memory.kept(student, settings, shape, mesh)
    + memory.vocabulary(student, settings, shape, mesh)
    + memory.gathered(student, settings, mesh)
  )
  between = held(config, full, student, mesh)
  # A copy of the weights is in it, if these are wider.
  whole = arrays.weight_dtype(config).itemsize == 4 and not settings.lora_base
  if jnp.dtype(settings.dtype).itemsize == 2 and whole:
    temporary += between["weights"] // 2
  gradients = arrays.size(train_state(config, full, student, mesh)[0])
  return between | {"gradients": gradients, "temporary": round(temporary)}


def held(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Adds up what is there between train steps."""
  trained, base, teacher, state = train_state(config, full, student, mesh)
  found = {
    "weights": arrays.size(trained) + arrays.size(base),
    "optimizer": arrays.size(state),
  }
  return found | ({"teacher": arrays.size(teacher)} if teacher else {})


def train_state(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> tuple[Any, Any, Any, Any]:
  """Makes abstract (trained, base, teacher's params, optimizer state)."""
  settings = config.train
  params = arrays.placed(arrays.float32_params(student), mesh)
  teacher = (
    arrays.placed(arrays.float32_params(full), mesh)
    if settings.has_teacher_beside()
    else None
  )
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


def compile_train(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  layers: int,
  mesh: Mesh,
) -> Any:
  """Compiles a train step of so many layers, all as the widest one."""
  full, student = (few_layers(c, layers) for c in (full, student))
  settings = config.train
  trained, base, teacher, state = train_state(config, full, student, mesh)

  make = make_step(
    student,
    settings,
    lambda step: 1.0,
    mesh,
    base=base,
    teacher=None if teacher is None else (full, teacher),
  )
  shape = config.data.batch, config.data.seq_len
  batch = abstract_batch(*shape, mesh, likeliest(settings, student))
  return make.lower(trained, state, batch).compile()


def few_layers(config: ModelConfig, layers: int) -> ModelConfig:
  """The model with its first layers only, each as wide as the widest."""
  first = [i % config.num_layers for i in range(layers)]
  return surgery.dense(config).with_layers(first)
