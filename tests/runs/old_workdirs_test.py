"""Runs that an earlier version began and did not end, see make.py there."""

import contextlib
import dataclasses
import json
import shutil
import tarfile
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax.config import Config, from_json
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.runs import recipe, run


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


@pytest.mark.slow
def test_today_continues_to_the_same_result(old, capsys):
  work, expected = old
  config = from_json(json.loads((work / "config.json").read_text()))
  done = len((work / "trace.jsonl").read_text().splitlines())
  run.run(config, work)
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


def test_an_old_run_had_no_begin_token(tmp_path, monkeypatch):
  """It goes on without one; where there is none, nothing need be said."""
  prints = {"model": "", "calibration": ""}
  monkeypatch.setattr(recipe, "fingerprints", lambda _: prints)
  stored = dataclasses.asdict(Config())
  del stored["data"]["bos"]
  (tmp_path / "config.json").write_text(json.dumps(stored))
  for bos, token in (("auto", None), ("none", None), ("auto", "<s>")):
    config = Config()
    config.data.bos = bos
    assert not recipe.is_anew(config, tmp_path, False, False)
    inputs = types.SimpleNamespace(
      path=tmp_path,
      recipe=config,
      tokenizer=types.SimpleNamespace(begin_token=token),
    )
    refused = contextlib.nullcontext()
    if token:
      refused = pytest.raises(UserError, match=r"no <s> .*data\.bos=none")
    with refused:
      recipe.claim(inputs, False)
