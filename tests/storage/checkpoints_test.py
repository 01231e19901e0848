import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import checkpoints, lock, publish
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from adapt_pruner_jax.storage.fingerprint import fingerprint
from benchmarks.bucket_server import free_port

META = {
  "K": (3, 1),
  "floats": [0.1, 1 / 3, 1e-310, -0.0, 1.7976931348623157e308, 2.0**53 + 2],
  "nested": {"10": "ä", "9": None, "big": 2**70},
}


def mesh_of(devices):
  grid = np.array(jax.devices()[:devices])
  return Mesh(grid, ("x",), axis_types=(AxisType.Auto,))


def placed(mesh, leaf):
  """Cut along its first dim if that divides, else replicated."""
  cut = leaf.ndim and leaf.shape[0] % mesh.size == 0
  return NamedSharding(mesh, PartitionSpec("x") if cut else PartitionSpec())


def host_state(seed):
  """Weights in two dtypes and the optimizer's state, as numpy."""
  rng = np.random.default_rng(seed)
  params = {
    "embedding": rng.normal(size=(240, 160)).astype(np.float32),
    "layer_0": {
      "q": rng.normal(size=(16, 3, 2, 4)).astype(jnp.bfloat16),
      "gate": rng.normal(size=(16, 13)).astype(np.float32),
    },
  }
  transform = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  opt_state = jax.device_get(transform.init(params))
  moments = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype), opt_state
  )
  return {"params": params, "opt_state": moments, "step": np.int32(seed)}


def on_devices(state, devices=8):
  mesh = mesh_of(devices)
  return jax.tree.map(lambda x: jax.device_put(x, placed(mesh, x)), state)


@functools.cache
def abstract(devices=8):
  mesh = mesh_of(devices)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(mesh, x)),
    host_state(0),
  )


def assert_same(state, seed):
  """Bit for bit, and the same tree."""
  expected = host_state(seed)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for got, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
  ):
    assert got.dtype == want.dtype
    assert np.asarray(got).tobytes() == want.tobytes()


def restored(directory, devices=8, say=print):
  """(step, meta, state) or None, as a new process would see it."""
  with Checkpoints(directory, say=say) as checkpoints:
    return checkpoints.restore(lambda meta: abstract(devices))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """Steps 1 and 2; not to be changed."""
  directory = tmp_path_factory.mktemp("two") / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, META, on_devices(host_state(step)))
  return directory


@pytest.fixture
def two(two_steps, tmp_path):
  """A copy of `two_steps`."""
  return shutil.copytree(two_steps, tmp_path / "copy")


# ---- Fingerprints ------------------------------------------------------------


def reference_fingerprint(x):
  total = 0
  for i, bits in enumerate(x.reshape(-1).tolist()):
    h = (bits ^ (i * 0x9E3779B9)) % 2**32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    total += h ^ (h >> 16)
  return total % 2**32


def test_fingerprint_is_the_formula():
  x = np.random.default_rng(0).integers(0, 2**32, (3, 5, 2), dtype=np.uint32)
  expected = reference_fingerprint(x)
  assert int(fingerprint(x)) == expected
  assert int(fingerprint(x.view(np.float32))) == expected
  half = x.astype(np.uint16)
  expected = reference_fingerprint(half)
  assert int(fingerprint(half.view(jnp.bfloat16))) == expected
  for dtype in (np.uint8, bool):
    small = x.astype(dtype)
    assert int(fingerprint(small)) == reference_fingerprint(
      small.astype(np.uint8)
    )
  assert int(fingerprint(np.float32(1))) == reference_fingerprint(
    np.array([0x3F800000])
  )


def test_fingerprint_sees_every_flipped_bit_and_any_swap():
  x = np.arange(8, dtype=np.float32)
  seen = {int(fingerprint(x)), int(fingerprint(x[::-1]))}
  for bit in range(8 * 32):
    flipped = x.view(np.uint32).copy()
    flipped[bit // 32] ^= np.uint32(1 << (bit % 32))
    seen.add(int(fingerprint(flipped.view(np.float32))))
  assert len(seen) == 2 + 8 * 32


def test_fingerprint_is_the_same_on_any_mesh():
  x = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
  found = {
    int(fingerprint(jax.device_put(x, placed(mesh_of(n), x))))
    for n in (1, 2, 4, 8)
  }
  assert found == {int(fingerprint(x))}


# ---- What was saved comes back -----------------------------------------------


def test_a_state_comes_back_on_8_then_2_then_1_devices(tmp_path):
  state = on_devices(host_state(1), 8)
  for step, devices in enumerate((8, 2, 1), start=1):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(step, META, state)
    found_step, meta, state = restored(tmp_path, devices)
    assert found_step == step
    assert_same(state, 1)
    for leaf, wanted in zip(
      jax.tree.leaves(state), jax.tree.leaves(abstract(devices)), strict=True
    ):
      assert leaf.sharding == wanted.sharding
    assert meta == {**META, "K": [3, 1]}
    assert [x.hex() for x in meta["floats"]] == [
      x.hex() for x in META["floats"]
    ]


def test_meta_decides_the_shapes(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"width": 5}, {"w": jnp.arange(5.0)})
    one = mesh_of(1)

    def abstract_of(meta):
      leaf = jax.ShapeDtypeStruct((meta["width"],), jnp.float32)
      return {"w": leaf.update(sharding=placed(one, leaf))}

    _, _, state = checkpoints.restore(abstract_of)
  np.testing.assert_array_equal(state["w"], np.arange(5.0))


