"""The train step, and the recovery of one stage: full, distilled, or LoRA.

Weights and Adam's moments are float32; the arithmetic may be bfloat16. What is
trained is a pytree: the params themselves or, with LoRA, the adapters beside
frozen params. A batch is a dict of arrays [B, T] as `data` makes them:
`tokens_BT, targets_BT, segments_BT, positions_BT, weights_BT`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import placement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.training.step import Batch, Metrics, Step


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


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """A batch on the devices, each with its rows."""
  return {
    name: placement.place_rows(array, mesh) for name, array in batch.items()
  }
