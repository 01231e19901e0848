"""One of several processes of shares_test.py: PORT N ID OUT MODEL...

Opens models cut over all of them, says how many bytes of their files it has
read, and writes the first again.
"""

import json
import sys

import jax
import numpy as np

from adapt_pruner_jax.distributed import processes, sharding
from adapt_pruner_jax.formats.gguf import reader
from adapt_pruner_jax.formats.hf import files, load, save, weights


def main(port: str, number: str, me: str, out: str, *models: str) -> dict:
  processes.connect(f"127.0.0.1:{port}", int(number), int(me), 60)
  mesh = sharding.make_mesh(tensor=2)
  read, count = {}, counting()
  for model in models:
    count[0] = 0
    config, params = load.load(model, None, mesh)
    read[model] = count[0]
    _, whole = load.stored(model)
    for array, stored in zip(
      jax.tree.leaves(params), jax.tree.leaves(whole), strict=True
    ):
      wanted = np.asarray(stored)
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])
    if model == models[0]:
      received = written(config, params, out)
  processes.meet()
  return {"read": read, "received": received}


def counting() -> list[int]:
  """A list of one number: how many bytes of the files are read from now."""
  array, part, count = files.Checkpoint.array, reader.Checkpoint._read, [0]

  def counted_array(checkpoint, tensor, rows=files.ALL):
    found = array(checkpoint, tensor, rows)
    count[0] += found.nbytes
    return found

  def counted_part(checkpoint, name, start, stop):
    stored = checkpoint._file.tensors[name]
    count[0] += int(stored.n_bytes) * (stop - start) // int(stored.shape[-1])
    return part(checkpoint, name, start, stop)

  files.Checkpoint.array = counted_array
  reader.Checkpoint._read = counted_part
  return count


def written(config, params, out: str) -> int:
  """Writes a model; how many bytes of it this process got for that."""
  got, on_host = [0], weights.on_host

  def received(array):
    found = on_host(array)
    got[0] += 0 if found is None else found.nbytes
    return found

  weights.on_host = received
  save.save(config, params, out)
  return got[0]


if __name__ == "__main__":
  print("found " + json.dumps(main(*sys.argv[1:])))
