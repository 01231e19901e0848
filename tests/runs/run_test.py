"""Whole runs: what they leave, how they go on, how they refuse."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_pruner_jax.data.calibration import WindowData
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import EXIT_STOPPED, UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import methods, refit_loss, surgery
from adapt_pruner_jax.runs import run
from adapt_pruner_jax.storage import json_files
from adapt_pruner_jax.storage.checkpoints import Checkpoints
from tests.small_runs import SMALL, finish, output, profiled, recipe, start


def weights(path):
  return load_file(path / "model" / "model.safetensors")


def assert_same_weights(a, b):
  a, b = weights(a), weights(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_close_weights(a, b):
  a, b = weights(a), weights(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)


def test_what_a_run_leaves(small_model, tmp_path):
  work = tmp_path / "work"
  summary = run.run(recipe(small_model), work)
  config, params = load.load(str(work / "model"))
  dense = load.read_config(str(small_model))
  target = int(model_config.count_params(dense) * 0.7)
  channel = model_config.unit_cost(dense)["F"]
  assert target - channel < model_config.count_params(config) <= target
  assert summary["params_after"] == model_config.count_params(config)
  assert summary["target_params"] == target
  on_disk = json.loads((work / "summary.json").read_text())
  assert on_disk == json.loads(json.dumps(summary))
  for name in ("method", "params_before", "seconds", "perplexity_before"):
    assert on_disk[name] is not None

  trace = [json.loads(x) for x in (work / "trace.jsonl").open()]
  assert [r["stage"] for r in trace] == sorted(r["stage"] for r in trace)
  assert {r["stage"] for r in trace} == {1, 2}
  sizes = [r["params"] for r in trace]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[-1] == on_disk["params_after"]
  names = {"kv_groups", "ffn", "attn_importance", "mlp_importance"}
  names |= {"attn_sparsity", "mlp_sparsity"}
  assert names <= trace[0]["layers"][0].keys()
  assert json.loads((work / "config.json").read_text())["prune"]["ratio"] == 0.3
  assert (work / "report.html").stat().st_size > 1000

  # kept.json says which units of the original model these are.
  kept = json.loads((work / "kept.json").read_text())["layers"]
  keep = {
    "K": tuple(np.array(x["kv_groups"]) for x in kept),
    "F": tuple(np.array(x["ffn"]) for x in kept),
  }
  original = load.load(str(small_model))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  again, gathered = surgery.gather(*original, keep, mesh)
  assert again.units() == config.units()
  jax.tree.map(np.testing.assert_array_equal, gathered, params)


def test_finished_run_does_nothing_and_another_recipe_is_refused(
  small_model, tmp_path, monkeypatch, capsys
):
  work = tmp_path / "work"
  config = recipe(small_model, stages=1)
  first = run.run(config, work)
  monkeypatch.setattr(run, "_run", None)
  assert run.run(config, work) == json.loads(json.dumps(first))
  assert "finished" in capsys.readouterr().out
  config.prune.amplitude = 0.5
  with pytest.raises(
    UserError, match=r"another recipe: prune\.amplitude: 0\.02 -> 0\.5.*--over"
  ):
    run.run(config, work)
  # Of another version, which is said; a field that it did not know is at its
  # default.
  stored = json.loads((work / "config.json").read_text())
  del stored["version"], stored["train"]["carry_moments"]
  (work / "config.json").write_text(json.dumps(stored))
  with pytest.raises(
    UserError, match=r"begun by an earlier version \(this is [\d.]+.*amplitude"
  ):
    run.run(config, work)
  config.prune.amplitude = 0.02
  run.run(config, work)
  stored["train"]["from_the_future"] = 1
  (work / "config.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match=r"from_the_future: 1 -> absent"):
    run.run(config, work)
  for damaged in ("[]", '{"prune": 1, "calibration": {}}'):
    (work / "config.json").write_text(damaged)
    with pytest.raises(UserError, match="is damaged, it holds no recipe"):
      run.run(config, work)
  (work / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  (work / "summary.json").write_text("[]")
  with pytest.raises(UserError, match="it holds no JSON object"):
    run.run(config, work)


@pytest.mark.parametrize(
  "change, message",
  [
    ("text.txt", "gives other tokens"),
    ("model", "has other weights"),
    ("eval.txt", "is another text"),
  ],
)
def test_other_inputs_are_refused(
  small_model, tmp_path, monkeypatch, change, message
):
  """They are read in parts of a run, and would be mixed."""
  shutil.copytree(small_model, tmp_path / "model")
  text = tmp_path / "text.txt"
  text.write_text("some words to prune with, and a few more. " * 9)
  config = recipe(tmp_path / "model", stages=1, method="magnitude")
  config.calibration.source = f"text:{text}"
  reported = tmp_path / "eval.txt"
  reported.write_text("what a model is measured on, never seen. " * 9)
  config.eval.text = str(reported) if change == "eval.txt" else ""
  with monkeypatch.context() as patch:
    patch.setattr(run, "prune", killed_after())
    with pytest.raises(Killed):
      run.run(config, tmp_path / "work")
  if change == "model":
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: 2 * x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
  else:
    words = "other words to prune with, and a few more. " * 9
    (tmp_path / change).write_text(words)
  with pytest.raises(UserError, match=message):
    run.run(config, tmp_path / "work")


@pytest.mark.slow
def test_overwrite(small_model, tmp_path, monkeypatch, capsys):
  """Another recipe's run goes, once the inputs are good; nothing else does."""
  work = tmp_path / "work"
  config = recipe(small_model, stages=1, tokens=600, method="magnitude")
  config.data.source = f"text:{tmp_path / 'few.txt'}"
  (tmp_path / "few.txt").write_text("a few words to train on, often. " * 4)
  config.eval.text = ""
  summary = run.run(config, work)
  said = capsys.readouterr().out
  tokens = int(re.search(r"has ([\d,]+): ([\d.]+) epochs", said)[1])
  assert summary["epochs"] == pytest.approx(768 / tokens, abs=1e-4)
  assert "WARNING: more than 4 epochs" in said
  weights_file = small_model / "model.safetensors"
  assert summary["bytes_before"] == weights_file.stat().st_size
  size = (work / "model" / "model.safetensors").stat().st_size
  assert summary["bytes_after"] == size
  assert f"{size / 1e6:.2f} MB" in said.split("on disk")[1]

  (work / "notes.txt").write_text("mine")
  before = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
  config.prune.ratio = 0.2
  bad = dataclasses.replace(config, eval=dataclasses.replace(config.eval))
  bad.eval.text = "absent.txt"
  with pytest.raises(UserError, match=r"absent\.txt"):
    run.run(bad, work, overwrite=True)
  inside = dataclasses.replace(config, model=dataclasses.replace(config.model))
  inside.model.path = str(work / "model")
  with pytest.raises(UserError, match="among what --overwrite would remove"):
    run.run(inside, work, overwrite=True)
  for path, time_ in before.items():
    if path.name != "run.lock":
      assert path.stat().st_mtime_ns == time_, path
  again = run.run(config, work, overwrite=True)
  assert again["target_params"] > summary["target_params"]
  assert (work / "notes.txt").read_text() == "mine"
  # Killed and given again, it goes on: the recipe is now the same.
  (work / "summary.json").unlink()
  for left in (".model.tmp-1-a", ".model-of-before"):  # killed in an export
    (work / left).mkdir()
  monkeypatch.setattr(run, "prune", None)
  run.run(config, work, overwrite=True)
  assert not [*work.glob(".model*")]
  with pytest.raises(TypeError):  # finished: it begins anew
    run.run(config, work, overwrite=True)


