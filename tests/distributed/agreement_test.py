"""Four processes over loopback that do not see the same."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from adapt_pruner_jax.errors import EXIT_ERROR, EXIT_STOPPED
from benchmarks.bucket_server import free_port
from tests.distributed import processes_test
from tests.small_runs import ROOT, finish, flags_of, recipe

pytestmark = pytest.mark.slow
N = 4


@pytest.fixture
def four(process_env, tmp_path):
  """`four(script, arguments_of)` starts all; killed at the end."""
  started = []

  def begin(script, arguments_of, env=()):
    port = free_port()
    env = os.environ | processes_test.fast(process_env(1)) | dict(env)
    begin.outputs = [tmp_path / f"{me}.out" for me in range(N)]
    for me in range(N):
      with open(begin.outputs[me], "a") as output:
        started.append(
          subprocess.Popen(
            [sys.executable, "-m", script, *arguments_of(port, me)],
            env=env,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
          )
        )
    return started[-N:]

  yield begin
  for process in started:
    process.kill()


def test_one_decides_and_all_stop(four):
  arguments = lambda port, me: (str(port), str(N), str(me))
  running = four("tests.distributed.agreement_peer", arguments)
  found = []
  for process, output in zip(running, four.outputs, strict=True):
    assert process.wait(300) == 0, output.read_text()
    *_, line = (x for x in output.read_text().splitlines() if "found " in x)
    found.append(json.loads(line.partition("found ")[2]))
  for other in found[1:]:
    assert other.pop("refused") == "UserError: process 0: no such file"
    assert other == {k: v for k, v in found[0].items() if k != "refused"}
  got = found[0]
  assert got["scores"] == np.array([1 / 3, np.pi]).tobytes().hex()
  assert got["masks"] == [[True, True]]
  assert got["numbers"] == [2**40, 0.1]
  assert got["same"] == {"words": "é", "null": None}
  assert got["decided"] == {"me": 0}
  assert got["refused"] == "UserError: no such file"
  assert got["stopped"] == "StoppedError: asked"
  start = "UserError: behind stage 1, process 2, 3 has another recipe, model"
  assert got["differs"].startswith(f"{start} than process 0")
  assert got["step"] > 20


def of_run(config, work):
  def arguments(port, me):
    flags = f"--coordinator=127.0.0.1:{port} --num_processes={N}"
    return [
      "run",
      *flags_of(config, work),
      *flags.split(),
      f"--process_id={me}",
    ]

  return arguments


def test_what_one_of_four_sees_changes_nothing(
  small_model, tmp_path, process_env, four
):
  """All of `faulty.py`'s faults at once: the result is that of one process."""
  config = recipe(small_model, stages=1, tokens=16 * 256, refit="2")
  work, faulty = tmp_path / "work", "tests.distributed.faulty"
  for moment in (
    (work / "pruning.json").exists,
    lambda: processes_test.trained(work) >= 5,
  ):
    running = four(faulty, of_run(config, work))
    wait_until(moment, running)
    running[2].send_signal(signal.SIGTERM)  # not to process 0
    for process, output in zip(running, four.outputs, strict=True):
      assert process.wait(300) == EXIT_STOPPED, output.read_text()
  running = four(faulty, of_run(config, work))
  for process, output in zip(running, four.outputs, strict=True):
    assert process.wait(600) == 0, output.read_text()
  assert "continuing at" in four.outputs[0].read_text()
  for me, fault in ((1, "another score"), (3, "late")):
    assert f"fault: {fault}" in four.outputs[me].read_text()
  one = tmp_path / "one"
  finish(config, one, processes_test.fast(process_env(1)))
  processes_test.assert_same_result(work, one)


def wait_until(moment, running):
  while not moment():
    assert all(process.poll() is None for process in running)
    time.sleep(0.05)


def test_another_recipe_or_version_is_named(small_model, tmp_path, four):
  """On all processes, in one line, before any work: those with other recipes
  would wait for each other in other places."""
  config = recipe(small_model)
  arguments = of_run(config, tmp_path / "work")
  more = {
    2: ["--config.train.tokens=256", "--config.eval.answers=self"],
    3: [f"--workdir={tmp_path / 'elsewhere'}"],
  }
  other = lambda port, me: [*arguments(port, me), *more.get(me, [])]
  running = four("tests.distributed.faulty", other, {"FAULTS": "version"})
  for process, output in zip(running, four.outputs, strict=True):
    assert process.wait(300) == EXIT_ERROR, output.read_text()
    last = output.read_text().splitlines()[-1]
    who = "error: at the start, process 1, 2, 3 has another"
    what = "versions, recipe, --workdir"
    assert last.startswith(f"{who} {what} than process 0: ")
  assert not (tmp_path / "work" / "config.json").exists()
