"""Elimination on rows cut over devices, against float64 and LAPACK's error.

What float32 can give depends on a matrix's condition, so LAPACK's own distance
from float64 is the measure.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.pruning import (
  curvature,
  elimination,
  float32_product,
  linear_algebra,
)


def gram_of(channels, tokens, seed=0):
  """Of inputs like a model's: correlated, a few a thousand times larger."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(tokens, channels)) * np.exp(rng.normal(size=channels))
  x += x @ rng.normal(size=(channels, channels)) * 0.3 / np.sqrt(channels)
  x[:, :3] *= 1000
  return jnp.asarray(x.T @ x / tokens, jnp.float32)


@pytest.fixture(scope="module")
def cut():
  return sharding.make_mesh(2, 2, 2, jax.devices())


@pytest.fixture
def eliminated(monkeypatch):
  """As on a TPU, on whatever there is."""
  monkeypatch.setattr(elimination, "wanted", lambda mesh: mesh is not None)


def error_of(found, exact):
  return np.abs(found - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("size", [7, 128])
def test_inverse_of_a_small_matrix(size):
  matrix, _ = linear_algebra.scaled(gram_of(size, 200), 1e-2)
  exact = np.linalg.inv(np.asarray(matrix, np.float64))
  found = jax.jit(elimination.inverse)(matrix)
  lapack = linear_algebra.inverse_blocks(matrix, size)[0]
  assert error_of(found, exact) < 3 * error_of(lapack, exact) + 1e-6


# 300 is no multiple of what eight devices hold; blocks of 5 end within one.
@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 5])
def test_blocks_of_the_inverse(cut, width):
  matrix, _ = linear_algebra.scaled(gram_of(300, 400), 1e-3)
  inverse = np.linalg.inv(np.asarray(matrix, np.float64))
  exact = [inverse[i : i + width, i : i + width] for i in range(0, 300, width)]
  fn = partial(elimination.inverse_blocks, width=width, mesh=cut)
  found = jax.jit(fn)(matrix)
  lapack = linear_algebra.inverse_blocks(matrix, width)
  most = lambda blocks: max(map(error_of, np.asarray(blocks), exact))
  assert most(found) < 3 * most(lapack)


@pytest.mark.slow
def test_solves(cut):
  matrix, _ = linear_algebra.scaled(gram_of(300, 400), 1e-3)
  rng = np.random.default_rng(1)
  rights = {n: rng.normal(size=(300, e)) for n, e in (("a", 4), ("b", 3))}
  rights = {n: jnp.asarray(x, jnp.float32) for n, x in rights.items()}
  found = jax.jit(partial(elimination.solve, mesh=cut))(matrix, rights)
  lower = jnp.linalg.cholesky(matrix)
  matrix = np.asarray(matrix, np.float64)
  for n, right in rights.items():
    lapack = jax.scipy.linalg.cho_solve((lower, True), right)
    exact = np.linalg.solve(matrix, np.asarray(right, np.float64))
    assert error_of(found[n], exact) < 3 * error_of(lapack, exact), n


@pytest.mark.slow
@pytest.mark.parametrize("units", [300, 6])
def test_unit_scores_are_those_of_lapack(cut, eliminated, units):
  rng = np.random.default_rng(2)
  C, D = 300, 16
  gradients = rng.normal(size=(100, D))
  hessian = jnp.asarray(gradients.T @ gradients, jnp.float32)
  weight = jnp.asarray(rng.normal(size=(C, D)), jnp.float32)
  args = gram_of(C, 4000), hessian, weight, jnp.float32(0.1)
  fn = jax.jit(curvature.unit_scores, static_argnames=("units", "mesh"))
  expected = fn(*args, units=units)
  found = fn(*args, units=units, mesh=cut)
  assert error_of(found, expected) < 5e-7
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_program_does_not_grow_with_the_matrix(cut):
  """One loop body: the compiled text of twice the size is as long."""

  def length(size):
    fn = jax.jit(partial(elimination.inverse_blocks, width=1, mesh=cut))
    return len(
      fn.lower(jax.ShapeDtypeStruct((size, size), "float32")).as_text()
    )

  assert abs(length(8192) - length(4096)) < 0.01 * length(4096)


@pytest.mark.parametrize(
  "platform, devices, wanted",
  [
    ("cpu", 1, False),
    ("cpu", 8, False),
    ("gpu", 1, False),
    ("gpu", 8, True),
    ("tpu", 1, True),
    ("tpu", 8, True),
  ],
)
def test_who_eliminates(platform, devices, wanted):
  device = SimpleNamespace(platform=platform)
  grid = np.full((1, devices, 1), device)
  mesh = SimpleNamespace(devices=grid, size=devices)
  assert elimination.wanted(mesh) == wanted
  assert not elimination.wanted(None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_in_parts(dtype):
  """As a TPU computes it: as near to float64 as a product in float32.

  CPUs that multiply bfloat16 themselves add up in an order of their own: 7e-7.
  Without one of the pairs it would be 2e-6 or more.
  """
  rng = np.random.default_rng(0)
  draw = lambda n: rng.normal(size=(3, 50, n)) * np.exp(rng.normal(size=n))
  x, y = jnp.asarray(draw(24), dtype), jnp.asarray(draw(16), jnp.float32)
  equation = "btc,bte->ce"
  exact = np.einsum(equation, *(np.asarray(z, np.float64) for z in (x, y)))
  split = float32_product.in_parts(equation, x, y)
  whole = float32_product.product(equation, x, y)
  assert split.dtype == whole.dtype == jnp.float32
  assert error_of(split, exact) < 2 * error_of(whole, exact) + 1e-6