@pytest.mark.slow
def test_refits_of_all_stages_have_windows_of_their_own(
  small_model, tmp_path, monkeypatch
):
  stages, refit, draw = [], methods.refit_after, WindowData.batch
  config = recipe(small_model, stages=2, method="fisher", refit="loss")
  config.prune.refit_passes, config.prune.ranking.step_size = 3, 0.5
  config.eval.text = ""

  def refit_after(task, pruned):
    stages.append(set())
    return refit(task, pruned)

  def batch(data, step):
    if stages and data.seed == config.seed + 1:
      stages[-1].add(step)
    return draw(data, step)

  monkeypatch.setattr(methods, "refit_after", refit_after)
  monkeypatch.setattr(WindowData, "batch", batch)
  run.run(config, tmp_path)
  assert [len(steps) for steps in stages] == [3, 3]
  assert not stages[0] & stages[1]


def test_a_model_of_no_run_is_not_replaced(small_model, tmp_path):
  """Neither the one that is pruned, in the work directory, nor another."""
  shutil.copytree(small_model, tmp_path / "model")
  for source in (small_model, tmp_path / "model"):
    with pytest.raises(UserError, match="model in it is not of a run"):
      run.run(recipe(source, stages=1), tmp_path)
  names = {path.name for path in (tmp_path / "model").iterdir()}
  assert names == {path.name for path in small_model.iterdir()}


