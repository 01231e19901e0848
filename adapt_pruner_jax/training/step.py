"""The train step: of all weights, of adapters, with or without a teacher.

Weights and Adam's moments are float32; the arithmetic may be bfloat16. What is
trained is a pytree: the params themselves or, with LoRA, the adapters beside
frozen params. A batch is a dict of arrays [B, T] as `data` makes them:
`tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, output_name
from adapt_pruner_jax.models.kernels import Kernel
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import optimizer, output_loss
from adapt_pruner_jax.training.lora import abstract_adapters, merge_lora

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
# (trained, optimizer state, batch, global step) -> the first two and metrics
Step = Callable[[Any, Any, Batch, int], tuple[Any, Any, Metrics]]


def make_step(
  config: ModelConfig,
  settings: Train,
  schedule: optimizer.Schedule,
  mesh: Mesh,
  base: Params | None = None,
  teacher: tuple[ModelConfig, Params] | None = None,
) -> Step:
  """The train step of one model shape, compiled at its first call.

  A step whose loss or gradient is not finite changes nothing but its metrics
  (`loss`, `grad_norm`, `tokens`, `learning_rate`, and with a teacher
  `next_token`, the loss without distillation). The trees passed in are donated.

  Args:
    config, settings: the model, and how it is trained.
    base: the frozen params under LoRA; the step then trains adapters.
    teacher: the pair to distil from, needed if `settings.distill_alpha` > 0.
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

  abstract = model_config.abstract_params(config, jnp.float32)
  placed = sharding.param_shardings(abstract, mesh)
  if base is not None:
    abstract, placed = abstract_adapters(config, settings.lora_rank, mesh)
  state = optimizer.state_shardings(transform, abstract, placed, mesh)
  out = (placed, state, sharding.replicated(mesh))
  compiled = jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
  taught = teacher[1] if alpha else None

  def run(trained, opt_state, batch, step):
    check_rows(len(batch["tokens_BT"]), settings.accumulation, mesh)
    rate = np.float32(schedule(step))
    return compiled(trained, opt_state, base, taught, batch, rate)

  return run


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
  alpha, dtype = settings.distill_alpha, jnp.dtype(settings.dtype)
  kernel = Kernel(settings.attention, mesh)
  student = Decoder(config, settings.remat, kernel)
  objective = output_loss.Objective(config, mesh, teacher, alpha)

  def ends(decoder, params, batch):
    """The stream behind the final norm, and the output matrix."""
    x_BTD = hidden(decoder, params, batch, mesh, dtype)
    return x_BTD, params[output_name(decoder.config)]

  def mean_loss(trained, base, teacher_params, batch, count):
    params = trained
    if base is not None:
      params = merge_lora(base, trained, settings.lora_alpha)
    x_BTD, matrix = ends(student, params, batch)
    taught = None
    if teacher is not None:
      taught = ends(Decoder(teacher, kernel=kernel), teacher_params, batch)
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
  """Params in the dtype of the arithmetic."""
  return jax.tree.map(lambda p: p.astype(dtype), params)


def microbatches(batch: Batch, number: int, mesh: Mesh) -> Batch:
  """[B, T] -> [number, B / number, T], each microbatch on all devices."""
  spec = PartitionSpec(None, sharding.BATCH)

  def split(x):
    # Every number-th row, so that no row leaves its device.
    x = x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, batch)


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
