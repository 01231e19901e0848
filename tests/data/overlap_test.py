"""Windows of one text in another."""

import numpy as np
import pytest

from adapt_pruner_jax.data import overlap

WINDOW = overlap.WINDOW


def tokens(seed, number):
  return np.random.default_rng(seed).integers(0, 50000, number, np.int32)


def test_a_hash_is_a_polynomial_of_its_window():
  found = overlap.hashes(tokens(0, 50))
  assert len(found) == 50 - WINDOW + 1
  for at in (0, 18):
    window = tokens(0, 50)[at : at + WINDOW].tolist()
    want = sum((x + 1) * overlap.BASE**i for i, x in enumerate(window))
    assert int(found[at]) == want % 2**64
  for number in (0, 1, WINDOW - 1):
    assert not len(overlap.hashes(tokens(0, number)))


@pytest.mark.parametrize("at", [0, 1, 17, 63])
def test_a_stretch_is_found_wherever_it_stands(at, monkeypatch):
  """Also across the border of two chunks."""
  monkeypatch.setattr(overlap, "CHUNK", 100)
  reported, learnt = tokens(1, 640), tokens(2, 300)
  assert overlap.share(reported, [learnt]) == 0
  stretch = 2 * WINDOW - 1
  learnt[77 : 77 + stretch] = reported[at : at + stretch]
  assert overlap.share(reported, [learnt]) == 1 / 20


def test_shares():
  reported, half = tokens(3, 640), tokens(3, 640)[:320]
  assert overlap.share(reported, [reported]) == 1
  assert overlap.share(reported, [half]) == 0.5
  assert overlap.share(reported[: WINDOW - 1], [reported]) == 0
  assert overlap.share(reported, []) == 0
  # What repeats counts once.
  assert overlap.share(np.tile(reported[:WINDOW], 5), [half]) == 1
