"""benchmarks/claims.py on a model and texts so small that it takes seconds."""

import dataclasses

import pytest

from adapt_pruner_jax.data import sources
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SIZES = {
  "SAMPLES": 8,
  "REFIT_SAMPLES": 16,
  "SAMPLE_LEN": 16,
  "BATCH": 8,
  "ROWS": 8,
  "ROW_LEN": 32,
  "EVAL_TOKENS": 512,
  "UNIT": 512,
}


@pytest.fixture
def claims(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import claims
  import claims_bench

  for name, value in SIZES.items():
    module = claims if name == "UNIT" else claims_bench
    monkeypatch.setattr(module, name, value)
  return claims


@pytest.fixture
def where(small_model, tmp_path):
  files = [tmp_path / "train.txt", tmp_path / "test.txt"]
  for file, split in zip(files, ("train", "heldout"), strict=True):
    file.write_text(sources.embedded_text(split)[:60_000])
  return {"small": (small_model, *files), "wikitext": files[1]}


@pytest.mark.slow
def test_goes_on_and_reports(claims, where, tmp_path, monkeypatch):
  bench = claims.Bench(tmp_path, where, [1])
  name = "curvature+refit"
  dense_cell = claims.Cell("small", 0, claims.DENSE, 0.0)
  dense = bench.get(dense_cell)
  plain = [claims.Cell("small", seed, name) for seed in (0, 1)]
  staged = claims.Cell("small", 0, name, 0.4, 2, 4 * claims.UNIT, 1e-3)
  fresh = dataclasses.replace(staged, change=("carry_moments", False))
  found = {cell: bench.get(cell) for cell in (*plain, staged, fresh)}
  assert all(f["params"] <= 0.6 * dense["params"] for f in found.values())
  sure = dataclasses.replace(dense_cell, change=claims.BEST_TEMPERATURE)
  assert bench.get(sure)["test"] < dense["test"]  # its weights are random

  again = claims.Bench(tmp_path, where, [1])
  monkeypatch.setattr(again, "measure", None)  # nothing is measured twice
  assert {cell: again.get(cell) for cell in found} == found

  claims.claims_report.write(again.found, claims.UNIT, tmp_path)
  report = (tmp_path / "claims.md").read_text()
  loss = [f["test"] for f in found.values()]
  mean, half = (loss[0] + loss[1]) / 2, abs(loss[0] - loss[1]) / 2
  assert f"| `{name}` | {mean:.3f} ± {half:.3f} |" in report
  assert loss[2] != loss[3]
  change = f"| `{name}` | `carry_moments` | False | 2,048 |"
  assert f"{change} {loss[3]:.3f} | {loss[2]:.3f} |" in report
  assert (tmp_path / "claim1.svg").stat().st_size > 1000
