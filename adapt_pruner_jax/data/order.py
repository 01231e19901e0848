"""The order of the rows of long sources, which are read in runs.

Shuffled as a whole, each row of a batch is somewhere else on the disk, and
every host reads everywhere. Here a source is cut into blocks of rows that lie
side by side; the blocks are shuffled, and the rows within each. Place p of a
batch, one of B, goes through its own stretch of that, the B-th part: the rows
of a batch are from B blocks, and the host whose devices have place p reads
those of p from their beginning to their end, and no others.

All of it is arithmetic on the step, the place and the seed. Grain shuffles the
blocks and mixes the sources.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

# So many tokens and more are read in runs: a quarter of a gigabyte, which may
# not stay in memory and need not be copied to every host.
LONG = 1 << 26
BLOCK_TOKENS = 1 << 17  # half a megabyte


class InRuns:
  """Rows of several sources in an endless order, by index: i is place i mod B
  of step i div B."""

  def __init__(
    self,
    sources: Sequence[Any],
    weights: Sequence[float],
    seed: int,
    batch: int,
  ):
    """Computes nothing yet but which sources the first batch takes.

    Args:
      sources: of each the rows, by index, with `seq_len`.
      weights: their shares of the rows.
      seed: of the order.
      batch: places, B.
    """
    self._sources, self._batch = sources, batch
    self._orders = [
      _Blocks(len(rows), max(1, BLOCK_TOKENS // rows.seq_len), seed + i, batch)
      for i, rows in enumerate(sources)
    ]
    self._pattern = _pattern(weights)
    first = [self._pattern[place][0] for place in range(batch)]
    self._places = [
      [place for place in range(batch) if first[place] == k]
      for k in range(len(sources))
    ]

  def __getitem__(self, index: int) -> dict:
    """The row at an index."""
    source, row = self.at(index)
    return self._sources[source][row]

  def at(self, index: int) -> tuple[int, int]:
    """Source and row at an index."""
    step, place = divmod(index, self._batch)
    # Each place begins one further in the pattern of the mixture: a batch has
    # its share of each source, and so has each place in the course of time.
    source, count = self._pattern[step + place]
    count -= bisect.bisect_left(self._places[source], place)
    return source, self._orders[source].row(place, count)


class _Blocks:
  """Says which row of a source is the n-th that a place takes."""

  def __init__(self, rows: int, block: int, seed: int, batch: int):
    import grain  # takes a second to import

    self._rows, self._batch, self._seed = rows, batch, seed
    self._size = min(block, rows)  # rows of a block
    self._number = rows // self._size  # whole blocks; the rest is a short one
    self._blocks = (
      grain.MapDataset.range(self._number).seed(seed % 2**32).shuffle().repeat()
    )
    # All places stay in a block for a while.
    self._turn = functools.lru_cache(2 * batch)(self._turn)
    self._shift = functools.lru_cache(2)(self._shift)

  def row(self, place: int, count: int) -> int:
    first = place * self._rows // self._batch
    length = (place + 1) * self._rows // self._batch - first
    if not length:  # fewer rows than places: one row for several
      length, first = 1, min(first, self._rows - 1)
    epoch, at = divmod(count, length)
    at += first
    if at < self._number * self._size:
      turn, offset = divmod(at, self._size)
      begin, order = self._turn(epoch * self._number + turn)
      at = begin + order[offset]
    # Blocks begin elsewhere in each epoch, so that the short one is another.
    return int((at + self._shift(epoch)) % self._rows)

  def _turn(self, number: int) -> tuple[int, np.ndarray]:
    """Where the block begins whose turn it is, and the order of its rows."""
    keys = _random(self._seed, number, self._size)
    return self._blocks[number] * self._size, np.argsort(keys)

  def _shift(self, epoch: int) -> int:
    return int(_random(self._seed, 2**63 + epoch, 1)[0]) % self._rows


def _random(seed: int, number: int, count: int) -> np.ndarray:
  """Of numpy's generators, what no version of it changes."""
  key = np.array([seed % 2**64, number], np.uint64)
  return np.random.Philox(key=key).random_raw(count)


def _pattern(weights: Sequence[float]) -> Any:
  """By index: a source, and how often it was there before."""
  import grain

  parts = [
    grain.MapDataset.range(2**40).map(lambda n, k=k: (k, n))
    for k in range(len(weights))
  ]
  return mixed(parts, weights)


def mixed(parts: Sequence[Any], weights: Sequence[float]) -> Any:
  """Several `grain.MapDataset`s as one, by their weights."""
  import grain

  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
