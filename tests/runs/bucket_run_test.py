"""A whole run of four processes in a bucket, killed, against one on a disk."""

import json
import time
from pathlib import Path

import pytest

from adapt_pruner_jax.errors import EXIT_ERROR
from adapt_pruner_jax.reporting.html import report
from tests.small_runs import flags_of, recipe

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def flip(path):
  """Changes a bit in the middle of an object."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def newest_array(work):
  """Of the newest checkpoint, an object with values."""
  steps = [p for p in (work / "checkpoints").iterdir() if p.name.isdigit()]
  whole = [p for p in steps if (p / "commit_success.txt").exists()]
  state = max(whole, key=lambda p: int(p.name)) / "state"
  return state / next(n for n in state.files() if n.startswith("d/"))


@pytest.fixture
def four(small_model, tmp_path, bucket_server, monkeypatch):
  """`four(work)` starts a run's processes; killed at the end."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  import bucket_faults

  config = recipe(small_model, stages=1, tokens=4 * 256)
  config.eval.text = ""
  config.log.tensorboard = True
  started = []

  def begin(work):
    arguments = ["run", *flags_of(config, work)]
    env = bucket_faults.ENV | bucket_server.environment
    started.extend(bucket_faults.start(arguments, env, tmp_path))
    return started[-bucket_faults.N :]

  begin.ends = lambda started: bucket_faults.exit_codes(started, tmp_path)
  begin.said = lambda me: (tmp_path / f"{me}.out").read_text()
  yield begin
  for process in started:
    process.kill()


@pytest.mark.parametrize("bucket_server", ["s3"], indirect=True)
def test_four_processes_in_a_bucket_survive_kills(
  bucket, fault, tmp_path, four
):
  whole, work = tmp_path / "whole", bucket / "run"
  assert four.ends(four(whole)) == [0] * 4, four.said(0)

  def started_until(moment):
    running = four(work)
    while not moment():
      assert all(p.exitcode is None for p in running), four.said(0)
      time.sleep(0.02)
    return running

  def exporting():
    return four.said(0).count("exporting to s3://") > exports

  running = started_until((work / "pruning.json").exists)
  running[0].kill()
  assert all(four.ends(running))
  flip(work / "pruning.json")
  running = started_until(
    (work / "checkpoints" / "1" / "commit_success.txt").exists
  )
  for process in running:
    process.kill()
  four.ends(running)
  flip(newest_array(work))
  exports = four.said(0).count("exporting to s3://")
  running = started_until(exporting)
  fault("quota", 60, "PUT,POST")
  assert EXIT_ERROR in four.ends(running)
  *_, line = four.said(0).splitlines()
  assert line.startswith("error: s3://bucket/run/")
  assert "the bucket is full" in line
  fault("quota", 0, "NONE")
  exports += 1  # the other is what was left
  running = started_until(exporting)
  running[3].kill()
  four.ends(running)
  assert not (work / "summary.json").exists()
  running = four(work)
  fault("503", 10, "PUT,GET,HEAD,POST,DELETE")
  assert four.ends(running) == [0] * 4, four.said(0)

  assert "pruning.json is damaged: this stage's prun" in four.said(0)
  assert "is damaged and was set aside" in four.said(0)
  for name in ("model/model.safetensors", "trace.jsonl", "kept.json"):
    assert (work / name).read_bytes() == (whole / name).read_bytes(), name
  got, want = (
    json.loads((p / "summary.json").read_text()) for p in (work, whole)
  )
  for name in ("params_after", "bytes_after", "stages"):
    assert got[name] == want[name]
  rows = [
    json.loads(x) for x in (work / "metrics.jsonl").read_text().splitlines()
  ]
  assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(4))
  assert not (work / "metrics.jsonl.parts").exists()
  assert not (work / "model" / "incomplete").exists()
  assert report.collect(work)["finished"]
