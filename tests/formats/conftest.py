"""What the tests of formats share."""

import jax
import pytest

from adapt_pruner_jax.formats.hf import reopen
from tests.formats import zoo


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
  """The models of `zoo.CASES`, each made once."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  return zoo.Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def small_programs():
  """Compiles single operations, which models share, not whole layers."""
  whole, reopen._layer = reopen._layer, reopen._layer.__wrapped__
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  reopen._layer = whole
