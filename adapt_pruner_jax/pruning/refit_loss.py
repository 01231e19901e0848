"""Refit by the loss: all that is left learns to predict as the dense model did.

Behind the least squares of `refit`, which match one matrix at a time, some
passes over calibration windows, each over fresh ones, lower

  KL(dense || pruned), a mean over tokens, times temperature^2

by all weights at once (Adam, arXiv 1503.02531). It is training, of as many
tokens as `prune.refit_passes` x `calibration.refit_samples` x
`calibration.seq_len`, and is counted as such where methods are compared. A
tenth of the first windows is held out: where their loss does not fall, the
weights stay as they were.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import agreement, placement, stopping
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import loop, optimizer, step

HELD_OUT = 10  # of so many rows, one


def refit_loss(
  dense: tuple[ModelConfig, Params],
  pruned: tuple[ModelConfig, Params],
  samples: Callable[[int], np.ndarray],
  batch: int,
  mesh: Mesh,
  *,
  passes: int,
  rate: float,
  temperature: float,
  seed: int = 0,
) -> tuple[Params, dict[str, float]]:
  """Distils the dense model into the pruned one, on calibration windows.

  Args:
    dense: the model before pruning.
    pruned: the model after it.
    samples: gives the windows [N, T] of a pass (from 0), the same N each time.
    batch: windows a step, cut over the mesh; rounded up to what it divides.
    passes: how many sets of windows.
    rate: the highest learning rate; it falls to a tenth along a cosine.
    temperature: what both models' logits are divided by.
    seed: of the order of the windows.

  Returns:
    The params, in the types that they had, and {"tokens", "before", "after"}:
    tokens trained on, and the loss of the held-out windows.

  Raises:
    UserError: too few windows for one step.
  """
  config, params = pruned
  # The balance of experts is no part of the distance.
  config = dataclasses.replace(config, router_loss_on=False)
  first_NT = samples(0)
  held, batch = split(len(first_NT), batch, mesh)
  left_NT, held_NT = first_NT[:-held], first_NT[-held:]
  sets = lambda number: samples(number) if number else left_NT
  steps = len(left_NT) // batch + (passes - 1) * (len(first_NT) // batch)
  settings = as_training(rate, temperature)
  distance = _distance(config, dense, settings, mesh)
  before = distance(params, held_NT, batch)
  schedule = optimizer.schedule(settings, steps)
  # The step donates what it trains: the old weights must outlive it.
  trained = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
  trained_on = steps * batch * first_NT.shape[1]
  training = loop.start(
    (config, trained),
    settings,
    schedule,
    mesh,
    teacher=dense,
    tokens=trained_on,
  )
  order = _batches(sets, batch, passes, seed)
  training, _ = loop.recover(training, order, 0, steps, mesh)
  cast = lambda new, old: new.astype(old.dtype)
  new = jax.tree.map(cast, training.trained, params)
  after = distance(new, held_NT, batch)
  before, after = agreement.from_writer((before, after))
  record = {"tokens": trained_on, "before": before, "after": after}
  return (new if after < before else params), record


def as_training(rate: float, temperature: float) -> Train:
  """The settings of a training that does the same.

  Args:
    rate, temperature: as of `refit_loss`.
  """
  return Train(
    learning_rate=rate,
    min_learning_rate=rate / 10,
    schedule="cosine",
    distill_alpha=1.0,
    distill_temperature=temperature,
  )


def split(windows: int, batch: int, mesh: Mesh) -> tuple[int, int]:
  """How many windows of a set are held out, and how many go in a step.

  Args:
    windows: of a set.
    batch, mesh: as of `refit_loss`.

  Raises:
    UserError: too few windows for one step.
  """
  shards = placement.batch_shards(mesh)
  held = windows // HELD_OUT
  batch = -(-min(batch, windows - held) // shards) * shards
  if windows - held < max(batch, 1) or not held:
    raise UserError(
      f"{windows} calibration windows are too few to refit by the loss: "
      f"give --config.calibration.refit_samples={HELD_OUT * max(batch, 2)} or "
      "more (an npy file as many samples a step), or "
      "--config.prune.refit_passes=0"
    )
  return held, batch


def _batches(
  sets: Callable[[int], np.ndarray], batch: int, passes: int, seed: int
) -> Iterator[step.Batch]:
  """Whole batches of the sets, each in an order of its own."""
  for number in range(passes):
    rows_NT = sets(number)
    order = np.random.default_rng((seed % 2**32, number)).permutation(
      len(rows_NT)
    )
    for i in range(0, len(order) - batch + 1, batch):
      stopping.moment()
      yield step.batch_of(rows_NT[order[i : i + batch]])


def _distance(config, dense, settings, mesh):
  """Of params and windows: the loss, a mean over the windows' tokens."""
  teacher_config, teacher = dense
  loss = jax.jit(step.make_loss(config, settings, mesh, teacher_config))

  def distance(params, rows_NT, batch):
    total, count = 0.0, len(rows_NT) * (rows_NT.shape[1] - 1)
    for i in range(0, len(rows_NT), batch):
      rows = rows_NT[i : i + batch]
      short = batch - len(rows)
      padded = np.concatenate([rows, np.repeat(rows[:1], short, axis=0)])
      placed = loop.place(step.batch_of(padded, len(rows)), mesh)
      total += float(loss(params, None, teacher, placed, count)[0])
    return total

  return distance
