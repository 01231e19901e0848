"""Small programs by the real TPU compiler, which needs no TPU.

`pip install libtpu` is half a gigabyte, so it is no part of the tests' extra:
without it these are skipped, except where CI installs it (`.[tpu]`).
"""

import dataclasses
import itertools
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
    pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
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
  runs = (stacking.Run(0, 2, 2, 384), stacking.Run(2, 6, 2, 384))
  trained, state = step.abstract_state(CONFIG, settings, mesh, 0, runs)
  teacher = None
  if settings.distill_alpha:
    whole = dataclasses.replace(
      CONFIG, kv_groups=(2,) * 6, ffn_widths=(384,) * 6
    )
    one = (stacking.Run(0, 6, 2, 384),)
    teacher = whole, step.abstract_state(whole, settings, mesh, 0, one)[0]
  given = CONFIG, settings, lambda _: 1.0, mesh
  made = step.make_step(*given, teacher=teacher, runs=runs)
  return made.lower(trained, state, step.abstract_batch(B, T, mesh))


@pytest.mark.slow
def test_a_train_step(mesh):
  settings = Train(dtype="bfloat16", remat="full")
  check(lower_step(mesh, settings).compile(), 12e6, 800)


@pytest.mark.slow
def test_streams_in_front_of_layers_wait_in_the_hosts_memory(mesh):
  settings = Train(dtype="bfloat16", remat="offload")
  found = lower_step(mesh, settings).compile().memory_analysis()
  streams = 2 * CONFIG.num_layers * B * T * CONFIG.hidden_size / mesh.size
  assert found.host_temp_size_in_bytes >= streams


@pytest.mark.slow
def test_a_distilled_step(mesh):
  settings = Train(dtype="bfloat16", remat="full", distill_alpha=0.5)
  check(lower_step(mesh, settings).compile(), 13e6, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("hosted", [False, True])
def test_a_scoring_pass(mesh, monkeypatch, hosted):
  """Nothing of it is there twice, to overlap two layers, and what layers are
  given lies in the host's memory if it shall."""
  monkeypatch.setattr(passes, "a_pass", lambda *_: passes.Pass(3, hosted))
  config = Config()
  config.prune.method, config.model.dtype = "adapt", "bfloat16"
  config.calibration.samples, config.calibration.seq_len = 3 * B, T
  config.calibration.batch = B
  lowered, shape, _ = memory.lower_scoring(
    config, CONFIG, mesh, jax.numpy.dtype("bfloat16")
  )
  assert shape == (3, B, T)
  compiled = lowered.compile()
  check(compiled, 20e6, 800)
  given = 2 * CONFIG.num_layers * 3 * B * T * CONFIG.hidden_size * 2 / mesh.size
  in_host = compiled.memory_analysis().host_temp_size_in_bytes
  assert given * hosted <= in_host <= 1.1 * given * hosted
  kernels = re.findall(r"%(splash_\w+)\S* = ", compiled.as_text())
  assert len(kernels) == 3
