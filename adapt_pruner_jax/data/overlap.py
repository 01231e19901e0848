"""Texts that are in one another: windows of tokens, by their hashes.

A reported text is cut into windows of WINDOW tokens, one behind another; each
is looked for at every position of the text that something is learnt from. A
stretch of 2 * WINDOW - 1 tokens that both have is always found, wherever it
begins. Hashes are polynomials modulo 2^64: windows that differ are taken for
alike about once in 10^19 pairs.
"""

from collections.abc import Iterable

import numpy as np

WINDOW = 32  # tokens; a power of two
CHUNK = 1 << 22  # positions hashed at a time
BASE = 0x9E3779B97F4A7C15  # odd


def share(reported_N: np.ndarray, learnt: Iterable[np.ndarray]) -> float:
  """The share of a text's windows that are also in others.

  Args:
    reported_N: token ids; fewer than WINDOW have no windows, and share 0.
    learnt: token ids of the others, [any number] each.
  """
  mine = np.unique(hashes(reported_N)[::WINDOW])
  if not len(mine):
    return 0.0
  found = np.zeros(len(mine), bool)
  for tokens_M in learnt:
    for first in range(0, len(tokens_M), CHUNK):
      theirs = hashes(tokens_M[first : first + CHUNK + WINDOW - 1])
      at = np.minimum(np.searchsorted(mine, theirs), len(mine) - 1)
      found[at[mine[at] == theirs]] = True
  return float(found.mean())


def hashes(tokens_N: np.ndarray) -> np.ndarray:
  """A hash of the window at each position, uint64 [N - WINDOW + 1]."""
  # Ids from 1, so that a window of zeros is not like a shorter one.
  # One more, so that a token of id 0 counts too.
  found = np.asarray(tokens_N).astype(np.uint64) + np.uint64(1)
  length, power = 1, BASE
  while length < WINDOW:
    first = found[: max(len(found) - length, 0)]
    found = first + np.uint64(power) * found[length:]
    length, power = 2 * length, power * power % 2**64
  return found
