"""What a run says of the attention that it takes."""

import dataclasses

import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.models import devices
from adapt_pruner_jax.runs import attention
from tests import small


@pytest.fixture
def recipe():
  found = Config()
  found.model.dtype = found.train.dtype = "bfloat16"
  found.calibration.batch = found.data.batch = 8
  found.calibration.seq_len = found.data.seq_len = 2048
  found.train.tokens = 1000
  return found


def taken(recipe, kind, **changes):
  config = dataclasses.replace(small.CONFIG, **changes)
  mesh = devices.meant_mesh(small.one_device(), kind)
  return attention.taken(recipe, config, mesh)


def test_by_device(recipe):
  found = {kind: taken(recipe, kind) for kind in ("TPU v5e", "cpu")}
  assert found["TPU v5e"] == "pruning by splash, training by splash"
  assert found["cpu"] == "pruning by blocks, training by blocks"
  recipe.train.tokens, recipe.calibration.seq_len = 0, 100
  said = taken(recipe, "TPU v5e")
  assert said.startswith("pruning by plain (splash wants rows of at least 128")


def test_windows_that_pruning_has_as_data(recipe):
  said = taken(recipe, "TPU v5e", window=(0, 512, 0))
  assert said == (
    "pruning by blocks (splash must know the window when it is compiled), "
    "training by splash"
  )


def test_what_was_asked_for(recipe):
  recipe.prune.attention, recipe.train.attention = "plain", "cudnn"
  said = taken(recipe, "TPU v5e")
  assert said.startswith("pruning by plain, training by blocks (cudnn is for")
