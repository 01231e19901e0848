"""A whole run in a bucket, killed in its phases, against one on a disk."""

import json
import signal
import time

import pytest

from adapt_pruner_jax.reporting.html import report
from tests.small_runs import finish, output, recipe, start

pytestmark = pytest.mark.slow

# What the bucket shows when a phase is under way.
MOMENTS = {
  "prune": "pruning.json",
  "train": "checkpoints/1/commit_success.txt",
  "export": "model/incomplete",
}


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


def test_a_run_in_a_bucket_survives_kills(
  small_model, process_env, bucket, fault, tmp_path
):
  config = recipe(small_model, stages=1, tokens=4 * 256)
  config.eval.text = ""
  config.log.tensorboard = True
  whole, work = tmp_path / "whole", bucket / "run"
  finish(config, whole, process_env(1))
  said = tmp_path / "bucket"  # its name, where the others' output is
  for moment, name in MOMENTS.items():
    process = start(config, work, process_env(1), said=said)
    while not (work / name).exists():
      assert process.poll() is None, output(said)
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "summary.json").exists()
    if moment == "train":
      flip(newest_array(work))
  process = start(config, work, process_env(1), said=said)
  fault(503, 10, "PUT,GET,HEAD,POST,DELETE")
  assert process.wait(300) == 0, output(said)
  assert "is damaged and was set aside" in output(said)
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
