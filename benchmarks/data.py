"""Rows of training: how many a second, and what a host reads for them.

  python benchmarks/data.py [--tokens=268435456] [--batch=512] [--steps=64]

Shards of random tokens are written, as `tokenise` leaves them. Then the rows of
some steps are built, by one host that needs all of them and by one of 64, in
two orders: shuffled as a whole, as short sources are, and in runs, as long ones
are. They are read as from a bucket, in pieces of half a megabyte of which the
last thousand are kept; the pieces are counted, and come from a disk here.
"""

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
import types
from pathlib import Path

import numpy as np

HOSTS = (1, 64)
DOCUMENT = 1000  # tokens
VOCABULARY = 32_000


def write_shards(folder: Path, tokens: int) -> None:
  """Shards of random tokens."""
  from adapt_pruner_jax.data import encoding, shards, sources, token_store

  rng, size = np.random.default_rng(0), token_store.SHARD_TOKENS
  for number in range(-(-tokens // size)):
    count = min(size, tokens - number * size)
    lengths = np.full(-(-count // DOCUMENT), DOCUMENT)
    lengths[-1] = count - lengths[:-1].sum()
    chunk = encoding.Chunk(
      rng.integers(0, VOCABULARY, count, np.int32),
      lengths,
      np.ones(count, bool),
    )
    last = (number + 1) * size >= tokens
    shard = shards.of_chunks([chunk], sources.Place(), last)
    shards.write(folder / f"{number:05d}.safetensors", shard, {})


class Counted:
  """A file in the place of an object, that counts what is read of it."""

  requests = size = 0  # of all files

  def __init__(self, path: Path):
    """Nothing is read yet."""
    self._path = path

  def version(self) -> str:
    """It stays as it is."""
    return ""

  def read_range(self, start: int, stop: int) -> bytes:
    """Bytes of the file."""
    Counted.requests += 1
    Counted.size += stop - start
    with open(self._path, "rb") as file:
      file.seek(start)
      return file.read(stop - start)


def measure(
  queue, folder: Path, in_runs: bool, hosts: int, flags: argparse.Namespace
) -> None:
  """Builds the rows of one host: (rows, seconds, bytes, requests)."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from adapt_pruner_jax.config import Data
  from adapt_pruner_jax.data import (
    order,
    packing,
    shards,
    sources,
    token_store,
  )

  found = []
  for path in sorted(folder.iterdir()):
    file = Counted(path)
    array = functools.partial(shards.InBucket, version="")
    opened = file, path.stat().st_size, file.read_range, array
    found.append(shards._opened(*opened))
  stream = token_store._stream(sources.Source("text"), found)
  packing.tokenise = lambda *_: stream
  order.LONG = 0 if in_runs else 1 << 60
  mine = flags.batch // hosts
  train = packing.train_data(
    Data(source="embedded", seq_len=flags.seq_len, batch=flags.batch),
    types.SimpleNamespace(begin_id=None),  # nothing else of it is asked
    VOCABULARY,
    seed=0,
    places=range(mine),
  )
  Counted.requests = Counted.size = 0  # those of the headers do not count
  batches, begun = train.batches(0), time.monotonic()
  for _ in range(flags.steps):
    next(batches)
  seconds = time.monotonic() - begun
  queue.put((mine * flags.steps, seconds, Counted.size, Counted.requests))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=1 << 28)
  parser.add_argument("--seq_len", type=int, default=2048)
  parser.add_argument("--batch", type=int, default=512)
  parser.add_argument("--steps", type=int, default=64)
  flags = parser.parse_args()
  context = multiprocessing.get_context("spawn")
  print("| order | hosts | rows/s of a host | MB needed | MB read | requests |")
  print("|---|---:|---:|---:|---:|---:|")
  with tempfile.TemporaryDirectory(prefix="data-") as name:
    folder = Path(name)
    write_shards(folder, flags.tokens)
    for in_runs in (False, True):
      for hosts in HOSTS:
        queue = context.SimpleQueue()
        process = context.Process(
          target=measure, args=(queue, folder, in_runs, hosts, flags)
        )
        process.start()
        process.join()
        if process.exitcode:
          raise SystemExit("it has failed")
        rows, seconds, read, requests = queue.get()
        order = "in runs" if in_runs else "as a whole"
        needed = rows * flags.seq_len * 4
        print(
          f"| {order} | {hosts} | {rows / seconds:,.0f} | {needed / 1e6:,.0f} "
          f"| {read / 1e6:,.0f} | {requests:,} |",
          flush=True,
        )


if __name__ == "__main__":
  main()
