"""Many processes read a model, each its share, and write it together."""

import functools
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.formats.hf import (
  cut_vocabulary,
  load,
  parameters,
  shares,
  tensors,
)
from adapt_pruner_jax.models import axes
from tests.distributed.agreement_test import N, four  # noqa: F401, a fixture
from tests.formats import zoo

FAMILIES = ("llama", "gpt_neox", "granitemoe", "olmoe", "gpt_oss")
BLOCK = [16, 8]
COMPUTED = ("eight_bits", "q8_0", "cut")  # rows that are no part of a file


@pytest.fixture(scope="module")
def computed(tmp_path_factory, small_model):
  """`computed(name)`: the model in this form, made once."""
  root = tmp_path_factory.mktemp("computed")

  @functools.cache
  def make(name):
    path = root / name
    if name == "eight_bits":
      in_eight_bits(small_model, path)
    elif name == "cut":
      tied = load.read_config(small_model).tied
      cut_vocabulary.write(small_model, path, np.arange(0, 300, 3), {}, tied)
    else:
      path = path.with_suffix(".gguf")
      writer.write(*load.load(small_model), path, kind=name)
    return path

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ADAPT_PRUNER_CACHE", str(root / "cache"))
    yield make


def in_eight_bits(source, folder):
  """A copy with a scale for each block of the layers' matrices."""
  shutil.copytree(source, folder)
  stored, rng = load_file(source / "model.safetensors"), np.random.default_rng()
  for name in [n for n in stored if n.endswith("_proj.weight")]:
    stored[name] = stored[name].astype(jnp.float8_e4m3fn)
    grid = [-(-n // b) for n, b in zip(stored[name].shape, BLOCK, strict=True)]
    stored[f"{name}_scale_inv"] = rng.random(grid, np.float32)
  save_file(stored, folder / "model.safetensors")
  quantization = {"quant_method": "fp8", "weight_block_size": BLOCK}
  zoo.rewrite_config(folder, quantization_config=quantization)


@pytest.mark.parametrize(
  "name",
  [zoo.slow_if(n, (*FAMILIES, "q8_0")) for n in (*COMPUTED, *FAMILIES)],
)
def test_rows_are_those_of_the_file(name, computed, request):
  """Fused or by expert, in one tensor or in many, computed or as they are."""
  if name in FAMILIES:
    path = request.getfixturevalue("animals")[name].path
  else:
    path = computed(name)
  _, tree = load.stored(path)
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
def test_four_processes(animals, computed, four, tmp_path):  # noqa: F811
  """Each reads a quarter; only process 0 is sent anything, each array once."""
  model, out = animals["llama"].path, tmp_path / "out"
  read = [model, *map(computed, COMPUTED)]
  arguments = lambda port, me: [str(x) for x in (port, N, me, out, *read)]
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
  for path in read:
    each = [process["read"][str(path)] for process in found]
    # Blocks of a scale and heads are read whole: both are large here.
    more = 1.02 if path == model else 1.2
    assert max(each) < sum(each) / N * more, (path, each)
    assert sum(each) < whole_of(path) * more, (path, each)


def whole_of(path):
  """Bytes of a model's files."""
  if path.name == "cut":
    path = cut_vocabulary.source_of(path)
  files = [path] if path.is_file() else path.glob("*.safetensors")
  return sum(file.stat().st_size for file in files)
