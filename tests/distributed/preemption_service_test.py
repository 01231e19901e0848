"""Why `stopping` does not ask JAX's preemption service: what it would hear.

docs/faults.md gives these reasons. Where one of these tests fails, JAX or Orbax
has changed, and the reason is gone.
"""

import subprocess
import sys
import textwrap

import pytest

from benchmarks.bucket_server import free_port

pytestmark = pytest.mark.slow
BEGIN = """
  import os, signal, tempfile, time
  import jax
  from jax.experimental import multihost_utils

  jax.distributed.initialize("127.0.0.1:{port}", 1, 0)
  reached = multihost_utils.reached_preemption_sync_point
  reached(100)  # the moments of a run, which has had a hundred

  def preempted():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)
    return [n for n in (*range(1, 10), *range(101, 110)) if reached(n)]
"""
IN_ORBAX = """
  import numpy as np
  import orbax.checkpoint as ocp

  manager = ocp.CheckpointManager(tempfile.mkdtemp())
  state = ocp.args.StandardSave({"a": np.zeros(3)})
  manager.save(1, args=state, force=True)  # train step 1
  manager.wait_until_finished()
  print("found", preempted())
"""
TWICE = """
  first = preempted()
  reached(102)
  print("found", first, preempted())
"""
IN_PYTHON = """
  signal.signal(signal.SIGTERM, lambda *_: print("found", end=" "))
  print(preempted())
"""


@pytest.mark.parametrize(
  ("script", "found"),
  [
    # It is told the number of each checkpoint: then it says yes at moment 2.
    (IN_ORBAX, "[2]"),
    # Once it has said yes, at one number, it hears of nothing more.
    (TWICE, "[101] [101]"),
    # What Python handles, as it has to for Ctrl-C, it does not hear of.
    (IN_PYTHON, "[]"),
  ],
  ids=["Orbax", "twice", "Python"],
)
def test_what_it_says(script, found, process_env):
  port = str(free_port())
  program = textwrap.dedent(BEGIN).replace("{port}", port)
  done = subprocess.run(
    [sys.executable, "-c", program + textwrap.dedent(script)],
    env=process_env(1),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == f"found {found}"