def test_the_state_may_be_donated_at_once(tmp_path):
  step_fn = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
  x = jax.device_put(
    np.zeros((8, 100_000), np.float32),
    NamedSharding(mesh_of(8), PartitionSpec("x")),
  )
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step in range(1, 5):
      checkpoints.save(step, {}, {"x": x})
      for _ in range(3):
        x = step_fn(x)
  for step in (4, 3, 2, 1):
    with Checkpoints(tmp_path) as checkpoints:
      tree = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
      found, _, state = checkpoints.restore(lambda meta: tree)  # noqa: B023
    assert found == step
    assert np.unique(state["x"]).tolist() == [2.0 ** (3 * (step - 1)) - 1]
    shutil.rmtree(tmp_path / str(step))


def test_only_the_newest_stay_and_the_trash_is_emptied(tmp_path):
  state = on_devices(host_state(0))
  (tmp_path / "trash" / "1").mkdir(parents=True)
  (tmp_path / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert os.listdir(tmp_path) == []
    assert checkpoints.restore(lambda meta: abstract()) is None
    for step in (1, 3, 4, 10):
      checkpoints.save(step, {}, state)
    with pytest.raises(ValueError, match="step 10 is not above 10"):
      checkpoints.save(10, {}, state)
  assert sorted(os.listdir(tmp_path)) == ["10", "4"]


# ---- Damage ------------------------------------------------------------------


def flip(path, where):
  data = bytearray(path.read_bytes())
  data[int(where * (len(data) - 1))] ^= 0x10
  path.write_bytes(data)


def shorten(path, share):
  os.truncate(path, int(share * path.stat().st_size))


DAMAGE = {
  "flip start": lambda path: flip(path, 0.02),
  "flip middle": lambda path: flip(path, 0.5),
  "flip end": lambda path: flip(path, 1.0),
  "truncate": lambda path: shorten(path, 0.6),
  "empty": lambda path: shorten(path, 0),
  "delete": lambda path: path.unlink(),
}


def kind_of(path):
  """A file's name without what is random in it."""
  name = path.parent if path.parent.name == "d" else path
  return str(name).removeprefix("2/")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_any_file_is_harmless_or_detected(two, damage):
  """Never other values; always found where it matters."""
  pristine = shutil.copytree(two / "2", two.parent / "pristine")
  files = [p.relative_to(two) for p in two.glob("2/**/*") if p.is_file()]
  assert len(files) >= 10
  detected = set()
  for name in files:
    if not (two / name).stat().st_size:
      continue
    DAMAGE[damage](two / name)
    said = []
    step, meta, state = restored(two, say=said.append)
    assert_same(state, step)
    assert meta == {**META, "K": [3, 1]}
    if step == 1:
      detected.add(kind_of(name))
      assert len(said) == 1
      assert str(two / "damaged-2") in said[0]
      shutil.rmtree(two / "damaged-2")
    else:
      assert (step, said) == (2, [])
      shutil.rmtree(two / "2")
    shutil.copytree(pristine, two / "2")
  assert detected >= {"meta/metadata", "state/manifest.ocdbt", "state/d"}
  if damage in ("flip middle", "truncate", "empty", "delete"):
    assert "state/ocdbt.process_0/d" in detected


def test_a_flipped_bit_in_the_arrays_is_named(two):
  largest = max(
    two.glob("2/state/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size
  )
  said = []
  flip(largest, 0.5)
  assert restored(two, say=said.append)[0] == 1
  assert "the checkpoint of step 2 is damaged" in said[0]
  assert "embedding are not those that were saved" in said[0]


@pytest.mark.parametrize("part", ["meta", "state", "state/d", "meta/metadata"])
def test_a_half_deleted_step_is_set_aside(two, part):
  path = two / "2" / part
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert restored(two)[0] == 1
  assert (two / "damaged-2").is_dir()


def test_a_changed_meta_does_not_match_its_digest(two):
  path = two / "2" / "meta" / "metadata"
  path.write_text(path.read_text().replace("[3, 1]", "[3, 2]"))
  said = []
  assert restored(two, say=said.append)[0] == 1
  assert "digest" in said[0]


def test_a_renamed_step_is_not_taken_for_another(two):
  (two / "2").rename(two / "5")
  assert restored(two)[0] == 1
  assert sorted(os.listdir(two)) == ["1", "damaged-5"]


def test_when_all_are_damaged_there_is_none_and_saving_goes_on(two):
  for step in (1, 2):
    shutil.rmtree(two / str(step) / "meta")
  (two / "damaged-2").mkdir()
  with Checkpoints(two) as checkpoints:
    assert checkpoints.restore(lambda meta: abstract()) is None
    assert checkpoints.steps() == []
    checkpoints.save(2, META, on_devices(host_state(2)))
  left = ["2", "damaged-1", "damaged-2", "damaged-2-2"]
  assert sorted(os.listdir(two)) == left
  assert_same(restored(two)[2], 2)


def test_another_recipe_is_not_damage(two):
  """What abstract_of refuses, or asks for, sets nothing aside."""

  def refuse(meta):
    raise UserError("another recipe")

  wider = abstract() | {"step": jax.ShapeDtypeStruct((2,), jnp.int32)}
  more = abstract() | {"extra": abstract()["step"]}
  with Checkpoints(two) as checkpoints:
    with pytest.raises(UserError, match="another recipe"):
      checkpoints.restore(refuse)
    with pytest.raises(UserError, match=r"\[\]\] for step.*\[2\]\]"):
      checkpoints.restore(lambda meta: wider)
    with pytest.raises(UserError, match="has no for extra"):
      checkpoints.restore(lambda meta: more)
  assert sorted(os.listdir(two)) == ["1", "2"]


@pytest.mark.parametrize(
  "error, raised",
  [
    (PermissionError(13, "Permission denied"), UserError),
    (OSError(5, "Input/output error"), UserError),
    (ValueError("PERMISSION_DENIED: cannot open"), UserError),
    (MemoryError(), MemoryError),
  ],
)
def test_what_cannot_be_read_now_is_not_damage(two, monkeypatch, error, raised):
  def read(*_):
    raise error

  monkeypatch.setattr(Checkpoints, "_read_state", read)
  with pytest.raises(raised):
    restored(two)
  assert sorted(os.listdir(two)) == ["1", "2"]


# ---- Disks -------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_written(two, monkeypatch):
  usage = shutil.disk_usage(two)._replace(free=1_000_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with (
    Checkpoints(two) as checkpoints,
    pytest.raises(UserError, match=r"step 3 needs 0\.0\d+ GB.* 0\.001 GB free"),
  ):
    checkpoints.save(3, META, on_devices(host_state(3)))
  assert sorted(os.listdir(two)) == ["1", "2"]


def test_a_disk_that_fills_up_during_a_save(small_disk, monkeypatch, capfd):
  directory = small_disk / "checkpoints"
  noise = np.random.default_rng(0).normal(size=500_000).astype(np.float32)
  state = {"x": jnp.asarray(noise)}
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, META, state)
    checkpoints.wait()
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free - 500_000))
    monkeypatch.setattr(publish, "require_space", lambda *_: None)
    checkpoints.save(2, META, state)
    with pytest.raises(UserError, match=r"No space left.*step 1 is intact"):
      checkpoints.wait()
    assert checkpoints.steps() == [1]
    filler.unlink()
    checkpoints.save(2, META, state)  # goes on once there is room
  assert "Traceback" not in capfd.readouterr().err
  tree = {"x": jax.ShapeDtypeStruct((500_000,), jnp.float32)}
  with Checkpoints(directory) as checkpoints:
    step, _, found = checkpoints.restore(lambda meta: tree)
  assert step == 2
  np.testing.assert_array_equal(found["x"], noise)


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_a_full_disk_is_a_user_error(two, monkeypatch, when):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  with Checkpoints(two) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, when, full)
      with pytest.raises(UserError, match=r"No space left.*step 2 is intact"):
        checkpoints.save(3, META, on_devices(host_state(3)))
    assert checkpoints.steps() == [1, 2]


