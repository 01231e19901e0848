"""What a train step needs of a device's memory, added up.

`train.remat=auto` chooses by it, and a plan says it where nothing is compiled.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.models import (
  axes,
  delta_net,
  devices,
  kernels,
  model_config,
  remat,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.second_kinds import DeltaNet
from adapt_pruner_jax.training import output_loss

# Of a device, what a step may have. Others use the memory of a CPU, too.
SHARE, CPU_SHARE = 0.9, 0.5


def with_remat(
  settings: Train,
  config: ModelConfig,
  teacher: ModelConfig | None,
  shape: tuple[int, int],
  mesh: Mesh,
  memory: float = 0.0,
) -> Train:
  """The settings with `auto` replaced: recompute no more than memory wants.

  Args:
    settings: of the training.
    config: of what is trained.
    teacher: of the model to distil from; None = none.
    shape: rows of a microbatch, over all devices, and tokens of a row.
    mesh: the devices, or as many stand-ins, as `devices.MeantMesh`.
    memory: bytes of a device; 0 = what those of the mesh have.
  """
  if settings.remat != "auto":
    return settings
  device = mesh.devices.flat[0]
  shared = device.platform == "cpu"
  if memory:  # of what is meant
    shared = shared and memory == devices.memory_of(device)
  else:
    memory = devices.memory_of(device)
  usable = (CPU_SHARE if shared else SHARE) * memory
  usable -= state(config, settings, teacher, mesh)
  usable -= vocabulary(config, settings, shape, mesh)
  usable -= gathered(config, settings, mesh)
  for name in remat.ON_DEVICE:
    made = dataclasses.replace(settings, remat=name)
    if kept(config, made, shape, mesh) <= usable:
      return made
  return made  # with what needs least


def state(
  config: ModelConfig, settings: Train, teacher: ModelConfig | None, mesh: Mesh
) -> float:
  """Bytes of weights, gradients, moments and a teacher on a device, about."""
  size = jnp.dtype(settings.dtype).itemsize
  cut = mesh.shape["fsdp"] * mesh.shape["tensor"]
  # Trained weights are float32, as their gradient is, and the sum of those of
  # several microbatches; there are two moments.
  moments = 2 * jnp.dtype(settings.moments).itemsize
  gradients = 8 if settings.accumulation > 1 else 4
  trained = 4 + gradients + moments + (size if size < 4 else 0)
  if settings.lora_rank:
    trained = 1 if settings.lora_base else size
  taught = _own(teacher, mesh) * size if teacher else 0
  return (_own(config, mesh) * trained + taught) / cut


def _own(config: ModelConfig, mesh: Mesh) -> float:
  """Parameters but for those of experts that are other devices'."""
  each = 3 * config.experts * config.hidden_size * sum(config.ffn_widths)
  others = each * (1 - 1 / mesh.shape["expert"])
  return model_config.count_params(config) - others


def temporary(
  config: ModelConfig, settings: Train, shape: tuple[int, int], mesh: Mesh
) -> float:
  """Bytes on a device that a step takes beside what is there, and gradients.

  It is fullest on its way back through a layer, what that computes once more
  being there too, or at the output matrix.

  Args:
    config: of the model.
    settings: of the training; `remat` is not `auto`.
    shape, mesh: as of `with_remat`.
  """
  stays, again = _layers(config, settings, shape, mesh)
  back = again + gathered(config, settings, mesh)
  return stays + max(back, vocabulary(config, settings, shape, mesh))


def kept(
  config: ModelConfig, settings: Train, shape: tuple[int, int], mesh: Mesh
) -> float:
  """Bytes on a device that the backward pass of the layers needs; arguments as
  of `temporary`."""
  return sum(_layers(config, settings, shape, mesh))


def _layers(
  config: ModelConfig, settings: Train, shape: tuple[int, int], mesh: Mesh
) -> tuple[float, float]:
  """Bytes that all layers keep, and that the largest makes once more."""
  rows, length = shape
  tokens = rows * length / placement.batch_shards(mesh)
  size = jnp.dtype(settings.dtype).itemsize
  case = kernels.case_of_run(config, mesh, *shape, settings.dtype, True)
  plain = kernels.choose(settings.attention, case)[0] == "plain"
  D, width = config.hidden_size, config.stream_width()
  tensor = mesh.shape["tensor"]
  each, again = [], []  # of each layer: what is kept, what is made once more
  for i in range(config.num_layers):
    K, F = config.kv_groups[i] / tensor, config.ffn_widths[i] / tensor
    G, H = config.group(i)
    # Where experts are cut, with room for the rows of all of their devices.
    F *= max(config.experts_per_token, 1) * mesh.shape["expert"]
    # A norm, q, k, v, q and k rotated, what the heads say; plain attention has
    # its scores, float32, three times. A norm, gate, activation, up, product.
    scores = 3 * K * G * length * 4 / size if plain else 0
    mixed, read = (3 * G + 3) * K * H + scores, (G + 2) * K * H
    if config.is_delta(i):
      mixed, read = _delta(config.delta_net, K, size), 0
    norm, act = 2 * D, 4 * F
    if size < 4:  # a scan keeps a norm's float32 in both its forms, and act's
      norm, act = norm + 2 * D * 4 // size, act + F
    halves = norm + mixed, norm + act
    products, streams = 2 * D + read + 2 * F, 2 * width
    kept_here, made_again = {
      "none": (sum(halves), 0),
      "dots": (products - 2 * D + streams, sum(halves) - products),
      "attention+mlp": (streams, max(halves)),
      "full": (width, sum(halves)),
      "offload": (0, width + sum(halves)),
    }[settings.remat]
    each.append(kept_here)
    again.append(made_again)
  return tokens * size * sum(each), tokens * size * max(again, default=0)


def _delta(net: DeltaNet, groups: float, size: int) -> float:
  """Numbers a token, of `size` bytes, that a gated delta net needs."""
  values = net.values_per_key * net.value_dim
  # q, k and v before, within and behind the convolutions; what is said, its
  # norm and its gate.
  width = groups * (6 * net.key_dim + 6 * values)
  # In float32: within a chunk each token with each, and its share of a memory.
  heads, memory = groups * net.values_per_key, net.key_dim * net.value_dim
  rule = heads * (3 * delta_net.CHUNK + memory / delta_net.CHUNK)
  return width + rule * 4 / size


def vocabulary(
  config: ModelConfig, settings: Train, shape: tuple[int, int], mesh: Mesh
) -> float:
  """Bytes on a device of a chunk's logits, and of the output matrix."""
  numbers = math.prod(shape) * config.vocab_size / mesh.size
  logits = min(numbers, output_loss.chunk_size(mesh)) * 4 * 2
  if settings.distill_alpha:
    logits *= 2
  matrix = config.vocab_size * config.hidden_size / mesh.size
  return logits + matrix * (4 + jnp.dtype(settings.dtype).itemsize)


def gathered(config: ModelConfig, settings: Train, mesh: Mesh) -> float:
  """Bytes of what is whole on a device for a while.

  Two layers are when they are used, the gradients of one when they are reduced.
  """
  if mesh.size == 1:
    return 0.0
  shapes = model_config.param_shapes(config)
  biggest = max(
    sum(map(math.prod, shapes[axes.layer_name(i)].values()))
    for i in range(config.num_layers)
  )
  size = jnp.dtype(settings.dtype).itemsize
  summed = jnp.dtype(settings.gradient_dtype).itemsize if size == 2 else 4
  return biggest / mesh.shape["tensor"] * (2 * size + summed)
