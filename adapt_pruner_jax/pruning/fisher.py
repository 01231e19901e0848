"""Fisher: how much a unit's removal changes the loss of each text on its own.

A unit has a gate m, 1 while it is there. With the loss L_n of calibration row
n, a mean over its tokens,

  s = 1/2 mean_n (dL_n / dm)^2

half the empirical Fisher information of the gate: the second-order increase
of the loss when m goes to 0 (a Taylor expansion in which the Fisher information
stands for the Hessian, as in arXiv 1801.05787 and 2204.09656). What a unit does
is summed over the tokens of a row before it is squared, so that a row is one
observation; the same squares token by token choose worse (docs/method.md).

Scores of all modules have one unit of measure, so that one ranking can replace
a schedule. A half as one piece has one gate, whose gradient is the sum of its
units': what they do together, or against each other, is in its square.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.pruning import backward, passes, scores
from adapt_pruner_jax.pruning.task import Masked, Measured


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Scores of all units."""
  return scores.measure_by(PROGRAMS, masked, tokens_NT)


def _gates(T: int, mesh: Mesh, halves: bool = False) -> backward.Visitor:
  """Sums the squares of each row's own gradient with respect to the gates.

  Args:
    T, mesh: not read.
    halves: keep the score of the half as one piece beside its units'.
  """
  del T, mesh

  def start(half):
    units = jnp.zeros(half.masks[half.unit].shape, jnp.float32)
    return (units, jnp.float32(0)) if halves else units

  def add(half, total, x_BTD, dy_BTD, valid_B, rows):
    del rows
    gate_U = half.masks[half.unit].astype(jnp.float32)

    def back(x_TD, dy_TD):
      run = lambda gate_U, x_TD: half.gated(gate_U).run(x_TD[None])[0][0]
      return jax.vjp(run, gate_U, x_TD)[1](dy_TD)

    dgate_BU, dx_BTD = jax.vmap(back)(x_BTD, dy_BTD)
    valid_B = valid_B.reshape(-1, *(1,) * gate_U.ndim)
    dgate_BU = jnp.where(valid_B, dgate_BU, 0)
    found = jnp.sum(dgate_BU**2, axis=0)
    if halves:
      whole_B = jax.vmap(jnp.vdot, (0, None))(dgate_BU, gate_U)
      found = found, jnp.sum(whole_B**2)
    return jax.tree.map(jnp.add, total, found), dx_BTD

  def finish(half, total, seen):
    del half
    return jax.tree.map(lambda x: x / (2 * seen.rows), total)

  return backward.Visitor(start, add, finish)


PROGRAMS = passes.scored(_gates, "halves")
measure_step = PROGRAMS.walk