def test_a_process_that_fails_alone_does_not_wait(tmp_path, monkeypatch):
  """The others, which a save waits for, wait for it."""
  saved = Checkpoints(tmp_path)
  comes = threading.Event()
  monkeypatch.setattr(saved._manager, "wait_until_finished", comes.wait)
  monkeypatch.setattr(checkpoints, "PATIENCE", 0.1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="alone"), saved:
    raise UserError("alone")
  monkeypatch.setattr(jax, "process_count", lambda: 1)
  comes.set()


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    Checkpoints(tmp_path / "file" / "checkpoints")


# ---- Processes ---------------------------------------------------------------

SAVE_BACK_TO_BACK = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import checkpoints_test as t
with t.Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
  first = (checkpoints.steps() or [0])[-1] + 1
  for step in range(first, first + 10_000):
    checkpoints.save(step, t.META, t.on_devices(t.host_state(step), 1))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_saving_back_to_back(tmp_path, subprocess_env):
  here = os.path.dirname(__file__)
  command = [sys.executable, "-c", SAVE_BACK_TO_BACK, str(tmp_path), here]
  rng = random.Random(0)
  newest = 0
  for _ in range(3):
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, env=subprocess_env(1), text=True
    )
    process.stdout.readline()
    time.sleep(rng.uniform(0.05, 0.6))
    process.send_signal(signal.SIGKILL)
    started = [int(line) for line in process.stdout if line.endswith("\n")]
    process.wait()
    step, meta, state = restored(tmp_path, 1)
    assert_same(state, step)
    assert meta == {**META, "K": [3, 1]}
    # The save before the last one that had started was on disk.
    assert step >= max([newest, *[s - 1 for s in started]])
    newest = step
    assert not list(tmp_path.glob("damaged*"))
  assert newest > 3


