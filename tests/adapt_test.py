"""Whole runs: what they leave, how they go on, how they refuse."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_pruner_jax import adapt, model, prune, sharding, tiny
from adapt_pruner_jax.config import Config
from adapt_pruner_jax.errors import EXIT_STOPPED, UserError
from adapt_pruner_jax.hf import load, save

SMALL = tiny.Recipe(V=300, D=32, L=3, K=4, G=2, H=8, F=48, context=64)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
  """A random model with a tokenizer, as a HuggingFace directory."""
  folder = tmp_path_factory.mktemp("small")
  tiny.train_tokenizer(folder / "tokenizer", SMALL.V)
  config = tiny.config_of(SMALL)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = tiny.init_params(config, 0, mesh)
  params = jax.tree.map(lambda x: x * 3, params)  # so that layers differ
  save.save(config, params, folder / "model", source=folder / "tokenizer")
  return folder / "model"


def recipe(path, stages=2, tokens=0, **prune_fields) -> Config:
  config = Config()
  config.model.path = str(path)
  config.prune = dataclasses.replace(
    config.prune, ratio=0.3, stages=stages, step_size=0.05, **prune_fields
  )
  config.calibration = dataclasses.replace(
    config.calibration, samples=8, seq_len=16, batch=4, refit_samples=16
  )
  config.data = dataclasses.replace(config.data, seq_len=32, batch=8)
  config.train = dataclasses.replace(
    config.train, tokens=tokens, learning_rate=1e-3
  )
  config.mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1)
  config.eval = dataclasses.replace(config.eval, text="embedded", seq_len=64)
  config.checkpoint.steps = 4
  config.log.tensorboard = False
  return config


def flags_of(config: Config, path) -> list[str]:
  """The command line of a run with this recipe."""
  default = dataclasses.asdict(Config())
  found = ["--config=configs/oneshot.py", f"--workdir={path}"]
  for section, content in dataclasses.asdict(config).items():
    pairs = content if isinstance(content, dict) else {"": content}
    for name, value in pairs.items():
      old = default[section][name] if name else default[section]
      if value != old:
        dot = "." if name else ""
        found.append(f"--config.{section}{dot}{name}={value}")
  return found


def start(config, path, env, devices=1):
  command = [sys.executable, "-m", "adapt_pruner_jax", "run"]
  return subprocess.Popen(
    [*command, *flags_of(config, path)],
    env=env(devices),
    cwd=pathlib.Path(__file__).parent.parent,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def weights(path):
  return load_file(path / "model" / "model.safetensors")


def assert_same_weights(a, b):
  a, b = weights(a), weights(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_what_a_run_leaves(small_model, tmp_path):
  work = tmp_path / "work"
  summary = adapt.run(recipe(small_model), work)
  config, params = load.load(str(work / "model"))
  dense = load.read_config(str(small_model))
  target = int(model.count_params(dense) * 0.7)
  channel = model.unit_cost(dense)["F"]
  assert target - channel < model.count_params(config) <= target
  assert summary["params_after"] == model.count_params(config)
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
  again, gathered = prune.gather(*original, keep, mesh)
  assert again.units() == config.units()
  jax.tree.map(np.testing.assert_array_equal, gathered, params)


def test_finished_run_does_nothing_and_another_recipe_is_refused(
  small_model, tmp_path, monkeypatch, capsys
):
  work = tmp_path / "work"
  config = recipe(small_model, stages=1)
  first = adapt.run(config, work)
  monkeypatch.setattr(adapt, "_run", None)
  assert adapt.run(config, work) == json.loads(json.dumps(first))
  assert "finished" in capsys.readouterr().out
  config.prune.amplitude = 0.5
  with pytest.raises(UserError, match=r"prune\.amplitude: 0\.02 -> 0\.5"):
    adapt.run(config, work)


@pytest.fixture(scope="module")
def trained(small_model, tmp_path_factory):
  """An uninterrupted run with training, in a process of its own."""
  path = tmp_path_factory.mktemp("trained") / "work"
  config = recipe(small_model, stages=2, tokens=24 * 256)
  return config, path


@pytest.fixture(scope="module")
def uninterrupted(trained, module_env):
  config, path = trained
  process = start(config, path, module_env)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return path


@pytest.fixture(scope="module")
def module_env():
  import os

  from tests import conftest

  def make(devices=1):
    return {
      **os.environ,
      "XLA_FLAGS": conftest._with_devices(os.environ["XLA_FLAGS"], devices),
    }

  return make


# Files that appear as a run goes on, to aim at its phases.
MOMENTS = {
  "prune": lambda w: (w / "pruning.json").exists(),
  "train": lambda w: rows(w, "train") >= 6,
  "second stage": lambda w: rows(w, "eval") >= 1,
}


def rows(work, kind):
  file = work / "metrics.jsonl"
  return file.read_text().count(f'"kind": "{kind}"') if file.exists() else 0


@pytest.mark.slow
def test_killed_in_every_phase_ends_the_same(
  trained, uninterrupted, module_env, tmp_path
):
  config, _ = trained
  work = tmp_path / "work"
  for moment in MOMENTS.values():
    process = start(config, work, module_env)
    while not moment(work):
      assert process.poll() is None, process.stdout.read()
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
  process = start(config, work, module_env)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert "continuing at stage 2" in output
  assert_same_weights(work, uninterrupted)
  got, want = (json.loads((p / "summary.json").read_text()) for p in (work, uninterrupted))
  assert got["perplexity_after"] == want["perplexity_after"]
  steps = [json.loads(x)["step"] for x in (work / "metrics.jsonl").open() if '"train"' in x]
  assert steps == list(range(24))


@pytest.mark.slow
def test_sigterm_saves_and_another_mesh_goes_on(
  trained, uninterrupted, module_env, tmp_path
):
  config, _ = trained
  work = tmp_path / "work"
  for devices in (8, 2):
    process = start(config, work, module_env, devices)
    begun = rows(work, "train")
    while rows(work, "train") < begun + 5:
      assert process.poll() is None, process.stdout.read()
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert "the same command continues" in output
  process = start(config, work, module_env, 1)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  got, want = weights(work), weights(uninterrupted)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=2e-3, err_msg=name)
