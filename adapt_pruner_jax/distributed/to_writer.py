"""An array cut over many processes, brought to process 0 alone, once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import agreement


def to_writer(array: jax.Array) -> np.ndarray | None:
  """All of an array, on process 0; None on the others, which take part.

  Each piece that process 0 lacks is sent to it by one device that has it, as
  many at a time as process 0 has devices. Nothing goes to other processes.

  Args:
    array: on a mesh over all processes; all of them have to call it.
  """
  where: NamedSharding = array.sharding
  held = where.devices_indices_map(array.shape)
  devices = list(where.mesh.devices.flat)
  here = [i for i, d in enumerate(devices) if d.process_index == 0]
  known = {str(held[devices[i]]) for i in here}
  missing: list[int] = []  # devices that have what process 0 lacks
  for i, device in enumerate(devices):
    if str(held[device]) not in known:
      known.add(str(held[device]))
      missing.append(i)
  rounds = [
    tuple(zip(missing[i : i + len(here)], here, strict=False))
    for i in range(0, len(missing), len(here))
  ]
  sent = None
  if rounds:
    sent = _send(array, where.mesh, where.spec, tuple(rounds))
  if not agreement.is_writer():
    return None
  whole = np.empty(array.shape, array.dtype)
  for shard in array.addressable_shards:
    whole[shard.index] = shard.data
  if sent is not None:
    received = {s.device: s.data for s in sent.addressable_shards}
    for number, pairs in enumerate(rounds):
      for source, target in pairs:
        whole[held[devices[source]]] = received[devices[target]][0, number]
  return whole


@partial(jax.jit, static_argnums=(1, 2, 3))
def _send(
  array: jax.Array,
  mesh: Mesh,
  spec: PartitionSpec,
  rounds: tuple[tuple[tuple[int, int], ...], ...],
) -> jax.Array:
  """[devices, rounds, *piece]: what each device was sent in each round.

  Args:
    rounds: of each, (source, target) as places in the mesh.
  """
  every = mesh.axis_names

  def one(piece: jax.Array) -> jax.Array:
    got = [jax.lax.ppermute(piece, every, pairs) for pairs in rounds]
    return jnp.stack(got)[None]

  return jax.shard_map(
    one, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(every)
  )(array)
