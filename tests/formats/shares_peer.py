"""One of several processes of shares_test.py: PORT N ID MODEL OUT.

Opens a model cut over all of them, says how much of its files it has read, and
writes it again.
"""

import json
import sys

import jax
import numpy as np

from adapt_pruner_jax.distributed import processes, sharding
from adapt_pruner_jax.formats.hf import load, parameters, save, weights


def main(port: str, number: str, me: str, model: str, out: str) -> dict:
  processes.connect(f"127.0.0.1:{port}", int(number), int(me), 60)
  read, rows = [0], parameters.Stored.rows

  def counted(stored, start, stop):
    found = rows(stored, start, stop)
    read[0] += found.nbytes
    return found

  parameters.Stored.rows = counted
  mesh = sharding.make_mesh(tensor=2)
  config, params = load.load(model, None, mesh)
  _, whole = load.stored(model)
  for array, stored in zip(
    jax.tree.leaves(params), jax.tree.leaves(whole), strict=True
  ):
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.asarray(stored)[shard.index])
  got, on_host = [0], weights.on_host

  def received(array):
    found = on_host(array)
    got[0] += 0 if found is None else found.nbytes
    return found

  weights.on_host = received
  save.save(config, params, out)
  processes.meet()
  return {"read": read[0], "received": got[0]}


if __name__ == "__main__":
  print("found " + json.dumps(main(*sys.argv[1:])))
