"""Model directories with random damage: a correct load or a UserError."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import model_config

FAST = settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 100),
  st.sampled_from([10**30, -(2**63), 0.5, 1e400, float("nan")]),
  st.sampled_from(["", "llama", "silu", "float32", "../../etc/passwd", "\0"]),
  st.lists(st.integers(-1, 9), max_size=4),
  st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]),
    st.one_of(st.text(max_size=6), st.integers(-2, 9), st.none()),
    max_size=3,
  ),
)


@pytest.fixture
def folder(small_model, tmp_path):
  """A copy of the model whose files are single."""
  return shutil.copytree(small_model, tmp_path / "fuzzed")


def opens(folder):
  """Whether the directory loads; if it does, as what its config says."""
  try:
    config, params = load.load(str(folder))
  except UserError as error:
    said = str(error)
  else:
    shapes = jax.tree.map(lambda x: x.shape, params)
    expected = model_config.abstract_params(config, np.float32)
    assert shapes == jax.tree.map(lambda x: x.shape, expected)
    return True
  assert len(said.splitlines()) == 1
  return False


@FAST
@given(data=st.data())
def test_config_json(folder, small_model, data):
  config = json.loads((small_model / "config.json").read_text())
  names = st.sampled_from([*sorted(config), "rope_scaling", "sliding_window"])
  for name in data.draw(st.lists(names, min_size=1, max_size=3)):
    if data.draw(st.booleans()):
      config[name] = data.draw(VALUES)
    else:
      config.pop(name, None)
  (folder / "config.json").write_text(json.dumps(config))
  opens(folder)


@FAST
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_bytes_of_config_json(folder, small_model, place, byte, cut):
  content = bytearray((small_model / "config.json").read_bytes())
  at = min(int(place * len(content)), len(content) - 2)  # the "}"
  content[at] = byte
  if cut:
    del content[at:]
  (folder / "config.json").write_bytes(content)
  opened = opens(folder)
  assert not (cut and opened)


@FAST
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_header_of_safetensors(folder, small_model, place, byte, cut):
  content = bytearray((small_model / "model.safetensors").read_bytes())
  (length,) = struct.unpack("<Q", content[:8])
  at = int(place * (length + 7))
  content[at] = byte
  if cut:
    del content[at:]
  (folder / "model.safetensors").write_bytes(content)
  opened = opens(folder)
  assert not (cut and opened)


@pytest.fixture
def sharded(folder):
  """The model in two files and an index; a third beside the folder."""
  weights = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  save_file(weights, folder.parent / "outside.safetensors")
  where = {}
  for number in (1, 2):
    file = f"model-{number}.safetensors"
    names = sorted(weights)[number - 1 :: 2]
    save_file({n: weights[n] for n in names}, folder / file)
    where |= dict.fromkeys(names, file)
  return folder, where


@FAST
@given(data=st.data())
def test_index_json(sharded, data):
  folder, where = sharded
  files = st.sampled_from(
    [
      "model-1.safetensors",
      "model-2.safetensors",
      "../outside.safetensors",
      str(folder.parent / "outside.safetensors"),
      "..",
      "",
      "model-1.safetensors/",
      "config.json",
      "no\0thing",
      7,
      None,
    ]
  )
  names = st.sampled_from([*sorted(where), "extra"])
  changes = data.draw(st.dictionaries(names, files, max_size=3))
  changed = where | changes
  for name in data.draw(st.sets(st.sampled_from(sorted(where)), max_size=1)):
    del changed[name]
  index = {"metadata": {}, "weight_map": changed}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  if opens(folder):
    # Whatever else the index says, tensors are where it says.
    assert all(where[name] == file for name, file in changed.items())
