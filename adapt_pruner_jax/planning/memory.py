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
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.training import lora, optimizer
from adapt_pruner_jax.training.step import check_rows, make_step

FEW_LAYERS = (2, 3)  # layers of the training programs that are compiled
BATCH_FIELDS = {
  "tokens_BT": jnp.int32,
  "targets_BT": jnp.int32,
  "segments_BT": jnp.int32,
  "positions_BT": jnp.int32,
  "weights_BT": jnp.float32,
}
Bytes = dict[str, int]  # by what they hold, on the fullest device


def measure(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: Sequence[jax.Device] | int,
) -> dict[str, Bytes]:
  """{"scoring": bytes, "refit": ..., "training": ...} on the fullest device.

  Refit and training are left out where there are none, scoring where the method
  is neither Adapt-Pruner nor curvature.

  Args:
    full: the original model.
    student: the largest model that is trained.
    devices: those that the programs are compiled for, or how many stand-ins.

  Raises:
    UserError: a mesh or a batch that does not fit the number of devices.
  """
  if not isinstance(devices, int):
    return _measure(config, full, student, devices, real=True)
  if jax.default_backend() == "cpu" and jax.device_count() >= devices:
    here = jax.devices()[:devices]
    return _measure(config, full, student, here, real=False)
  return _elsewhere(config, full, student, devices)


def _measure(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: Sequence[jax.Device],
  real: bool,
) -> dict[str, Bytes]:
  shape = dataclasses.asdict(config.mesh)
  mesh = sharding.make_mesh(**shape, devices=devices)
  if config.train.tokens:
    check_rows(config.data.batch, config.train.accumulation, mesh)
  found = {}
  if config.prune.method in ("adapt", "curvature"):
    found["scoring"] = scoring(config, full, mesh, real)
  if config.prune.refit != "none":
    found["refit"] = refitting(config, full, mesh)
  if config.train.tokens:
    rule = training if real else estimated_training
    found["training"] = rule(config, full, student, mesh)
  return found


