"""A process that is alive for JAX, whose Python no longer runs."""

import signal
import subprocess
import sys

import pytest

from adapt_pruner_jax.errors import EXIT_PEER
from benchmarks.bucket_server import free_port

pytestmark = pytest.mark.slow
# A call that does not let go of Python's lock is what a deadlock looks like.
PROGRAM = """
import ctypes, sys, time
from adapt_pruner_jax.distributed import processes

processes.HEARTBEAT, processes.STUCK = 4, 6
processes.connect("127.0.0.1:{port}", 2, int(sys.argv[1]), 60)
processes.meet()
time.sleep(1)
if sys.argv[1] == "1":
  ctypes.PyDLL(None).sleep(1000)
processes.meet()
"""


def test_ends_itself_and_is_missed(process_env):
  program = PROGRAM.replace("{port}", str(free_port()))
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(me)],
      env=process_env(1),
      stderr=subprocess.PIPE,
      text=True,
    )
    for me in range(2)
  ]
  try:
    said = [process.communicate(timeout=120)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  assert running[1].returncode == 1, said[1]
  assert "Timeout (0:00:06)!" in said[1]
  assert 'File "<string>", line 10 in <module>' in said[1]
  if running[0].returncode == EXIT_PEER:
    assert said[0].splitlines()[-1].startswith("error: process 1 is gone")
  else:  # JAX was faster
    assert running[0].returncode == -signal.SIGABRT


INTERRUPTED = """
import sys, time
from adapt_pruner_jax import cli
from adapt_pruner_jax.distributed import processes

def work(*_):
  processes.HEARTBEAT = 4
  processes.connect("127.0.0.1:{port}", 2, int(sys.argv[1]), 60)
  processes.meet()
  if sys.argv[1] == "1":
    raise KeyboardInterrupt
  time.sleep(1000)

cli.COMMANDS["run"] = work
cli.main(["run"])
"""


def test_ctrl_c_on_one_process_ends_both(process_env):
  """The regular end would wait for the other one for minutes."""
  program = INTERRUPTED.replace("{port}", str(free_port()))
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(me)],
      env=process_env(1),
      stderr=subprocess.PIPE,
      text=True,
    )
    for me in range(2)
  ]
  try:
    said = [process.communicate(timeout=120)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  assert running[1].returncode == 130, said[1]
  assert "interrupted" in said[1].splitlines()
  assert running[0].returncode in (EXIT_PEER, -signal.SIGABRT), said[0]