def test_a_run_that_lacks_its_control_is_not_finished(tmp_path, monkeypatch):
  """The same command with --overwrite then goes on with the control."""
  config = recipe("model", stages=2)
  config.oneshot_control = True
  config.train.tokens = 0
  monkeypatch.setattr(run, "open_inputs", None)  # nothing begins anew
  monkeypatch.setattr(run, "tell", lambda *_: None)
  monkeypatch.setattr(run, "add_control", lambda summary, *_: summary)
  file = tmp_path / "summary.json"
  content = {"version": "0", **dataclasses.asdict(config)}
  json_files.write_json(tmp_path / "config.json", content)
  json_files.write_json(file, {"params_after": 1})
  (tmp_path / "report.html").touch()
  other = tmp_path / "oneshot"
  other.mkdir()
  at_once = dataclasses.replace(config.prune, stages=1)
  alone = dataclasses.replace(config, oneshot_control=False, prune=at_once)
  content = {"version": "0", **dataclasses.asdict(alone)}
  json_files.write_json(other / "config.json", content)
  json_files.write_json(other / "summary.json", {"params_after": 2})
  (other / "report.html").touch()
  assert run.run(config, tmp_path, overwrite=True)["params_after"] == 1
  json_files.write_json(file, {"params_after": 1, "control": {}})
  with pytest.raises(TypeError):  # finished: it begins anew
    run.run(config, tmp_path, overwrite=True)


def test_a_control_run_counts_by_the_same_times(tmp_path, monkeypatch):
  config, asked = recipe("model", stages=2), []
  config.oneshot_control = True
  config.prune.budget = "latency"

  def once(inputs, *_):
    asked.append(inputs.recipe.prune.budget_table)
    return {}

  opened = lambda recipe, *_: types.SimpleNamespace(recipe=recipe)
  monkeypatch.setattr(run, "check", lambda _: None)
  monkeypatch.setattr(run, "open_inputs", opened)
  monkeypatch.setattr(run, "_run", once)
  monkeypatch.setattr(run, "tell", lambda *_: None)
  monkeypatch.setattr(run, "add_control", lambda summary, *_: summary)
  run.run(config, tmp_path)
  assert asked == ["", str(tmp_path / "latency.json")]


def test_overwrite_spares_what_no_run_has_left(small_model, tmp_path):
  config = recipe(small_model, stages=1)
  model = tmp_path / "model"
  shutil.copytree(small_model, model)
  with pytest.raises(UserError, match=r"config\.json in it is not of a run"):
    run.run(config, model, overwrite=True)
  (tmp_path / "other" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match="checkpoints in it is not of a run"):
    run.run(config, tmp_path / "other", overwrite=True)
  names = {path.name for path in model.iterdir()} - {"run.lock"}
  assert names == {path.name for path in small_model.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
  "change",
  [
    {"prune.refit": "final"},
    {"prune.method": "curvature"},
    {"prune.method": "flap"},
    {"train.tokens": 512, "train.lora_rank": 2, "train.lora_base": "int8"},
    {"train.tokens": 512, "train.distill_alpha": 0.5},
  ],
  ids=lambda change: ",".join(map(str, change.values())),
)
def test_every_sort_of_run_ends_with_a_model(small_model, tmp_path, change):
  config = recipe(small_model, stages=1)
  config.eval.text = ""
  config.mesh.data, config.mesh.fsdp = 8, 1
  for name, value in change.items():
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
  summary = run.run(config, tmp_path / "work")
  small, params = load.load(str(tmp_path / "work" / "model"))
  dense = load.read_config(str(small_model))
  target = int(model_config.count_params(dense) * 0.7)
  assert model_config.count_params(small) == summary["params_after"] <= target
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  assert summary["train_tokens"] == config.train.tokens
  # Refit, bias and training change what was merely gathered.
  kept = json.loads((tmp_path / "work" / "kept.json").read_text())["layers"]
  keep = {
    "K": tuple(np.array(x["kv_groups"]) for x in kept),
    "F": tuple(np.array(x["ffn"]) for x in kept),
  }
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  _, gathered = surgery.gather(*load.load(str(small_model)), keep, mesh)
  got, want = (dict(jax.tree.leaves_with_path(t)) for t in (params, gathered))
  same = got.keys() == want.keys() and all(
    np.array_equal(got[path], want[path]) for path in want
  )
  assert same == (config.prune.method == "curvature")


# ---- Processes of their own, stopped -----------------------------------------


