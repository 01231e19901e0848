"""Medians against NumPy's, which sorts."""

import jax
import numpy as np
import pytest

from adapt_pruner_jax.pruning.median import median


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_median(size):
  rng = np.random.default_rng(size)
  x = np.exp(rng.normal(size=size) * 20).astype(np.float32)
  x[: size // 3] = 0
  counts = rng.random(size) < 0.7
  counts[0] = True
  assert jax.jit(median)(x) == np.median(x)
  assert median(x.reshape(-1, 1), counts[:, None]) == np.median(x[counts])


def test_ties_and_infinity():
  assert median(np.array([3, 3, 0, np.inf, 3], np.float32)) == 3
  assert median(np.array([1, np.inf, np.inf], np.float32)) == np.inf
