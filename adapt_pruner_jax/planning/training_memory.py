"""Device memory of recovery training, compiled or added up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays
from adapt_pruner_jax.planning.arrays import Bytes
from adapt_pruner_jax.training import lora, optimizer, output_loss
from adapt_pruner_jax.training.step import abstract_batch, make_step

FEW_LAYERS = (2, 3)  # layers of the training programs that are compiled


def training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Measures a train step, by compiling it with few layers.

  Args:
    config: the recipe.
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
  settings, c = config.train, student
  itemsize = jnp.dtype(settings.dtype).itemsize
  rows = config.data.batch / settings.accumulation
  tokens = rows * config.data.seq_len / placement.batch_shards(mesh)
  tensor = mesh.shape["tensor"]
  layers = [
    tokens * _token_bytes(config, c, layer, tensor)
    for layer in range(c.num_layers)
  ]
  kept = sum(layers)
  if settings.remat:
    kept = c.num_layers * tokens * c.hidden_size * itemsize + max(layers)
  # Logits of a chunk and their gradient, and the output matrix's.
  logits = rows * config.data.seq_len * c.vocab_size / mesh.size
  vocabulary = min(logits, output_loss.CHUNK) * 4 * 2
  if settings.distill_alpha:
    vocabulary *= 2
  vocabulary += c.vocab_size * c.hidden_size / mesh.size * (4 + itemsize)
  # Two layers are whole on each device when they are used, the gradients of one
  # when they are reduced.
  shapes = model_config.param_shapes(c)
  biggest = max(
    sum(map(math.prod, shapes[axes.layer_name(i)].values()))
    for i in range(c.num_layers)
  )
  gathered = 0
  if mesh.size > 1:
    gathered = 2 * biggest / tensor * itemsize + biggest * 4
  between = held(config, full, student, mesh)
  gradients = arrays.size(train_state(config, full, student, mesh)[0])
  # Half precision has a copy of the weights in it, if they are not.
  whole = arrays.weight_dtype(config).itemsize == 4 and not settings.lora_base
  copy = between["weights"] // 2 if itemsize == 2 and whole else 0
  return between | {
    "gradients": gradients,
    "temporary": round(kept + vocabulary + gathered + copy),
  }


def _token_bytes(
  config: Config, c: ModelConfig, layer: int, tensor: int
) -> float:
  """Bytes a token that the backward pass of a layer needs."""
  groups = c.kv_groups[layer] / tensor
  heads = groups * c.queries_per_group
  # Norms and residuals; q, k, v, rotated q and k, the heads' output; the gate,
  # its activation, up, and their product.
  width = (
    4 * c.hidden_size
    + (3 * heads + 3 * groups) * c.head_dim
    + 4 * c.ffn_widths[layer] / tensor
  )
  scores = 3 * heads * config.data.seq_len * 4  # float32, as written
  return width * jnp.dtype(config.train.dtype).itemsize + scores


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
    if settings.distill_alpha
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
  transform = optimizer.optimizer(settings.weight_decay)
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

  def step(trained, state, base, teacher, batch):
    step_fn = make_step(
      student,
      settings,
      lambda step: 1.0,
      mesh,
      base=base,
      teacher=None if teacher is None else (full, teacher),
    )
    return step_fn(trained, state, batch, 0)

  batch = abstract_batch(config.data.batch, config.data.seq_len, mesh)
  jitted = jax.jit(step, donate_argnums=(0, 1))
  return jitted.lower(trained, state, base, teacher, batch).compile()


def few_layers(config: ModelConfig, layers: int) -> ModelConfig:
  """The model with its first layers only, each as wide as the widest."""
  widest = {u: (max(w),) * layers for u, w in config.units().items()}
  first = [i % config.num_layers for i in range(layers)]
  return config.with_layers(first).with_units(widest)
