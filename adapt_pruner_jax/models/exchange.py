"""Rows go to the devices that have their experts, and what is said comes back.

Experts are cut over the mesh axis `expert` in order, rows are sorted by expert:
what a device sends to another lies together, as many rows as the router asks
for. Where they arrive there is room for all rows of all devices of the axis,
so that none is ever dropped; what is beyond those that came is zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models import deal

AXIS = "expert"


class Sent(NamedTuple):
  """What the way back has to know.

  Attributes:
    counts_NX: rows that each device of the axis has for each expert.
    order_R: at which place of those that came each row is, sorted by expert.
    row_R: and the other way.
  """

  counts_NX: jax.Array
  order_R: jax.Array
  row_R: jax.Array


class Arrived(NamedTuple):
  """The rows of a device's own experts, sorted by expert.

  Attributes:
    rows_RD: those that came, and zeros.
    expert_R: which of its own it is; the last one of what is beyond.
    sizes_X: rows of each of its own.
    sent: for `back`.
  """

  rows_RD: jax.Array
  expert_R: jax.Array
  sizes_X: jax.Array
  sent: Sent


def there(rows_PD: jax.Array, sizes_X: jax.Array, devices: int) -> Arrived:
  """Sends rows to their experts; within `shard_map`.

  Args:
    rows_PD: sorted by expert.
    sizes_X: rows of each of all experts.
    devices: of the axis.
  """
  counts_NX = jax.lax.all_gather(sizes_X, AXIS)
  room = devices * len(rows_PD)
  zeros = jnp.zeros((room, rows_PD.shape[1]), rows_PD.dtype)
  came_RD = _swap(rows_PD, zeros, _between(counts_NX, devices))
  own = counts_NX.shape[1] // devices
  first = jax.lax.axis_index(AXIS) * own
  own_NX = jax.lax.dynamic_slice_in_dim(counts_NX, first, own, axis=1)
  ends = jnp.cumsum(own_NX.reshape(-1))
  which_R = jnp.searchsorted(ends, jnp.arange(room), side="right")
  expert_R = jnp.where(which_R < len(ends), which_R % own, own)
  order_R = jnp.argsort(expert_R, stable=True)
  row_R = deal.inverse(order_R)
  expert_R = jnp.minimum(expert_R[order_R], own - 1)
  rows_RD = deal.to_rows(came_RD, order_R, row_R[:, None])
  sent = Sent(counts_NX, order_R, row_R)
  return Arrived(rows_RD, expert_R, own_NX.sum(0), sent)


def back(said_RE: jax.Array, sent: Sent, devices: int) -> jax.Array:
  """What is said of the rows that `there` was given, [P, E], in their order.

  Args:
    said_RE: of the rows that came.
    sent: from `there`.
    devices: of the axis.
  """
  said_RE = deal.to_tokens(said_RE, sent.order_R, sent.row_R[:, None])
  rows = len(said_RE) // devices
  zeros = jnp.zeros((rows, said_RE.shape[1]), said_RE.dtype)
  return _swap(said_RE, zeros, _between(sent.counts_NX, devices).swapaxes(0, 1))


def _between(counts_NX: jax.Array, devices: int) -> jax.Array:
  """Rows that go from each device of the axis to each, [from, to]."""
  return counts_NX.reshape(devices, devices, -1).sum(-1).astype(jnp.int32)


def _swap(rows_PD, into_RD, between_NN):
  """Rows to each device; there they are in the order of the senders."""
  me = jax.lax.axis_index(AXIS)
  starts = lambda x_NN, axis: jnp.cumsum(x_NN, axis=axis) - x_NN
  from_NN, at_NN = starts(between_NN, 1), starts(between_NN, 0)
  sizes = from_NN[me], between_NN[me], at_NN[me], between_NN[:, me]
  return jax.lax.platform_dependent(
    rows_PD,
    into_RD,
    from_NN[:, me],
    at_NN[:, me],
    *sizes,
    cpu=_gathered,
    default=_exchanged,
  )


def _exchanged(rows_PD, into_RD, _from_N, _at_N, *sizes):
  return jax.lax.ragged_all_to_all(rows_PD, into_RD, *sizes, axis_name=AXIS)


def _gathered(rows_PD, into_RD, from_N, at_N, *sizes):
  """On CPUs, which have no ragged all-to-all: each device takes its rows.

  Args:
    from_N: where they begin at each device.
    at_N: where they go here.
  """
  came_N, room = sizes[-1], len(into_RD)
  all_NPD = jax.lax.all_gather(rows_PD, AXIS)
  at_R = jnp.arange(room)
  sender_R = jnp.searchsorted(at_N + came_N, at_R, side="right")
  there_R = sender_R < len(at_N)
  sender_R = jnp.minimum(sender_R, len(at_N) - 1)
  row_R = from_N[sender_R] + at_R - at_N[sender_R]
  row_R = jnp.where(there_R, row_R, 0)
  took_RD = all_NPD[sender_R, row_R]
  return jnp.where(there_R[:, None], took_RD, into_RD)