@pytest.fixture(scope="module")
def trained(small_model):
  return recipe(small_model, stages=2, tokens=24 * 256)


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory, process_env):
  """A run with training on one device that nothing happens to."""
  path = tmp_path_factory.mktemp("trained") / "work"
  profile = "--profile_steps=13:16"
  process = start(trained, path, process_env(1), profile)
  assert process.wait(300) == 0, output(path, profile)
  assert f"the profile is in {path / 'profile'}" in output(path, profile)
  return path


def rows(work, kind):
  file = work / "metrics.jsonl"
  return file.read_text().count(f'"kind": "{kind}"') if file.exists() else 0


def wait_for(moment, work, process):
  while not moment(work):
    assert process.poll() is None, output(work)
    time.sleep(0.01)


# What the files say as a run goes on, to aim at its phases. Each holds for the
# first time after the one before it, also in the process that goes on.
MOMENTS = {
  "started": lambda w: (w / "config.json").exists(),
  "prune": lambda w: (w / "pruning.json").exists(),
  "train": lambda w: rows(w, "train") >= 5,
  "second prune": lambda w: rows(w, "eval") and (w / "pruning.json").exists(),
  "second train": lambda w: rows(w, "train") >= 14,
  "export": lambda w: rows(w, "eval") >= 2,
}


@pytest.mark.slow
def test_steps_are_traced(uninterrupted):
  """With JAX's own profiler, on the CPU."""
  assert profiled(uninterrupted) == [13, 14, 15]


@pytest.mark.slow
def test_killed_in_every_phase_ends_the_same(
  trained, uninterrupted, process_env, tmp_path
):
  work = tmp_path / "work"
  for moment in MOMENTS.values():
    process = start(trained, work, process_env(1))
    wait_for(moment, work, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "summary.json").exists()
  finish(trained, work, process_env(1))
  assert_same_weights(work, uninterrupted)
  got, want = (
    json.loads((path / "summary.json").read_text())
    for path in (work, uninterrupted)
  )
  assert got["perplexity_after"] == want["perplexity_after"]
  metrics = map(json.loads, (work / "metrics.jsonl").open())
  steps = [row["step"] for row in metrics if row["kind"] == "train"]
  assert steps == list(range(24))
  assert (work / "trace.jsonl").read_text() == (
    uninterrupted / "trace.jsonl"
  ).read_text()


