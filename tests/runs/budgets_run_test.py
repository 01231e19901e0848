"""Runs and comparisons whose budget is not parameters: small random models."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from adapt_pruner_jax import api
from adapt_pruner_jax.config import Prune, latency_table
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import profile
from adapt_pruner_jax.formats.gguf import reader
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.pruning import budgets, quality
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import (
  compare,
  compare_methods,
  compare_table,
  latency_budget,
  run,
)
from adapt_pruner_jax.storage import json_files, places
from tests import small_runs

pytestmark = pytest.mark.usefixtures("one_device")

BLOCK = 32 * 3 * 32 // 32 * 34  # of 32 channels in q8_0
KEPT = {"method": "curvature", "group_importance": "random"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return small_runs.make_model(tmp_path_factory.mktemp("budgets"))


def recipe(model, **fields):
  config = small_runs.recipe(model, stages=1, **(KEPT | fields))
  config.eval.text = ""
  return config


def table_of(file, engine="jax"):
  """A table that any model of `small_runs` fits, as if measured here."""
  measured = {"phase": "decode", "batch": 1, "context": 32, "rest_ms": 0.5}
  measured["attention_ms"] = [[0, 0], [1, 0.1], [4, 0.2]]
  measured["mlp_ms"] = [[0, 0], [16, 0.1], [48, 0.3]]
  sizes = {"hidden_size": 32, "head_dim": 8, "queries_per_group": 2}
  table = {
    "format": latency_table.FORMAT,
    "device": profile.device_name(engine),
    "engine": engine,
    "dtype": "float32",
    "model": sizes | {"vocab_size": 300},
    "multiples": {"kv_groups": 1, "ffn": 8},
    "measured": [measured],
  }
  json_files.write_json(file, table)
  return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("export", ["q8_0", "bf16"])
def test_a_file_is_as_large_as_it_may_be(export, model, tmp_path):
  """Whole, with its header; as it was asked for."""
  most = {"q8_0": 43_000, "bf16": 52_000}[export]
  config = recipe(model, budget="bytes", budget_export=export)
  config.prune.ratio, config.prune.budget_value = 0.0, float(most)
  summary = run.run(config, tmp_path / "work")
  file = tmp_path / "work" / "model" / "model.safetensors"
  if export == "q8_0":
    file = tmp_path / "work" / "model.gguf"
    assert reader.stored(file)[0].hidden_size == 32
  size = file.stat().st_size
  unit = BLOCK + 32 * 40 if export == "q8_0" else 3 * 32 * 2 + 300
  assert size <= most < size + unit
  assert summary["budget_after"] == size
  assert summary["budget_target"] == most
  assert summary["budget_before"] > most


@pytest.mark.slow
def test_milliseconds_are_promised_and_measured(model, tmp_path):
  fields = {"budget": "latency", "budget_context": 32}
  fields["budget_table"] = table_of(tmp_path / "table.json")
  config = recipe(model, limits="kv_bytes=6000", **fields)
  summary = run.run(config, tmp_path / "work")
  found = summary["latency_budget"]
  assert found["original_promised_ms"] == pytest.approx(0.5 + 3 * 0.5)
  assert found["promised_ms"] <= summary["budget_target"]
  assert summary["budget_target"] == pytest.approx(0.7 * 2)
  assert found["pairs"] == 20
  assert summary["budget_after"] == found["measured_ms"] > 0
  assert summary["limits"][0]["after"] <= 6000
  assert "medians of 20 pairs" in latency_budget.text(found)
  # The same table at another place is the same run.
  other = dataclasses.replace(
    config.prune, budget_table=table_of(tmp_path / "moved.json")
  )
  config = dataclasses.replace(config, prune=other)
  again = run.run(config, tmp_path / "work")
  assert again["seconds"] == summary["seconds"]


def test_a_table_that_is_measured_for_the_run(model, tmp_path, monkeypatch):
  """Once, and kept in the work directory."""
  calls = []

  def measured(full, case, dtype, say):
    calls.append((case, dtype))
    return json_files.read_json(Path(table_of(tmp_path / "made.json")))

  monkeypatch.setattr(profile, "profile", measured)
  config = recipe(model, budget="latency", budget_context=32)
  full = load.read_config(str(model))
  for _ in range(2):
    found = latency_budget.resolve(config, full, full, tmp_path, Log(None))
    assert found.prune.budget_table == str(tmp_path / "latency.json")
  assert calls == [(profile.Case("decode", 1, 32), "float32")]
  with pytest.raises(UserError, match="in a bucket needs its table of times"):
    latency_budget.resolve(
      config, full, full, places.to_path("gs://bucket/run"), Log(None)
    )


@pytest.mark.slow
def test_overwrite_keeps_the_table_that_was_just_measured(
  model, tmp_path, monkeypatch
):
  """And one that a failed first attempt has left hinders nobody."""
  made = table_of(tmp_path / "made.json")
  measured = lambda *_, **__: json_files.read_json(Path(made))
  monkeypatch.setattr(profile, "profile", measured)
  monkeypatch.setattr(run, "finish", lambda *_: {})
  monkeypatch.setattr(run, "tell", lambda *_: None)
  config = recipe(model, budget="latency", budget_context=32)
  work = tmp_path / "work"
  work.mkdir()
  json_files.write_json(work / "latency.json", measured())
  for _ in range(2):
    run.run(config, work, overwrite=True)
    (work / "summary.json").write_text("{}")
    assert (work / "latency.json").exists()


def test_a_table_of_another_engine_is_promised_alone(model, tmp_path):
  """By hand, as of llama.cpp on this device or on one that is named."""
  file = Path(table_of(tmp_path / "table.json", "llama.cpp"))
  config = recipe(model, budget="latency", budget_context=32)
  config.prune.budget_table = str(file)
  full = load.read_config(str(model))
  small = full.with_units({"K": (1,) * 3, "F": (24,) * 3})
  for device in ("", "Pixel 9"):
    if device:
      table = json_files.read_json(file) | {"device": device}
      json_files.write_json(file, table)
      config.prune.budget_device = device
    given = config, full, full, tmp_path, Log(None)
    settings = latency_budget.resolve(*given).prune
    found = latency_budget.compare(settings, (full, {}), (small, {}), ())
    assert found["measured_ms"] is None
    assert found["promised_ms"] == pytest.approx(0.5 + 3 * (0.1 + 0.15))
    assert "not measured" in latency_budget.text(found)


@pytest.mark.slow
def test_a_quality_is_kept(model, tmp_path, monkeypatch):
  lost = lambda masks: 1e-3 * (3 * 48 - masks["F"].sum())
  monkeypatch.setattr(quality, "loss", lambda masked, _, masks: lost(masks))
  config = recipe(model, budget="quality", budget_value=0.01)
  config.prune.ratio = 0.0
  summary = run.run(config, tmp_path / "work")
  assert summary["budget_before"] == 0
  assert summary["budget_after"] <= 0.01 == summary["budget_target"]
  assert summary["params_after"] < summary["params_before"]
  page = (tmp_path / "work" / "report.html").read_text()
  assert "Loss above the original" in page
  trace = json_files.read_lines(tmp_path / "work" / "trace.jsonl")
  assert trace[-1]["ended"]
  assert summary["budget_after"] == trace[-1]["rise"]
  metrics = json_files.read_lines(tmp_path / "work" / "metrics.jsonl")
  [told] = [row for row in metrics if "nats" in row.get("unit", "")]
  assert told["done"] == trace[-1]["rise"]
  original = api.load(model)
  again = api.at_step(original, trace[-1])
  exported = api.load(tmp_path / "work" / "model")
  assert again.config.units() == exported.config.units()
  jax.tree.map(np.testing.assert_array_equal, again.params, exported.params)
  with pytest.raises(UserError, match="masks are of another model"):
    api.at_step(again, trace[-1])
  with pytest.raises(UserError, match="has no masks"):
    api.at_step(original, {})


@pytest.mark.slow
def test_a_quality_of_a_model_that_has_nothing_to_lose(model, tmp_path):
  config = recipe(model, budget="quality", budget_value=0.01)
  config.prune.ratio, config.prune.round_ffn_to = 0.0, 512
  config.prune.attention_layers = "0:0"
  summary = run.run(config, tmp_path / "work")
  assert summary["budget_after"] == 0
  assert summary["params_after"] == summary["params_before"]


@pytest.mark.slow
def test_an_accuracy_is_kept(model, tmp_path):
  rows = [
    {"question": f"Once {n}", "choices": ["upon a", "a time"], "answer": n % 2}
    for n in range(6)
  ]
  for row in rows:
    json_files.append_line(tmp_path / "asked.jsonl", row)
  config = recipe(model, budget="quality", budget_value=0.5)
  config.prune.ratio, config.prune.max_steps = 0.0, 2
  config.calibration.tuning = f"questions:{tmp_path / 'asked.jsonl'}"
  summary = run.run(config, tmp_path / "work")
  assert summary["budget_after"] <= 0.5 == summary["budget_target"]
  assert summary["params_after"] < summary["params_before"]
  page = (tmp_path / "work" / "report.html").read_text()
  assert "accuracy lost" in page
  found = json_files.read_lines(tmp_path / "work" / "trace.jsonl")
  assert all(0.5 >= row["rise"] > -5 for row in found)


@pytest.mark.slow
def test_methods_compared_at_equal_milliseconds(model, tmp_path):
  config = recipe(model, budget="latency", budget_context=32)
  config.eval.text = "embedded"
  config.prune.budget_table = table_of(tmp_path / "table.json")
  work = tmp_path / "work"
  found = compare.compare(config, work, "magnitude,adapt", "0.2,0.3")
  assert found["unit"] == "ms (a token, batch 1, context 32)"
  for row in found["rows"]:
    assert row["budget"] <= 2 * (1 - row["ratio"])
    if row["ratio"]:
      assert row["measured_ms"] > 0
      assert row["budget_target"] == pytest.approx(2 * (1 - row["ratio"]))
  columns, _ = compare_table.table(found["rows"], found["unit"])
  assert {found["unit"], "measured, ms"} <= {*columns}
  assert (work / "compare.svg").exists()


def test_all_are_those_that_can_meet_the_budget():
  config = small_runs.recipe("none", stages=1)
  names = lambda: {
    name for name, _ in compare_methods.jobs(config, "all", [0.2], 0, False)
  }
  assert {"flap", "shortgpt", "adapt"} <= names()
  config.prune.budget = "kv_bytes"
  can = {"dense", "adapt", "curvature", "magnitude", "random", "adapt+refit"}
  assert can <= names()
  assert not names() & {"flap", "shortgpt", "slicegpt", "llm_pruner"}
  with pytest.raises(UserError, match="method=adapt or curvature"):
    compare_methods.jobs(config, "flap", [0.2], 0, False)
  config.prune.limits = "params=3"
  with pytest.raises(UserError, match="methods are compared at one budget"):
    compare_methods.jobs(config, "adapt", [0.2], 0, False)


def test_units_for_people():
  settings = Prune(budget="bytes", budget_export="q8_0")
  assert budgets.shown(1234, settings) == "1,234 bytes of q8_0"
  settings = Prune(budget="latency", budget_phase="prefill", budget_context=9)
  said = "1.500 ms (a prompt, batch 1, context 9)"
  assert budgets.shown(1_500_000, settings) == said