TWO_PROCESSES = """
import pathlib, sys
index, port, directory, here = sys.argv[1:]
sys.path.insert(0, here)
import jax
jax.distributed.initialize(
  f"127.0.0.1:{port}",
  2,
  int(index),
  heartbeat_timeout_seconds=10,
  shutdown_timeout_seconds=10,
)
import checkpoints_test as t
t.two_processes(pathlib.Path(directory))
print("done", flush=True)
"""


def global_state(seed):
  """`host_state` over the devices of all processes."""
  return jax.tree.map(
    lambda x, a: jax.make_array_from_callback(
      x.shape, a.sharding, lambda index: x[index]
    ),
    host_state(seed),
    abstract(4),
  )


def assert_same_shards(state, seed):
  for got, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(host_state(seed)), strict=True
  ):
    for shard in got.addressable_shards:
      assert np.asarray(shard.data).tobytes() == want[shard.index].tobytes()


def two_processes(directory):
  """Run by both; step 1 is there, saved by one process with 8 devices."""
  writer = agreement.is_writer()
  assert writer == (jax.process_index() == 0)
  assert not agreement.all_agree(writer)
  run = directory.parent / "run"
  with lock.lock(run):
    if writer:  # a second run in the same directory, refused to both
      with pytest.raises(UserError, match="in use"):
        lock._take(run)
  said = []
  with Checkpoints(directory, say=said.append) as checkpoints:
    step, _, state = checkpoints.restore(lambda meta: abstract(4))
    assert step == 1
    assert_same_shards(state, 1)
    for step in (2, 3):
      checkpoints.save(step, META, global_state(step))
    checkpoints.wait()
    # Damage in what only process 1 wrote.
    if writer:
      parts = (directory / "3/state/ocdbt.process_1/d").iterdir()
      flip(max(parts, key=lambda path: path.stat().st_size), 0.5)
    step, _, state = checkpoints.restore(lambda meta: abstract(4))
    assert step == 2
    assert_same_shards(state, 2)
    assert len(said) == writer
    # Damage that only process 1 sees.
    read = Checkpoints._read_state
    if not writer:
      checkpoints._read_state = lambda *_: json.loads("{")
    step, _, state = checkpoints.restore(lambda meta: abstract(4)) or (0, 0, 0)
    assert step == 0
    assert len(said) == 2 * writer
    checkpoints._read_state = functools.partial(read, checkpoints)
    # No room, as only process 0 can tell.
    usage = shutil.disk_usage(directory)._replace(free=0)
    shutil.disk_usage, real = lambda _: usage, shutil.disk_usage
    with pytest.raises(UserError, match="needs" if writer else "process 0"):
      checkpoints.save(4, META, global_state(4))
    shutil.disk_usage = real
    checkpoints.save(5, META, global_state(5))


@pytest.mark.slow
def test_two_processes(tmp_path, subprocess_env):
  directory = tmp_path / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, META, on_devices(host_state(1), 8))
  arguments = [
    str(free_port()),
    str(directory),
    os.path.dirname(__file__),
  ]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, str(index), *arguments],
      env=subprocess_env(2),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in (0, 1)
  ]
  try:
    outputs = [p.communicate(timeout=180)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
  for output in outputs:
    assert output.endswith("done\n"), output
  step, _, state = restored(directory, 1)  # by one process with one device
  assert step == 5
  assert_same(state, 5)
