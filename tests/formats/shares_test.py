"""Many processes read a model, each its share, and write it together."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import load, parameters, shares, tensors
from adapt_pruner_jax.models import axes
from tests.distributed.agreement_test import N, four  # noqa: F401, a fixture
from tests.formats import zoo

FAMILIES = ("llama", "gpt_neox", "granitemoe", "olmoe")


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
  return zoo.make(tmp_path_factory.mktemp("zoo"), FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_of_the_file(animals, name):
  """Fused or by expert, in one tensor or in many; each is read once."""
  _, tree = load.stored(animals[name].path)
  for stored in jax.tree.leaves(tree):
    whole = tensors.own_rows(stored._tensor(), stored.place)
    number = len(whole)
    cuts = [0, number // 3, number // 3 + 1, number]
    parts = [stored.rows(a, b) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_device_reads_an_eighth(small_model, monkeypatch):
  """As eight processes would; all together read the file once."""
  # Not in the order of their numbers, as on a torus.
  mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=jax.devices()[::-1])
  _, tree = load.stored(small_model)
  rows, read = parameters.Stored.rows, []

  def counted(stored, start, stop):
    found = rows(stored, start, stop)
    read.append(found.nbytes)
    return found

  monkeypatch.setattr(parameters.Stored, "rows", counted)
  for name in ("q", "down"):
    stored = tree["layer_1"][name]
    shape = axes.shape(name, stored.sizes)
    read.clear()
    array = shares.place(stored, shape, mesh)
    assert array.sharding == sharding.param_sharding(name, shape, mesh)
    np.testing.assert_array_equal(array, np.asarray(stored))
    assert sum(read) == math.prod(shape) * 4
    assert len(read) == 8
    assert max(read) == sum(read) // 8


@pytest.mark.slow
def test_four_processes(animals, four, tmp_path):  # noqa: F811
  """Each reads a quarter; only process 0 is sent anything, each array once."""
  model, out = animals["llama"].path, tmp_path / "out"
  arguments = lambda port, me: [str(x) for x in (port, N, me, model, out)]
  running = four("tests.formats.shares_peer", arguments)
  found = []
  for process, output in zip(running, four.outputs, strict=True):
    assert process.wait(300) == 0, output.read_text()
    *_, line = (x for x in output.read_text().splitlines() if "found " in x)
    found.append(json.loads(line.partition("found ")[2]))
  old = load_file(model / "model.safetensors")
  new = load_file(out / "model.safetensors")
  assert old.keys() == new.keys()
  for name, array in old.items():
    np.testing.assert_array_equal(new[name], array, err_msg=name)
  size = sum(array.nbytes for array in old.values())
  assert [f["received"] for f in found] == [size, 0, 0, 0]
  for process in found:
    assert process["read"] == pytest.approx(size / N, rel=0.02)
