"""The train step, and the recovery of one stage: full, distilled, or LoRA.

Weights and Adam's moments are float32; the arithmetic may be bfloat16. What is
trained is a pytree: the params themselves or, with LoRA, the adapters beside
frozen params. A batch is a dict of arrays [B, T] as `data` makes them:
`tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax import axes, loss, model, optim, sharding
from adapt_pruner_jax.axes import Params
from adapt_pruner_jax.config import Train
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
# (trained, optimizer state, batch, global step) -> the first two and metrics
Step = Callable[[Any, Any, Batch, int], tuple[Any, Any, Metrics]]

LORA_NAMES = ("q", "k", "v", "o", "gate", "up", "down")


def make_step(
  config: ModelConfig,
  settings: Train,
  schedule: optim.Schedule,
  mesh: Mesh,
  base: Params | None = None,
  teacher: tuple[ModelConfig, Params] | None = None,
) -> Step:
  """The train step of one model shape, compiled at its first call.

  A step whose loss or gradient is not finite changes nothing but its metrics
  (`loss`, `grad_norm`, `tokens`, `learning_rate`, and with a teacher
  `next_token`, the loss without distillation). The trees passed in are donated.

  Args:
    base: the frozen params under LoRA; the step then trains adapters.
    teacher: the pair to distil from, needed if `settings.distill_alpha` > 0.
  """
  alpha = settings.distill_alpha
  assert not alpha or teacher is not None, "distillation without a teacher"
  transform = optim.optimizer(settings.weight_decay)
  dtype = jnp.dtype(settings.dtype)
  student = model.Decoder(config, remat=settings.remat)

  def mean_loss(trained, base, teacher_params, batch, count):
    params = trained
    if base is not None:
      params = merge_lora(base, trained, settings.lora_alpha)
    logits = _logits(student, cast(params, dtype), batch, mesh)
    targets, weights = batch["targets_BT"], batch["weights_BT"]
    nll = loss.next_token(logits, targets, weights)[0] / count
    if not alpha:
      return nll, nll
    decoder = model.Decoder(teacher[0])
    taught = _logits(decoder, cast(teacher_params, dtype), batch, mesh)
    kl = loss.distillation(logits, taught, weights)[0] / count
    return (1 - alpha) * nll + alpha * kl, nll

  def step_fn(trained, opt_state, base, teacher_params, batch, rate):
    # Dividing each microbatch by the weight of the whole batch makes the sum
    # of microbatches exactly the mean over the batch.
    count = jnp.maximum(batch["weights_BT"].sum(), 1)
    gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def add(total, microbatch):
      found = gradient(trained, base, teacher_params, microbatch, count)
      return jax.tree.map(jnp.add, total, found), None

    if settings.accumulation == 1:
      total = gradient(trained, base, teacher_params, batch, count)
    else:
      zero = jnp.zeros(())
      zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, trained))
      split = microbatches(batch, settings.accumulation, mesh)
      total, _ = jax.lax.scan(add, zeros, split)
    (value, nll), grads = total
    norm = optax.tree.norm(grads)
    updates, new_state = transform.update(grads, opt_state, trained)
    new = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    new, new_state = jax.tree.map(
      partial(jnp.where, good), (new, new_state), (trained, opt_state)
    )
    metrics = {"loss": value, "grad_norm": norm, "learning_rate": rate}
    metrics |= {"tokens": batch["weights_BT"].sum()}
    metrics |= {"next_token": nll} if alpha else {}
    return new, new_state, metrics

  if base is None:
    abstract, placed = _full_model(config, mesh)
  else:
    abstract, placed = abstract_adapters(config, settings.lora_rank, mesh)
  state = optim.state_shardings(transform, abstract, placed, mesh)
  out = (placed, state, sharding.replicated(mesh))
  compiled = jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
  teacher_params = teacher[1] if alpha else None

  def run(trained, opt_state, batch, step):
    rows = batch["tokens_BT"].shape[0]
    check_rows(rows, settings.accumulation, mesh)
    rate = np.float32(schedule(step))
    return compiled(trained, opt_state, base, teacher_params, batch, rate)

  return run


def recover(
  step_fn: Step,
  trained: Any,
  opt_state: Any,
  batches: Iterator[Batch],
  first_step: int,
  last_step: int,
  mesh: Mesh,
  log: Callable[[int, dict[str, float]], None] | None = None,
  stop: Callable[[int], bool] | None = None,
  skip_nonfinite: bool = False,
) -> tuple[Any, Any, int]:
  """Trains through global steps first_step ... last_step - 1.

  Returns:
    What was trained, the optimizer state, and the next global step. By then
    every step has been checked, so the state is fit to be saved.

  Args:
    step_fn: from `make_step`; keep it as long as the shapes stay, it holds the
      compiled program.
    batches: one a step, the same in every process; the position in the data is
      already at `first_step`.
    log: called with each step's number and metrics, one step late, so that the
      device never waits for the host.
    stop: asked before each step but the first; True ends the loop early.
    skip_nonfinite: go on after a non-finite loss; that step changed nothing.

  Raises:
    UserError: a non-finite loss, or the data ended.
  """

  def report(step: int, metrics: Metrics) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    bad = [n for n in ("loss", "grad_norm") if not math.isfinite(values[n])]
    if bad and not skip_nonfinite:
      raise UserError(
        f"{bad[0]} is {values[bad[0]]} at train step {step} (batch {step} of "
        "the data order); nothing was saved after the last checkpoint: try a "
        "lower --config.train.learning_rate in another --workdir, or go on "
        "here without such batches: --config.train.skip_nonfinite=True"
      )
    if log is not None:
      log(step, values)

  running = None
  step = first_step
  while step < last_step:
    if step > first_step and stop is not None and stop(step):
      break
    batch = next(batches, None)
    if batch is None:
      raise UserError(
        f"the training data ended before step {step}, {last_step - step} "
        "step(s) early: lower --config.train.tokens or give more text"
      )
    placed = place(batch, mesh)
    trained, opt_state, metrics = step_fn(trained, opt_state, placed, step)
    if running is not None:
      report(*running)
    running = step, metrics
    step += 1
  if running is not None:
    report(*running)
  return trained, opt_state, step


def init_optimizer(trained: Any, settings: Train, mesh: Mesh) -> Any:
  """Fresh optimizer state for params, or for adapters, placed like them."""
  transform = optim.optimizer(settings.weight_decay)
  placed = jax.tree.map(lambda x: x.sharding, trained)
  return optim.init(transform, trained, placed, mesh)


def cast(params: Params, dtype: jnp.dtype) -> Params:
  return jax.tree.map(lambda p: p.astype(dtype), params)


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """A batch on the devices, each with its rows."""
  return {
    name: sharding.place_rows(array, mesh) for name, array in batch.items()
  }


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
  """Raises a UserError if the rows of a batch cannot be dealt out evenly."""
  devices = sharding.batch_shards(mesh)
  if rows % (devices * accumulation):
    raise UserError(
      f"a batch of {rows} rows does not divide over {devices} device(s) x "
      f"{accumulation} microbatch(es): make --config.data.batch a multiple of "
      f"{devices * accumulation}"
    )


def microbatches(batch: Batch, number: int, mesh: Mesh) -> Batch:
  """[B, T] -> [number, B / number, T], each microbatch on all devices."""
  spec = PartitionSpec(None, sharding.BATCH)

  def split(x):
    # Every number-th row, so that no row leaves its device.
    x = x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, batch)


def init_lora(
  config: ModelConfig, rank: int, key: jax.Array, mesh: Mesh
) -> dict[str, Any]:
  """Adapters that change nothing yet (arXiv 2106.09685), float32.

  One {"a": [in..., rank], "b": [rank, out...]} for each of the seven matrices
  of each layer; `a` is random, `b` zero.
  """
  abstract, placed = abstract_adapters(config, rank, mesh)

  def build(key):
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(key, len(leaves))
    drawn = [
      jax.random.normal(k, x.shape) / math.sqrt(math.prod(x.shape[:-1]))
      for k, x in zip(keys, leaves, strict=True)
    ]
    return {
      layer: {
        name: {"a": f["a"], "b": jnp.zeros_like(f["b"])}
        for name, f in factors.items()
      }
      for layer, factors in tree.unflatten(drawn).items()
    }

  return jax.jit(build, out_shardings=placed)(key)


def merge_lora(
  params: Params, adapters: dict[str, Any], lora_alpha: float
) -> Params:
  """Params with a @ b * (lora_alpha / rank) added, in the params' dtype."""

  def merged(weight, factor):
    scale = lora_alpha / factor["b"].shape[0]
    delta = jnp.tensordot(factor["a"], factor["b"], axes=1) * scale
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

  new = dict(params)
  for layer, factors in adapters.items():
    changed = {n: merged(params[layer][n], f) for n, f in factors.items()}
    new[layer] = params[layer] | changed
  return new