def scoring(
  config: Config, full: ModelConfig, mesh: Mesh, real: bool = True
) -> Bytes:
  """Of a pruning step: the model as it is, its stacked copy, and the rest."""
  from adapt_pruner_jax.pruning import curvature
  from adapt_pruner_jax.pruning.scores import measure_step

  dtype = weight_dtype(config)
  recipe = config.calibration
  batch = min(recipe.batch, recipe.samples)
  shards = placement.batch_shards(mesh)
  M, B = -(-recipe.samples // batch), -(-batch // shards) * shards
  T = recipe.seq_len
  whole = sharding.replicated(mesh)
  masks = {
    unit: jax.ShapeDtypeStruct(
      (full.num_layers, max(width)), bool, sharding=whole
    )
    for unit, width in full.units().items()
  }
  program, how = curvature.measure_step, {}
  if config.prune.method == "adapt":
    program = measure_step
    how["kind"] = config.prune.group_importance
    how["measure"] = config.prune.layer_importance
  lowered = program.lower(
    surgery.dense(full),
    _stacked(full, dtype if real else jnp.dtype("float32"), mesh),
    masks,
    jax.ShapeDtypeStruct((M, B, T), jnp.int32, sharding=whole),
    jax.ShapeDtypeStruct((M, B), bool, sharding=whole),
    mesh=mesh,
    **how,
  )
  temporary = _temporary(lowered.compile())
  if not real and dtype.itemsize == 2:
    # The residual stream in front of each half layer is what is stored.
    temporary -= (
      2 * full.num_layers * M * (B // shards) * T * full.hidden_size * 2
    )
  found = {
    "weights": size(_placed(model_config.abstract_params(full, dtype), mesh)),
    "stacked copy": size(_stacked(full, dtype, mesh)),
  }
  if config.train.carry_moments and config.prune.stages > 1:
    found["optimizer"] = 2 * size(_placed(_float32(full), mesh))
  # While the copy is made there is one more, when the rest is not there yet.
  return found | {"temporary": max(temporary, found["stacked copy"])}


def refitting(config: Config, full: ModelConfig, mesh: Mesh) -> Bytes:
  """Of a refit: two models, two residual streams, one least-squares problem."""
  from adapt_pruner_jax.pruning import refit

  dtype, recipe = weight_dtype(config), config.calibration
  model_size = size(_placed(model_config.abstract_params(full, dtype), mesh))
  shards = placement.batch_shards(mesh)
  rows = -(-min(recipe.batch, recipe.refit_samples) // shards)
  number = -(-recipe.refit_samples // shards)
  stream = 4 * number * recipe.seq_len * full.hidden_size
  wide = surgery.dense(full)
  channels = max(
    wide.kv_groups[0] * full.queries_per_group * full.head_dim,
    wide.ffn_widths[0],
    full.hidden_size,
  )
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  matrix = {"down": array(channels, full.hidden_size)}
  solve = refit.solve.lower(array(channels, channels), matrix, matrix, array())
  fed = 2 * 4 * rows * recipe.seq_len * channels  # a matrix's input, weighted
  equations = channels**2 + channels * full.hidden_size
  if config.prune.refit_all:  # what gate and up give, and should give
    outputs = max(
      2 * wide.ffn_widths[0],
      wide.kv_groups[0] * (full.queries_per_group + 2) * full.head_dim,
    )
    fed = max(fed, 2 * 4 * rows * recipe.seq_len * (full.hidden_size + outputs))
    equations = max(equations, full.hidden_size**2 + full.hidden_size * outputs)
  return {
    "weights": 2 * model_size,
    # In front of a half layer and behind it, of both models.
    "streams": 4 * stream,
    "least squares": 4 * equations,
    "temporary": max(_temporary(solve.compile()), fed),
  }


def training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """Of a train step: weights, moments, teacher, and the rest."""
  few, more = (
    _temporary(_compile_train(config, full, student, layers, mesh))
    for layers in FEW_LAYERS
  )
  slope = max(more - few, 0) / (FEW_LAYERS[1] - FEW_LAYERS[0])
  temporary = few + slope * (student.num_layers - FEW_LAYERS[0])
  found = _held(config, full, student, mesh)
  return found | {"temporary": round(temporary)}


def estimated_training(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """`training` without compiling: what a step keeps, added up."""
  settings, c = config.train, student
  itemsize = jnp.dtype(settings.dtype).itemsize
  rows = config.data.batch / settings.accumulation
  T = config.data.seq_len
  shards = placement.batch_shards(mesh)
  tokens, tensor = rows * T / shards, mesh.shape["tensor"]

  def activations(layer: int) -> float:
    """Bytes that the backward pass of a layer needs."""
    heads, groups = (
      c.kv_groups[layer] * c.queries_per_group / tensor,
      c.kv_groups[layer] / tensor,
    )
    # Norms and residuals; q, k, v, rotated q and k, the heads' output; the
    # gate, its activation, up, and their product.
    width = (
      4 * c.hidden_size
      + (3 * heads + 3 * groups) * c.head_dim
      + 4 * c.ffn_widths[layer] / tensor
    )
    scores = 3 * heads * T * 4  # float32, as written; flash needs none
    return tokens * (width * itemsize + scores)

  layers = [activations(i) for i in range(c.num_layers)]
  kept = sum(layers)
  if settings.remat:
    kept = c.num_layers * tokens * c.hidden_size * itemsize + max(layers)
  vocabulary = (
    tokens * c.vocab_size / tensor * 4 * 2
  )  # logits and their gradient
  if settings.distill_alpha:
    vocabulary *= 2
  # Two layers and the vocabulary's matrices are whole on each device when they
  # are used, the gradients of one layer when they are reduced.
  shapes = model_config.param_shapes(c)
  biggest = max(
    sum(map(math.prod, shapes[axes.layer_name(i)].values()))
    for i in range(c.num_layers)
  )
  matrices = c.vocab_size * c.hidden_size * (1 if c.tied else 2)
  gathered = 0
  if mesh.size > 1:
    gathered = (2 * biggest / tensor + matrices) * itemsize + biggest * 4
  held = _held(config, full, student, mesh)
  gradients = size(_train_state(settings, full, student, mesh)[0])
  # Half precision has a copy of the weights in it.
  copy = held["weights"] // 2 if itemsize == 2 else 0
  return held | {
    "gradients": gradients,
    "temporary": round(kept + vocabulary + gathered + copy),
  }


def _held(
  config: Config, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> Bytes:
  """What is there between train steps."""
  trained, base, teacher, state = _train_state(
    config.train, full, student, mesh
  )
  held = {"weights": size(trained) + size(base), "optimizer": size(state)}
  return held | ({"teacher": size(teacher)} if teacher else {})


def weight_dtype(config: Config) -> jnp.dtype:
  """Of the weights of a run: float32 where they are trained."""
  return jnp.dtype("float32" if config.train.tokens else config.model.dtype)


def size(tree: Any) -> int:
  """Bytes on one device of abstract arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


# ---- Abstract arrays ---------------------------------------------------------


def _stacked(full: ModelConfig, dtype: jnp.dtype, mesh: Mesh) -> Any:
  """What `surgery.expand` makes."""
  wide = surgery.dense(full)
  sizes = wide.sizes(0)
  layers = {}
  for name in model_config.layer_names(wide):
    shape = (full.num_layers, *axes.shape(name, sizes))
    where = sharding.param_sharding(name, shape, mesh, stacked=True)
    layers[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  params = model_config.abstract_params(wide, dtype)
  outer = {name: params[name] for name in model_config.outer_names(wide)}
  return _placed(outer, mesh) | {"layers": layers}


def _placed(tree: Any, mesh: Mesh) -> Any:
  return _with(tree, sharding.param_shardings(tree, mesh))


def _with(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def _float32(config: ModelConfig) -> Any:
  return model_config.abstract_params(config, jnp.float32)


def _train_state(
  settings, full: ModelConfig, student: ModelConfig, mesh: Mesh
) -> tuple[Any, Any, Any, Any]:
  """Abstract (trained, base, teacher's params, optimizer state)."""
  params = _placed(_float32(student), mesh)
  teacher = _placed(_float32(full), mesh) if settings.distill_alpha else None
  trained, base = params, None
  if settings.lora_rank:
    adapters = lora.abstract_adapters(student, settings.lora_rank, mesh)
    trained, base = _with(*adapters), params
  transform = optimizer.optimizer(settings.weight_decay)
  where = optimizer.state_shardings(
    transform, trained, jax.tree.map(lambda x: x.sharding, trained), mesh
  )
  state = _with(jax.eval_shape(transform.init, trained), where)
  return trained, base, teacher, state


def _compile_train(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  layers: int,
  mesh: Mesh,
) -> Any:
  """A train step of a model with so many layers, all as the widest one."""
  full, student = (few_layers(c, layers) for c in (full, student))
  settings = config.train
  trained, base, teacher, state = _train_state(settings, full, student, mesh)

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

  batch = _batch(config, mesh)
  jitted = jax.jit(step, donate_argnums=(0, 1))
  return jitted.lower(trained, state, base, teacher, batch).compile()


def _batch(config: Config, mesh: Mesh) -> Any:
  shape = (config.data.batch, config.data.seq_len)
  rows = placement.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for name, dtype in BATCH_FIELDS.items()
  }


def few_layers(config: ModelConfig, layers: int) -> ModelConfig:
  """The model with its first layers only, each as wide as the widest."""
  return dataclasses.replace(
    config,
    kv_groups=(max(config.kv_groups),) * layers,
    ffn_widths=(max(config.ffn_widths),) * layers,
    window=config.window[:layers],
    residual=config.residual[:layers],
  )


def _temporary(compiled: Any) -> int:
  """Bytes that a program needs beyond its arguments."""
  found = compiled.memory_analysis()
  made = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.temp_size_in_bytes + max(made, 0)


# ---- As many devices as are intended -----------------------------------------


def _elsewhere(
  config: Config, full: ModelConfig, student: ModelConfig, devices: int
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
  config = Config()
  for section, fields in task["config"].items():
    if isinstance(fields, dict):
      kind = type(getattr(config, section))
      fields = kind(**fields)
    setattr(config, section, fields)
  full, student = (
    model_config.from_json(task[name]) for name in ("full", "student")
  )
  try:
    return measure(config, full, student, task["devices"])
  except UserError as error:
    return {"error": str(error)}


if __name__ == "__main__":
  print(json.dumps(_answer(json.load(sys.stdin))))
