"""Runs that devices cannot hold are refused before any work."""

import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import devices
from adapt_pruner_jax.runs import room
from tests import small

# 8.0 billion parameters.
FULL = small.LLAMA_8B


@pytest.fixture(autouse=True)
def data_sheet(monkeypatch):
  sheet = lambda device: devices.DEVICES[device.device_kind].memory
  monkeypatch.setattr(devices, "memory_of", sheet)


def check(kind, fsdp, **settings):
  recipe = Config()
  recipe.model.dtype = "bfloat16"
  for name, value in settings.items():
    section, field = name.split("__")
    setattr(getattr(recipe, section), field, value)
  mesh = sharding.make_mesh(data=8 // fsdp, fsdp=fsdp)
  room.check(recipe, FULL, 6_000_000_000, devices.meant_mesh(mesh, kind))


def test_weights():
  """16.06 GB in bfloat16."""
  with pytest.raises(UserError) as error:
    check("TPU v5e", 1)
  said = str(error.value)
  assert "the model's weights take 16.1 GB of each TPU v5e, which has" in said
  assert "16.0" in said
  assert "--config.prune.stream_layers=True" in said
  check("TPU v5e", 2)
  check("TPU v5e", 1, prune__stream_layers=True)
  check("NVIDIA H200", 1)
  check("cpu", 1)


def test_training():
  """Weights and both moments in float32 are 72 GB."""
  with pytest.raises(UserError, match=r"moments of the training take 18\.0 GB"):
    check("TPU v5e", 4, train__tokens=1000)
  check("TPU v5e", 8, train__tokens=1000)
  check("TPU v5e", 4, train__tokens=1000, train__moments="bfloat16")
  check("TPU v5e", 4, train__tokens=1000, train__lora_rank=16)
