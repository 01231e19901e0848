"""The tables of benchmarks/budgets.py, from rows that are made up."""

import math

import pytest

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import json_files
from tests.conftest import ROOT


@pytest.fixture
def report(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import budgets_report

  return budgets_report


def row_of(report, nats, **facts):
  """Each text has two slices of 100 bytes and 25 tokens."""
  result = {"nats": {}, "bytes": {}, "tokens": {}}
  for text in report.TEXTS:
    result["nats"][text] = [nats, nats + 2]
    result["bytes"][text], result["tokens"][text] = [100] * 2, [25] * 2
  result["correct"] = dict.fromkeys(report.TASKS, "a0")
  result["questions"] = dict.fromkeys(report.TASKS, 4)
  return result | facts


def test_tables(report, tmp_path):
  dense = row_of(report, 80)
  command = "adapt-pruner run --config=F"
  small = row_of(
    report, 90, budget="bytes", budget_after=99, params_after=7, command=command
  )
  large = row_of(report, 95, gguf_bytes=98)
  cut = {"dense": [20, 40], "cut": [21, 40.5], "bytes": [100, 100]}
  novels = row_of(report, 90, endings=cut)
  names = {"vocab_novels": novels, "dense": dense, "file": small}
  names["file_params"] = large
  for name, result in names.items():
    json_files.append_line(
      tmp_path / "rows.jsonl", {"row": name, "result": result}
    )
  page = tmp_path / "budgets.md"
  page.write_text("no place")
  with pytest.raises(UserError, match="has no place"):
    report.write(tmp_path / "rows.jsonl", page)
  page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
  report.write(tmp_path / "rows.jsonl", page)
  text = page.read_text()
  assert text.startswith("before\n")
  assert text.endswith("\nafter\n")
  assert "old" not in text
  assert f"{(90 + 92) / 200 / math.log(2):.3f}" in text
  assert "0.500" in text  # 1010 of four questions
  # Five nats a slice of 25 tokens less, in each of them.
  assert "-0.200 nats a token" in text
  assert "(-0.200 to -0.200)" in text
  assert "adapt-pruner run \\\n  --config=F" in text
  assert "99 bytes" in text
  assert "the original 0.433: +2.5% (+1.2% to +5.0%)" in text
  assert text.index("for novels") > text.index("at most 105 MB")
  assert "98 bytes" in text
