"""The train step: of all weights, of adapters, with or without a teacher.

Weights are float32; the arithmetic and Adam's moments may be bfloat16. What is
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
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import experts, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import (
  forward,
  memory,
  optimizer,
  output_loss,
  stacking,
)
from adapt_pruner_jax.training.lora import abstract_adapters
from adapt_pruner_jax.training.losses import Likeliest

Batch = Mapping[str, Any]
# Of a batch [B, T, C], where a cache has the teacher's likeliest tokens.
TAUGHT = "taught_ids_BTC", "taught_log_probs_BTC"
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
    teacher: the pair to distil from, needed if `settings.distill_alpha` > 0 and
      batches do not have `TAUGHT` of a cache.
    runs: how the layers of what is trained, and of `base`, are stacked.
  """
  alpha = settings.distill_alpha
  has_teacher = teacher is not None or settings.teacher_cache
  assert not alpha or has_teacher, "distillation without a teacher"
  transform = optimizer.of(settings)
  beside = settings.has_teacher_beside()
  taught_by = teacher[0] if beside else None
  mean_loss = make_loss(config, settings, mesh, taught_by)
  rank = 0 if base is None else settings.lora_rank
  abstract = abstract_state(config, settings, mesh, rank, runs)
  placed = jax.tree.map(lambda x: x.sharding, abstract)

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

  compiled = jax.jit(
    step_fn,
    donate_argnums=(0, 1),
    out_shardings=(*placed, sharding.replicated(mesh)),
    compiler_options=sharding.compiler_options(mesh),
  )
  params, number = teacher[1] if beside else None, settings.accumulation
  return Step(config, runs, compiled, base, params, schedule, number, mesh)


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
  transform = optimizer.of(settings)
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


def likeliest(settings: Train, config: ModelConfig) -> int:
  """How many tokens of a teacher a batch has at each position; 0 = none."""
  cached = settings.teacher_cache if settings.distill_alpha else 0
  return min(cached, config.vocab_size)


def abstract_batch(
  rows: int, length: int, mesh: Mesh, likeliest: int = 0
) -> Batch:
  """A batch as shapes with shardings.

  Args:
    rows, length: B and T.
    mesh: the devices.
    likeliest: C, the tokens of a teacher that a cache has at each position.
  """
  dtypes = dict.fromkeys(
    ("tokens", "targets", "segments", "positions"), "int32"
  )
  where = placement.batch_sharding(mesh)
  batch = {
    f"{name}_BT": jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
    for name, dtype in (dtypes | {"weights": "float32"}).items()
  }
  shape = rows, length, likeliest
  pairs = zip(TAUGHT, ("int32", "float16"), strict=True) if likeliest else ()
  return batch | {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for name, dtype in pairs
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

  The former has the balance of experts in it too, if the model asks for that.
  A function of what is trained, base, the teacher's params, the batch, and the
  weight that the sums are divided by.

  Args:
    teacher: of the model to distil from; None = no distillation, or batches
      have what a cache keeps of it.
  """
  objective = output_loss.Objective(
    config, mesh, teacher, settings.distill_alpha, settings.distill_temperature
  )

  def mean_loss(trained, base, teacher_params, batch, count):
    shape = batch["tokens_BT"].shape
    own = memory.with_remat(settings, config, teacher, shape, mesh)
    args = config, own, trained, base, batch, mesh
    x_BTD, matrix, load = forward.ends(*args)
    taught = None
    if teacher is not None:
      taught = forward.frozen_ends(
        teacher, settings, teacher_params, batch, mesh
      )
    elif likeliest(settings, config):
      taught = Likeliest(*(batch[name] for name in TAUGHT))
    tokens = batch["targets_BT"], batch["weights_BT"]
    sums = output_loss.loss(objective, matrix, x_BTD, *tokens, taught)
    value = sums[0] / count
    if load is not None:
      share = config.router_loss / settings.accumulation
      value += share * experts.balance_loss(load)
    return value, sums[1] / count

  return mean_loss


def init_optimizer(trained: Any, settings: Train, mesh: Mesh) -> Any:
  """Fresh optimizer state for params, or for adapters, placed like them."""
  transform = optimizer.of(settings)
  placed = jax.tree.map(lambda x: x.sharding, trained)
  return optimizer.init(transform, trained, placed, mesh)


def microbatches(batch: Batch, number: int, mesh: Mesh) -> Batch:
  """[B, T] -> [number, B / number, T], each microbatch on all devices."""
  spec = PartitionSpec(None, sharding.BATCH)

  def split(x):
    # Every number-th row, so that no row leaves its device.
    x = x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, batch)


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
  """Raises a UserError if the rows of a batch cannot be dealt out evenly."""
  devices = placement.batch_shards(mesh)
  if rows % (devices * accumulation):
    raise UserError(
      f"a batch of {rows} rows does not divide over {devices} device(s) x "
      f"{accumulation} microbatch(es): make --config.data.batch a multiple of "
      f"{devices * accumulation}"
    )