@pytest.mark.slow
def test_sigterm_saves_and_another_mesh_goes_on(
  trained, uninterrupted, process_env, tmp_path
):
  work = tmp_path / "work"
  for devices, steps in ((8, 5), (2, 14)):
    process = start(trained, work, process_env(devices))
    wait_for(lambda w, n=steps: rows(w, "train") >= n, work, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == EXIT_STOPPED, output(work)
    assert "the same command continues" in output(work)
  said = finish(trained, work, process_env(1))
  assert "continuing at stage 2" in said
  assert_close_weights(work, uninterrupted)


class Killed(BaseException):
  pass


def killed_after(action=lambda *_: None):
  """`action`, and then the end of the process."""

  def kill(*args):
    action(*args)
    raise Killed

  return kill


@pytest.mark.slow
def test_one_checkpoint_behind_training_and_one_evaluation(
  small_model, tmp_path, monkeypatch
):
  """Killed before, in and behind the evaluation of a stage."""
  config = recipe(small_model, stages=2, tokens=6 * 256)
  config.eval.seq_len = 16
  whole, work = tmp_path / "whole", tmp_path / "work"
  saves, save = [], Checkpoints.save
  with monkeypatch.context() as patch:

    def noted(self, step, meta, arrays):
      saves.append((meta, jax.tree.map(np.array, arrays)))
      save(self, step, meta, arrays)

    patch.setattr(Checkpoints, "save", noted)
    run.run(config, whole)
  # After each prune and each training, of 2 and 4 steps.
  moments = [(m["stage"], m["pruned"], m["step"]) for m, _ in saves]
  assert moments == [(1, True, 0), (1, True, 2), (2, True, 2), (2, True, 6)]
  for (_, one), (_, other) in itertools.pairwise(saves):
    first, second = (dict(jax.tree.leaves_with_path(x)) for x in (one, other))
    assert first.keys() != second.keys() or any(
      not np.array_equal(first[path], second[path]) for path in first
    )

  done = []

  def noting(name):
    action = getattr(run, name)
    return lambda state, *rest: (
      done.append((name, state.stage)) or action(state, *rest)
    )

  for name in "recover", "stage_result":
    monkeypatch.setattr(run, name, noting(name))
  for name, killed in (
    ("stage_result", killed_after()),  # the training is saved
    ("write_evaluated", killed_after()),  # the result is lost
    ("write_evaluated", killed_after(run.write_evaluated)),
    ("finish", killed_after()),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(run, name, killed)
      with pytest.raises(Killed):
        run.run(config, work)
  run.run(config, work)
  assert done == [
    *(("recover", 1), ("stage_result", 1), ("stage_result", 1)),
    *(("recover", 2), ("stage_result", 2)),
  ]
  assert_same_weights(work, whole)
  got, want = (
    json.loads((path / "summary.json").read_text()) for path in (work, whole)
  )
  assert got["stages"] == want["stages"]
  for kind, number in (("train", 6), ("eval", 2)):
    assert rows(work, kind) == rows(whole, kind) == number


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapt", "curvature"])
def test_a_cut_prune_goes_on(
  small_model, tmp_path, monkeypatch, capsys, method
):
  """From its last step, or anew where the file that says it is damaged."""
  config = recipe(small_model, stages=1)
  config.eval.text = ""
  if method == "curvature":  # the weights change between the steps
    config.prune.method, config.prune.refit = method, "2"
  whole, work, broken = (tmp_path / x for x in ("whole", "work", "broken"))
  run.run(config, whole)
  trace = (whole / "trace.jsonl").read_text()
  assert len(trace.splitlines()) > 4
  assert ("refit" in trace) == (method == "curvature")
  real = run.write_pruning

  def cut(*args):
    real(*args)
    raise KeyboardInterrupt

  monkeypatch.setattr(run, "write_pruning", cut)
  for expected in (1, 2, 3):
    with pytest.raises(KeyboardInterrupt):
      run.run(config, work)
    lines = (work / "trace.jsonl").read_text().splitlines()
    assert len(lines) == expected
  monkeypatch.undo()
  shutil.copytree(work, broken)
  file = broken / "pruning.json"
  content = json.loads(file.read_text())
  content["content"]["kept"]["F"][0][0] ^= 1
  file.write_text(json.dumps(content))
  capsys.readouterr()
  for path in (work, broken):
    run.run(config, path)
    damage = f"{file} is damaged" in capsys.readouterr().out
    assert damage == (path == broken)
    assert (path / "trace.jsonl").read_text() == trace
    assert_same_weights(path, whole)


@pytest.mark.slow
def test_a_cut_refit_by_the_loss_goes_on(small_model, tmp_path, monkeypatch):
  """As of configs/oneshot.py: it begins again, to the same weights."""
  config = recipe(small_model, stages=1)
  config.eval.text = ""
  config.prune.method, config.prune.refit = "fisher", "loss"
  config.prune.refit_passes, config.prune.refit_batch = 2, 8
  whole, work = tmp_path / "whole", tmp_path / "work"
  run.run(config, whole)
  batches = refit_loss._batches

  def cut(*args):
    yield next(batches(*args))
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(refit_loss, "_batches", cut)
    with pytest.raises(KeyboardInterrupt):
      run.run(config, work)
  assert not (work / "summary.json").exists()
  run.run(config, work)
  assert (work / "trace.jsonl").read_text() == (
    (whole / "trace.jsonl").read_text()
  )
  assert_same_weights(work, whole)


def test_a_cut_prune_of_a_later_stage_goes_on(
  small_model, tmp_path, monkeypatch
):
  """Behind the checkpoint of the stage before; no step is decided twice."""
  config = recipe(small_model, stages=2)
  config.eval.text = ""
  whole, work = tmp_path / "whole", tmp_path / "work"
  run.run(config, whole)
  real, decided = run.write_pruning, []

  def noted(step, steps, state, inputs):
    real(step, steps, state, inputs)
    decided.append((state.stage, step.number))
    if decided[-1] in ((2, 1), (2, 2)):
      raise Killed

  monkeypatch.setattr(run, "write_pruning", noted)
  for _ in range(2):
    with pytest.raises(Killed):
      run.run(config, work)
  run.run(config, work)
  assert decided[-1] > (2, 2)
  assert decided == sorted({*decided})
  assert not (work / "pruning.json").exists()
  assert (work / "trace.jsonl").read_text() == (
    whole / "trace.jsonl"
  ).read_text()
  assert_same_weights(work, whole)


def test_given_samples_are_only_asked_for_steps(small_model, tmp_path):
  """A file with samples for the steps and none more is enough."""
  config = recipe(small_model, stages=1, max_steps=2)
  config.prune.ratio = 0.0
  file = tmp_path / "samples.npy"
  ids = np.random.default_rng(0).integers(0, SMALL.V, (2, 8, 16))
  np.save(file, ids.astype(np.int32))
  config.calibration.source = f"npy:{file}"
  assert run.run(config, tmp_path / "work")["prune_steps"] == 2
