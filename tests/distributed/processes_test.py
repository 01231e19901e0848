"""Two processes over loopback: faults of each, and the result of one process.

Each has four devices; the directory is one that both see.
"""

import dataclasses
import json
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax.config import Ranking
from adapt_pruner_jax.errors import EXIT_ERROR, EXIT_PEER, EXIT_STOPPED
from benchmarks.bucket_server import free_port
from tests.small_runs import ROOT, finish, output, recipe, start

pytestmark = pytest.mark.slow


@pytest.fixture
def two(small_model, tmp_path, process_env):
  """`two()` starts both, with more flags; killed at the end.

  Each has so many `devices` and runs `config`, else `config_of` the model, in
  the directory `work`; relative paths of the second are in `cwd`.
  """
  started = []

  def begin(*both, cwd=ROOT, devices=4, config=None, work=tmp_path / "two"):
    work.mkdir(exist_ok=True)
    config = config or config_of(small_model)
    env = fast(process_env(devices))
    address = f"--coordinator=127.0.0.1:{free_port()}"
    flags = (address, "--num_processes=2", *both)
    processes = [
      start(config, work, env, *flags, f"--process_id={number}", cwd=where)
      for number, where in enumerate((ROOT, cwd))
    ]
    started.extend(processes)
    return processes

  begin.work = tmp_path / "two"
  yield begin
  for process in started:
    process.kill()


def fast(env):
  """Compiles without optimizing.

  And without JAX's cache, which only process 0 would find something in: Gloo
  lets it wait for the other one for 30 s only.
  """
  flag = " --xla_backend_optimization_level=0"
  return env | {
    "XLA_FLAGS": env["XLA_FLAGS"] + flag,
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }


def config_of(model):
  return recipe(model, stages=2, tokens=24 * 256)


def said(work, number):
  return output(work, f"={number}")


def wait_until(moment, work, processes):
  while not moment():
    for number, process in enumerate(processes):
      assert process.poll() is None, said(work, number)
    time.sleep(0.02)


def assert_ended(process, work, number, gone):
  """By itself, soon: with our line, or by JAX where that is faster."""
  code = process.wait(600)
  text = said(work, number)
  assert code in (EXIT_PEER, -signal.SIGABRT), text
  if code == EXIT_PEER:
    last = text.splitlines()[-1]
    assert last.startswith(f"error: process {gone} is gone")
  assert "Traceback" not in text


def trained(work):
  """Rows of train steps."""
  file = work / "metrics.jsonl"
  return file.read_text().count('"train"') if file.exists() else 0


def assert_same_result(work, one):
  got, want = (
    json.loads((path / "summary.json").read_text()) for path in (work, one)
  )
  assert got["params_after"] == want["params_after"]
  assert got["ffn_after"] == want["ffn_after"]
  assert got["perplexity_after"] == pytest.approx(
    want["perplexity_after"], rel=1e-4
  )
  kept = [(path / "kept.json").read_text() for path in (work, one)]
  assert kept[0] == kept[1]
  weights = [load_file(p / "model" / "model.safetensors") for p in (work, one)]
  assert weights[0].keys() == weights[1].keys()
  for name, expected in weights[1].items():
    np.testing.assert_allclose(
      weights[0][name], expected, atol=1e-4, err_msg=name
    )


def test_two_processes(small_model, tmp_path, process_env, two):
  """One after the other is lost; the same command goes on, on one or two."""
  work = two.work
  processes = two()
  wait_until((work / "pruning.json").exists, work, processes)
  processes[0].send_signal(signal.SIGKILL)
  assert_ended(processes[1], work, 1, gone=0)

  processes = two()
  wait_until(lambda: trained(work) >= 2, work, processes)
  processes[1].send_signal(signal.SIGTERM)
  for number, process in enumerate(processes):
    assert process.wait(600) == EXIT_STOPPED, said(work, number)
    assert "the same command continues" in said(work, number)
  steps = trained(work)
  assert steps < 24

  processes = two()
  wait_until(lambda: trained(work) > steps + 1, work, processes)
  processes[1].send_signal(signal.SIGKILL)
  assert_ended(processes[0], work, 0, gone=1)
  assert not (work / "summary.json").exists()

  copy, whole = tmp_path / "copy", tmp_path / "whole"
  shutil.copytree(work, copy)
  for number, process in enumerate(two()):
    assert process.wait(600) == 0, said(work, number)
  finish(config_of(small_model), whole, fast(process_env(1)))
  assert_same_result(work, whole)
  assert "continuing at" in finish(
    config_of(small_model), copy, fast(process_env(1))
  )
  assert_same_result(copy, whole)


def test_arrays_cut_over_both_processes(
  small_model, tmp_path, process_env, two
):
  """No process holds the whole model, and those of `tensor` share rows."""
  config = recipe(
    small_model,
    stages=1,
    tokens=8 * 256,
    method="curvature",
    ranking=Ranking(step_size=0.1),
    refit="2",
    refit_all=True,
  )
  finish(config, tmp_path / "one", fast(process_env(1)))
  for axis in ("fsdp", "tensor"):
    mesh = dataclasses.replace(config.mesh, data=1, **{axis: 2})
    cut = dataclasses.replace(config, mesh=mesh)
    work = tmp_path / axis
    for number, process in enumerate(two(devices=1, config=cut, work=work)):
      assert process.wait(600) == 0, said(work, number)
    assert_same_result(work, tmp_path / "one")


def test_an_error_of_one_process_ends_both(two, tmp_path):
  """What only process 1 cannot read; process 0 does not wait for ever."""
  processes = two("--config.eval.text=README.md", cwd=tmp_path)
  assert processes[1].wait(600) == EXIT_ERROR
  # Gloo's own lines may come behind it.
  assert "error: README.md" in said(two.work, 1)
  assert_ended(processes[0], two.work, 0, gone=1)


def test_an_error_of_both_is_said_by_each(two):
  processes = two("--config.prune.method=slicegpt")
  for number, process in enumerate(processes):
    assert process.wait(600) == EXIT_ERROR
    assert "one process alone" in said(two.work, number).splitlines()[-1]


def test_no_coordinator_is_one_clear_line(small_model, tmp_path, process_env):
  flags = ("--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1")
  process = start(
    config_of(small_model),
    tmp_path / "work",
    process_env(1),
    "--connect_seconds=2",
    *flags,
  )
  assert process.wait(600) == EXIT_ERROR
  line = said(tmp_path / "work", 1).splitlines()[-1]
  assert line.startswith("error: cannot join the processes at 127.0.0.1:9")


def test_one_that_never_comes_is_one_clear_line(
  small_model, tmp_path, process_env
):
  address = f"127.0.0.1:{free_port()}"
  process = start(
    config_of(small_model),
    tmp_path / "work",
    process_env(1),
    *("--connect_seconds=2", f"--coordinator={address}"),
    *("--num_processes=2", "--process_id=0"),
  )
  assert process.wait(600) == EXIT_PEER
  line = said(tmp_path / "work", 0).splitlines()[-1]
  assert line.startswith(f"error: not all processes came to {address} within 2")
