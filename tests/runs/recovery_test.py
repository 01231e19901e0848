"""A stage's training in stacked runs of layers, as whole runs see it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax.runs import recovery, run
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from tests.small_runs import recipe


class Killed(BaseException):
  pass


def killed_after_saves(number):
  """`Checkpoints.save` which ends the process behind so many."""
  save, left = Checkpoints.save, [number]

  def saved(self, *args):
    save(self, *args)
    left[0] -= 1
    if not left[0]:
      self.wait()
      raise Killed

  return saved


def stored_in_half(small_model, tmp_path):
  """The small model with its matrices in bfloat16."""
  path = tmp_path / "half"
  shutil.copytree(small_model, path)
  tensors = load_file(path / "model.safetensors")
  half = {n: x.astype(jnp.bfloat16) for n, x in tensors.items() if x.ndim > 1}
  save_file(tensors | half, path / "model.safetensors", {"format": "pt"})
  return path


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", ["off", "on"])
def test_the_teacher_is_loaded_as_stored_when_first_needed(
  small_model, tmp_path, monkeypatch, scan_layers
):
  config = recipe(
    stored_in_half(small_model, tmp_path), stages=1, tokens=2 * 256
  )
  config.train.distill_alpha = 0.5
  config.train.scan_layers = scan_layers
  loaded, load = [], recovery.teacher_of

  def teacher_of(inputs):
    loaded.append(load(inputs))
    return loaded[-1]

  monkeypatch.setattr(run, "teacher_of", teacher_of)
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", killed_after_saves(1))
    with pytest.raises(Killed):
      run.run(config, tmp_path / "work")  # pruned, and nothing else
  assert not loaded
  run.run(config, tmp_path / "work")
  run.run(config, tmp_path / "work")
  [(_, params)] = loaded
  if scan_layers == "off":
    layer = params["layer_0"]
    assert layer["q"].dtype == jnp.bfloat16
    assert layer["attn_norm"].dtype == jnp.float32
    same_with_a_cache(config, tmp_path, monkeypatch)


def same_with_a_cache(config, tmp_path, monkeypatch):
  """Trains as in `work`; the teacher is loaded once, killed or not."""
  config.train.teacher_cache = 10**6  # all tokens that there are
  loads, load = [], recovery.teacher_of
  told = lambda inputs: loads.append(1) or load(inputs)
  monkeypatch.setattr(recovery, "teacher_of", told)
  config.checkpoint.steps = 1
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", killed_after_saves(2))
    with pytest.raises(Killed):
      run.run(config, tmp_path / "cached")  # behind a train step
  run.run(config, tmp_path / "cached")
  assert loads == [1]
  beside, cached = (
    [json.loads(row) for row in (tmp_path / w / "metrics.jsonl").open()]
    for w in ("work", "cached")
  )
  trained = lambda rows: [r["loss"] for r in rows if r["kind"] == "train"]
  assert trained(cached) == pytest.approx(trained(beside), rel=2e-3)


@pytest.mark.slow
def test_stacked_layers_end_as_unrolled_and_go_on(
  small_model, tmp_path, monkeypatch
):
  config = recipe(small_model, stages=2, tokens=6 * 256, refit="final")
  config.eval.seq_len = 16
  config.checkpoint.steps = 2
  unrolled = run.run(config, tmp_path / "unrolled")
  config.train.scan_layers = "on"
  whole = run.run(config, tmp_path / "whole")
  for name in "params_after", "train_steps":
    assert whole.get(name) == unrolled.get(name)
  after = "perplexity_after"
  assert whole[after] == pytest.approx(unrolled[after], rel=1e-4)
  # Within the training of the second stage, whose moments are carried over.
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", killed_after_saves(4))
    with pytest.raises(Killed):
      run.run(config, tmp_path / "work")
  run.run(config, tmp_path / "work")
  for path in ("model/model.safetensors",):
    got, want = (load_file(tmp_path / w / path) for w in ("work", "whole"))
    assert got.keys() == want.keys()
    for name in got:
      np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  losses = {}
  for work in "whole", "unrolled":
    rows = map(json.loads, (tmp_path / work / "metrics.jsonl").open())
    losses[work] = [r["loss"] for r in rows if r["kind"] == "train"]
  assert losses["whole"] == pytest.approx(losses["unrolled"], rel=1e-5)
