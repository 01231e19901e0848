"""Small programs by the real TPU compiler, which needs no TPU.

`pip install libtpu` is half a gigabyte, so it is no part of the tests' extra:
launch/test.sh installs it (`.[tpu]`) where there is a wheel. Without it these
are skipped, but in CI (CI=true) they fail.
"""

import dataclasses
import itertools
import os
import re
import threading

import jax
import pytest

from adapt_pruner_jax.config import Config, Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.planning import arrays, compiling, memory
from adapt_pruner_jax.pruning import passes
from adapt_pruner_jax.training import stacking, step
from tests import small

# Primes that occur nowhere else; B is a multiple of the four chips.
B, T, V = 4 * 5, 157, 1031
CONFIG = dataclasses.replace(
  small.CONFIG,
  vocab_size=V,
  hidden_size=128,
  head_dim=64,
  queries_per_group=2,
  kv_groups=(2, 2, 1, 1, 2, 2),
  ffn_widths=(384, 384, 250, 250, 300, 256),
)


@pytest.fixture(scope="module")
def mesh():
  if not compiling.has_compiler():
    reason = "libtpu is not installed: pip install -e '.[tpu]'"
    if os.environ.get("CI") == "true":
      pytest.fail(reason)
    pytest.skip(reason)
  slice_ = compiling.devices_of("v5e:2x2")
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # none could read it
  yield sharding.make_mesh(devices=slice_)
  jax.config.update("jax_enable_compilation_cache", before)


def check(compiled, most_bytes, most_computations):
  """Memory of a chip, how much program there is, and shapes that must not be:
  scores of a row, logits of all tokens."""
  found = compiled.memory_analysis()
  assert found.temp_size_in_bytes < most_bytes
  text = compiled.as_text()
  assert len(re.findall(r"^[%\w].*\{$", text, re.M)) < most_computations
  shapes = set(re.findall(r"\[([\d,]+)\]", text))
  assert any(str(T) in shape.split(",") for shape in shapes)
  for shape in shapes:
    sizes = [int(n) for n in shape.split(",") if n]
    assert sizes.count(T) < 2, shape
    assert not (T in sizes and V in sizes), shape


def test_memory_is_known_before_there_is_code(mesh):
  """What a plan reads of the compiler is what it says at its end."""
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  given = jax.ShapeDtypeStruct((2048, 1024), "float32", sharding=where)
  lowered = jax.jit(lambda x: jax.nn.relu(x @ (x.T @ x))).lower(given)
  whole = arrays.temporary(lowered.compile())
  early = compiling.temporary(lowered, given, mesh)
  assert early == pytest.approx(whole, rel=0.01, abs=2**12)
  for thread in threading.enumerate():  # a plan would just end its process
    if thread.name == compiling.THREAD:
      thread.join(120)


def test_neighbours_in_the_mesh_are_neighbours_on_the_torus(mesh):
  for axis in ("fsdp", "tensor"):
    shape = {"fsdp": 1, "tensor": 1} | {axis: mesh.size}
    line = sharding.make_mesh(**shape, devices=mesh.devices.ravel())
    at = [device.coords for device in line.devices.ravel()]
    for one, next_ in itertools.pairwise([*at, at[0]]):
      assert sum(abs(a - b) for a, b in zip(one, next_, strict=True)) == 1


def lower_step(mesh, settings):
  runs = (stacking.Run(0, CONFIG.num_layers, 2, 384),)
  trained, state = step.abstract_state(CONFIG, settings, mesh, 0, runs)
  teacher = None
  if settings.distill_alpha:
    whole = dataclasses.replace(
      CONFIG, kv_groups=(2,) * 6, ffn_widths=(384,) * 6
    )
    teacher = whole, step.abstract_state(whole, settings, mesh, 0, runs)[0]
  given = CONFIG, settings, lambda _: 1.0, mesh
  made = step.make_step(*given, teacher=teacher, runs=runs)
  return made.lower(trained, state, step.abstract_batch(B, T, mesh))


@pytest.mark.slow
def test_a_train_step(mesh):
  """Streams in front of layers wait in the host's memory."""
  settings = Train(dtype="bfloat16", remat="offload")
  compiled = lower_step(mesh, settings).compile()
  check(compiled, 14e6, 550)
  streams = 2 * CONFIG.num_layers * B * T * CONFIG.hidden_size / mesh.size
  assert compiled.memory_analysis().host_temp_size_in_bytes >= streams


@pytest.mark.slow
def test_a_distilled_step(mesh):
  settings = Train(dtype="bfloat16", remat="full", distill_alpha=0.5)
  check(lower_step(mesh, settings).compile(), 13e6, 450)


@pytest.mark.slow
def test_a_scoring_pass(mesh, monkeypatch):
  """Nothing of it is there twice, to overlap two layers; what layers are given,
  and the sums that passes hand on, lie in the host's memory."""
  monkeypatch.setattr(passes, "a_pass", lambda *_: passes.Pass(3, hosted=True))
  config = Config()
  config.prune.method, config.model.dtype = "curvature", "bfloat16"
  config.calibration.samples, config.calibration.seq_len = 6 * B, T
  config.calibration.batch = B
  kind = jax.numpy.dtype("bfloat16")
  lowered, _, shape, before = memory.lower_scoring(config, CONFIG, mesh, kind)
  assert shape == (3, B, T)
  compiled = lowered.compile()
  check(compiled, 8e6, 300)
  found = compiled.memory_analysis()
  given = 2 * CONFIG.num_layers * 3 * B * T * CONFIG.hidden_size * 2 / mesh.size
  assert given <= found.host_temp_size_in_bytes <= 1.1 * given
  sums = sum(x.size * 4 for x in jax.tree.leaves(before.of_halves)) / mesh.size
  assert arrays.size(before) < 0.01 * sums
  assert sums <= found.host_argument_size_in_bytes <= 1.1 * sums
  assert found.host_alias_size_in_bytes >= sums  # added to where they lie
  kernels = re.findall(r"%(splash_\w+)\S* = ", compiled.as_text())
  assert len(kernels) == 3
