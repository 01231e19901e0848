"""The train step: of all weights, of adapters, with or without a teacher.

Weights and Adam's moments are float32; the arithmetic may be bfloat16. What is
trained is a pytree: the params themselves or, with LoRA, the adapters beside
frozen params. A batch is a dict of arrays [B, T] as `data` makes them:
`tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import layer, layer_runs, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, output_name
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import optimizer, output_loss, stacking
from adapt_pruner_jax.training.lora import abstract_adapters, beside

Batch = Mapping[str, Any]
Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """A train step: called with what is trained, its state, a batch, a step.

  Attributes:
    config: of the model.
    runs: how the layers of what is trained, and of `base`, are stacked.
    program: the compiled step, or what compiles it when it is first called.
    base: the frozen params under LoRA.
    taught: the teacher's params.
    schedule: the learning rate of each global step.
    accumulation, mesh: microbatches a step, and the devices.
  """

  config: ModelConfig
  runs: stacking.Runs
  program: Callable
  base: Params | None
  taught: Params | None
  schedule: optimizer.Schedule
  accumulation: int
  mesh: Mesh

  def __call__(
    self, trained: Any, opt_state: Any, batch: Batch, step: int
  ) -> tuple[Any, Any, Metrics]:
    """The next `trained` and `opt_state`, and metrics; both are donated."""
    check_rows(len(batch["tokens_BT"]), self.accumulation, self.mesh)
    rate = np.float32(self.schedule(step))
    return self.program(*self._arguments(trained, opt_state, batch), rate)

  def lower(self, trained: Any, opt_state: Any, batch: Batch) -> Lowered:
    """The program of such arguments, to compile; shapes will do."""
    rate = np.float32(0)
    return self.program.lower(*self._arguments(trained, opt_state, batch), rate)

  def _arguments(self, trained, opt_state, batch):
    return trained, opt_state, self.base, self.taught, batch


def make_step(
  config: ModelConfig,
  settings: Train,
  schedule: optimizer.Schedule,
  mesh: Mesh,
  base: Params | None = None,
  teacher: tuple[ModelConfig, Params] | None = None,
  runs: stacking.Runs = (),
) -> Step:
  """The train step of one model shape, compiled at its first call.

  A step whose loss or gradient is not finite changes nothing but its metrics
  (`loss`, `grad_norm`, `tokens`, `learning_rate`, and with a teacher
  `next_token`, the loss without distillation). The trees passed in are donated.

  Args:
    config, settings: the model, and how it is trained.
    base: the frozen params under LoRA; the step then trains adapters.
    teacher: the pair to distil from, needed if `settings.distill_alpha` > 0.
    runs: how the layers of what is trained, and of `base`, are stacked.
  """
  alpha = settings.distill_alpha
  assert not alpha or teacher is not None, "distillation without a teacher"
  transform = optimizer.optimizer(settings.weight_decay)
  mean_loss = make_loss(config, settings, mesh, teacher[0] if alpha else None)

  def step_fn(trained, opt_state, base, teacher_params, batch, rate):
    # Dividing each microbatch by the weight of the whole batch makes the sum
    # of microbatches exactly the mean over the batch.
    count = jnp.maximum(batch["weights_BT"].sum(), 1)

    def gradient(batch):
      fn = jax.value_and_grad(mean_loss, has_aux=True)
      return fn(trained, base, teacher_params, batch, count)

    number = settings.accumulation
    (value, nll), grads = _summed(gradient, trained, batch, number, mesh)
    norm = optax.tree.norm(grads)
    keep = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, new_state = transform.update(grads, opt_state, trained)
    new = jax.tree.map(lambda p, u: p - rate * u, trained, updates), new_state
    new = jax.tree.map(partial(jnp.where, keep), new, (trained, opt_state))
    metrics = {"loss": value, "grad_norm": norm, "learning_rate": rate}
    metrics |= {"tokens": batch["weights_BT"].sum()}
    metrics |= {"next_token": nll} if alpha else {}
    return *new, metrics

  rank = 0 if base is None else settings.lora_rank
  abstract = abstract_state(config, settings, mesh, rank, runs)
  out = jax.tree.map(lambda x: x.sharding, abstract)
  out = (*out, sharding.replicated(mesh))
  compiled = jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
  taught, number = teacher[1] if alpha else None, settings.accumulation
  return Step(config, runs, compiled, base, taught, schedule, number, mesh)


def abstract_state(
  config: ModelConfig,
  settings: Train,
  mesh: Mesh,
  rank: int,
  runs: stacking.Runs = (),
) -> tuple[Any, Any]:
  """What a step trains, and Adam's state, as shapes with shardings.

  Args:
    config, settings, mesh, runs: as `make_step`'s.
    rank: of the adapters that are trained; 0 = the params themselves.
  """
  if rank:
    shapes, placed = abstract_adapters(config, rank, mesh)
  else:
    shapes = model_config.abstract_params(config, jnp.float32)
    placed = sharding.param_shardings(shapes, mesh)
  trained = stacking.abstract(runs, _with_shardings(shapes, placed), mesh)
  placed = jax.tree.map(lambda x: x.sharding, trained)
  transform = optimizer.optimizer(settings.weight_decay)
  state = jax.eval_shape(transform.init, trained)
  where = optimizer.state_shardings(transform, trained, placed, mesh)
  return trained, _with_shardings(state, where)


def batch_of(rows_BT: np.ndarray, real: int | None = None) -> Batch:
  """Windows as a train step takes them; each predicts its tokens but the first.

  Args:
    rows_BT: token ids.
    real: how many rows count, from the first; None = all.
  """
  B, T = rows_BT.shape
  weights_BT = np.ones((B, T), np.float32)
  weights_BT[:, -1] = 0
  weights_BT[B if real is None else real :] = 0
  return {
    "tokens_BT": rows_BT,
    "targets_BT": np.roll(rows_BT, -1, axis=1),
    "segments_BT": np.ones((B, T), np.int32),
    "positions_BT": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "weights_BT": weights_BT,
  }


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
  """A batch as shapes with shardings."""
  dtypes = dict.fromkeys(
    ("tokens", "targets", "segments", "positions"), "int32"
  )
  where = placement.batch_sharding(mesh)
  return {
    f"{name}_BT": jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
    for name, dtype in (dtypes | {"weights": "float32"}).items()
  }


def _with_shardings(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def _summed(
  gradient: Callable, trained: Any, batch: Batch, number: int, mesh: Mesh
) -> tuple:
  """What `gradient` gives of a batch, summed over so many microbatches."""
  if number == 1:
    return gradient(batch)
  split = microbatches(batch, number, mesh)
  zeros = (jnp.zeros(()),) * 2, jax.tree.map(jnp.zeros_like, trained)
  add = lambda total, b: (jax.tree.map(jnp.add, total, gradient(b)), None)
  return jax.lax.scan(add, zeros, split)[0]


def make_loss(
  config: ModelConfig,
  settings: Train,
  mesh: Mesh,
  teacher: ModelConfig | None,
) -> Callable:
  """The loss of a batch, with distillation and without.

  A function of what is trained, base, the teacher's params, the batch, and the
  weight that the sums are divided by.

  Args:
    teacher: of the model to distil from; None = no distillation.
  """
  alpha = settings.distill_alpha
  objective = output_loss.Objective(config, mesh, teacher, alpha)

  def mean_loss(trained, base, teacher_params, batch, count):
    x_BTD, matrix = _ends(config, settings, trained, base, batch, mesh)
    taught = None
    if teacher is not None:
      frozen = dataclasses.replace(settings, remat=False)
      taught = _ends(teacher, frozen, teacher_params, None, batch, mesh)
    tokens = batch["targets_BT"], batch["weights_BT"]
    sums = output_loss.loss(objective, matrix, x_BTD, *tokens, taught)
    return sums[0] / count, sums[1] / count

  return mean_loss


def init_optimizer(trained: Any, settings: Train, mesh: Mesh) -> Any:
  """Fresh optimizer state for params, or for adapters, placed like them."""
  transform = optimizer.optimizer(settings.weight_decay)
  placed = jax.tree.map(lambda x: x.sharding, trained)
  return optimizer.init(transform, trained, placed, mesh)


def cast(params: Params, dtype: jnp.dtype) -> Params:
  """Params in the dtype of the arithmetic, but for what is in eight bits."""
  return jax.tree.map(
    lambda p: p if p.dtype == jnp.int8 else p.astype(dtype), params
  )


def microbatches(batch: Batch, number: int, mesh: Mesh) -> Batch:
  """[B, T] -> [number, B / number, T], each microbatch on all devices."""
  spec = PartitionSpec(None, sharding.BATCH)

  def split(x):
    # Every number-th row, so that no row leaves its device.
    x = x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, batch)


def _ends(
  config: ModelConfig,
  settings: Train,
  trained: Any,
  base: Params | None,
  batch: Batch,
  mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
  """The stream behind the final norm, [B, T, D], and the output matrix.

  Args:
    trained: params, or the adapters of `base`; their layers may be stacked.
  """
  dtype, alpha = jnp.dtype(settings.dtype), settings.lora_alpha
  kernel = Kernel(settings.attention, mesh)
  if not layer_runs.bounds(trained):
    params = trained
    if base is not None:
      layers = {n: beside(base[n], f, alpha) for n, f in trained.items()}
      params = base | layers
    decoder = Decoder(config, settings.remat, kernel)
    x_BTD = hidden(decoder, params, batch, mesh, dtype)
    return x_BTD, params[output_name(config)]

  def weights_of(part: Any) -> Params:
    return cast(part if base is None else beside(*part, alpha), dtype)

  params, stacked = trained, trained
  if base is not None:
    params = base
    stacked = {name: (base[name], trained[name]) for name in trained}
  inputs = layer.attention_inputs(
    config, batch["positions_BT"], batch["segments_BT"], kernel
  )
  x_BTD = embed(config, params["embedding"], batch["tokens_BT"], mesh, dtype)
  x_BTD = layer_runs.scan_layers(
    config, stacked, weights_of, inputs, x_BTD, settings.remat
  )
  names = model_config.outer_names(config)
  outer = {"params": cast({name: params[name] for name in names}, dtype)}
  behind = Decoder(config.with_layers(()))
  x_BTD = behind.apply(outer, x_BTD, method="normed")
  return x_BTD, params[output_name(config)]


def hidden(
  decoder: Decoder,
  params: Params,
  batch: Batch,
  mesh: Mesh,
  dtype: jnp.dtype,
) -> jax.Array:
  """The stream behind the final norm, [B, T, D], computed in `dtype`."""
  x_BTD = embed(
    decoder.config, params["embedding"], batch["tokens_BT"], mesh, dtype
  )
  return decoder.apply(
    {"params": cast(params, dtype)},
    x_BTD,
    batch["segments_BT"],
    batch["positions_BT"],
    method="hidden",
  )


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
  """Raises a UserError if the rows of a batch cannot be dealt out evenly."""
  devices = placement.batch_shards(mesh)
  if rows % (devices * accumulation):
    raise UserError(
      f"a batch of {rows} rows does not divide over {devices} device(s) x "
      f"{accumulation} microbatch(es): make --config.data.batch a multiple of "
      f"{devices * accumulation}"
    )