def _full_model(config: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
  abstract = model.abstract_params(config, jnp.float32)
  return abstract, sharding.param_shardings(abstract, mesh)


def abstract_adapters(
  config: ModelConfig, rank: int, mesh: Mesh
) -> tuple[Any, Any]:
  """The adapter tree as shapes, and as shardings."""
  shapes, placed = {}, {}
  for i in range(config.L):
    layer = axes.layer_name(i)
    sizes = config.sizes(i) | {"R": rank}
    shapes[layer], placed[layer] = {}, {}
    for name in LORA_NAMES:
      if name not in model.layer_names(config, i):
        continue  # this half of the layer is gone
      letters = axes.AXES[name]
      # The residual width D is the side where a matrix reads, or writes.
      cut = 1 if letters[0] in axes.RESIDUAL else len(letters) - 1
      pair = {"a": letters[:cut] + "R", "b": "R" + letters[cut:]}
      shape = {f: tuple(sizes[x] for x in pair[f]) for f in pair}
      shapes[layer][name] = {
        f: jax.ShapeDtypeStruct(shape[f], jnp.float32) for f in pair
      }
      placed[layer][name] = {
        f: NamedSharding(mesh, sharding.spec(pair[f], shape[f], mesh))
        for f in pair
      }
  return shapes, placed


def _logits(
  decoder: model.Decoder, params: Params, batch: Batch, mesh: Mesh
) -> jax.Array:
  logits_BTV, _ = decoder.apply(
    {"params": sharding.whole_embedding(params, mesh)},
    batch["tokens_BT"],
    batch["segments_BT"],
    batch["positions_BT"],
  )
  return logits_BTV
