"""Runs that an earlier version began and did not end, see make.py there."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax.config import from_json
from adapt_pruner_jax.runs import run


@pytest.fixture(params=["pruning", "training"])
def old(request, golden, tmp_path, monkeypatch):
  """A copy of a killed run's directory, and what the old code made of it."""
  folder = golden / "old_workdirs"
  with tarfile.open(folder / "killed.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  shutil.copytree(folder / "model", tmp_path / "model")
  shutil.copy(folder / "text.txt", tmp_path)
  monkeypatch.chdir(tmp_path)  # paths in the recipe are relative
  return tmp_path / request.param, folder / f"{request.param}-expected"


def sizes(trace: str) -> list[int]:
  return [json.loads(line)["params"] for line in trace.splitlines()]


def test_today_continues_to_the_same_result(old, capsys):
  work, expected = old
  recipe = from_json(json.loads((work / "config.json").read_text()))
  done = len((work / "trace.jsonl").read_text().splitlines())
  run.run(recipe, work)
  said = capsys.readouterr().out
  assert "continuing at stage 2" in said
  assert "from a checkpoint of an earlier version" in said
  for file in "kept.json", "trace.jsonl":
    got, want = ((path / file).read_text() for path in (work, expected))
    if file == "kept.json":
      assert got == want
    else:  # what was decided before the kill, and the same decisions after it
      got, want = got.splitlines(), want.splitlines()
      assert got[:done] == want[:done]
      sizes = [
        [json.loads(x)["params"] for x in lines] for lines in (got, want)
      ]
      assert sizes[0] == sizes[1]
  got = load_file(work / "model" / "model.safetensors")
  want = load_file(expected / "model.safetensors")
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)
  same = all(np.array_equal(got[name], want[name]) for name in want)
  print("bit for bit" if same else "within 1e-6")
