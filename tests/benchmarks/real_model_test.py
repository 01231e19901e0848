"""benchmarks/real_model.py on a model and texts so small that it takes
seconds."""

import json
import shutil

import numpy as np
import pytest

from adapt_pruner_jax.data import sources
from adapt_pruner_jax.evaluation import answers as dense_answers
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.storage import json_files
from tests import small_runs
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SIZES = {"WINDOW": 32, "WINDOWS": 4, "LONG_WINDOWS": 2, "BUCKETS": 4}
SIZES |= {
  "SAVED": 2,
  "SMALL": 256,
  "SEQ_LEN": 16,
  "BATCH": 8,
  "ROWS": 8,
  "ROW_LEN": 32,
}
SIZES |= {"CALIBRATION_END": 60_000, "TUNE_END": 70_000, "TEST_BEGIN": 75_000}


@pytest.fixture
def bench(small_model, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import real_model_answers
  import real_model_bench
  from real_model_texts import MARK

  monkeypatch.setattr(real_model_answers, "NUMBER", 20)
  monkeypatch.setattr(real_model_answers, "QUOTED", 3)
  monkeypatch.setattr(real_model_answers, "QUESTIONS", ("Why?",))
  monkeypatch.setattr(real_model_answers, "ANSWER", 8)
  ends = lambda *_: tuple(range(0, 300, 2))  # a random model comes to them
  monkeypatch.setattr(dense_answers.generation_config, "end_tokens", ends)
  for name, value in SIZES.items():
    monkeypatch.setattr(real_model_bench, name, value)
  recommended = real_model_bench.oneshot.get_config

  def recipe():
    config = recommended()
    config.calibration.seq_len, config.calibration.batch = 16, 8
    return config

  monkeypatch.setattr(real_model_bench.oneshot, "get_config", recipe)
  model = tmp_path / "model"
  shutil.copytree(small_model, model)
  (model / "chat_template.jinja").write_text(small_runs.CHAT_TEMPLATE)
  text = sources.embedded_text("train")[:100_000]
  for name in ("c4_sample", "wikitext2_raw_test", "books"):
    (tmp_path / "text").mkdir(exist_ok=True)
    parts = text.replace("\n\n", MARK) if name == "c4_sample" else text
    (tmp_path / "text" / f"{name}.txt").write_text(parts)
  (tmp_path / "tinyshakespeare").mkdir()
  (tmp_path / "tinyshakespeare" / "input.txt").write_text(text)
  small_runs.write_questions(tmp_path / "eval")
  where = tmp_path / "work", tmp_path / "cells.jsonl"
  return lambda: real_model_bench.Bench(model, tmp_path, *where, 0)


@pytest.mark.slow
def test_goes_on_and_reports(bench, tmp_path, monkeypatch):
  import real_model_bench
  import real_model_numbers as numbers
  import real_model_report as report
  from real_model_bench import DENSE, SCRATCH, WARM, Cell
  from real_model_questions import from_hex, to_hex

  first = bench()
  dense = Cell("prune", DENSE)
  paper = Cell("prune", "paper", 0.2, 0, 256)
  default, warm = (paper._replace(method=m) for m in ("default", WARM))
  trained = paper._replace(
    part="recover", stages=2, train_tokens=1024, alpha=1.0, rate=1e-4
  )
  scratch = trained._replace(method=SCRATCH, stages=1, alpha=0.0)
  plain = trained._replace(stages=1)
  whole = plain._replace(method=DENSE, ratio=0.0, tokens=0, alpha=0.0)
  ours = plain._replace(method=WARM)
  staged = trained._replace(method="default")
  cells = [dense, paper, default, warm, trained, plain, scratch, whole, ours]
  of_tasks = (dense, paper, default, plain)
  cells += [c._replace(part="tasks") for c in of_tasks]
  cells += [c._replace(part="length") for c in (dense, paper)]
  learnt = plain._replace(source=real_model_bench.ANSWERS)
  cells += [learnt, *(c._replace(part="answers") for c in (paper, learnt))]
  found = {cell: first.get(cell) for cell in cells}
  assert found[paper]["params"] <= 0.8 * found[dense]["params"]

  by_stage, in_one = (first.settings(c).calibration for c in (staged, default))
  assert 2 * by_stage.refit_samples == in_one.refit_samples

  # Cut off behind its first checkpoint, a training goes on to the same end.
  assert [at for at, _ in found[plain]["curve"]] == [512, 1024]
  (tmp_path / "cells.jsonl").rename(tmp_path / "found.jsonl")
  recover, calls = real_model_bench.loop.recover, []

  def cut_off(training, rows, begin, *others):
    calls.append(begin)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return recover(training, rows, begin, *others)

  monkeypatch.setattr(real_model_bench.loop, "recover", cut_off)
  with pytest.raises(KeyboardInterrupt):
    bench().get(plain)
  assert bench().get(plain)["texts"] == found[plain]["texts"]
  assert calls == [0, 2, 2]
  assert not [*(tmp_path / "work" / "training").iterdir()]
  (tmp_path / "found.jsonl").rename(tmp_path / "cells.jsonl")

  # Held-out prompts are other ones than those that are learnt from.
  files = [first.asked(split) for split in ("train", "heldout")]
  told = [
    {row["messages"][0]["content"] for row in json_files.read_lines(file)}
    for file in files
  ]
  assert told[0]
  assert told[1]
  assert not told[0] & told[1]
  kl = found[paper._replace(part="answers")]["answer_kl"]
  assert found[learnt._replace(part="answers")]["answer_kl"] != kl

  # The evaluation that everyone else uses says the same.
  rows = first.windows["books"]
  _, total, number = perplexity.perplexity(
    *first.dense, rows.reshape(-1), rows.shape[1], 2
  )
  mine = np.mean(found[dense]["texts"]["books"])
  assert mine == pytest.approx(total / number, rel=1e-4)

  again = bench()
  monkeypatch.setattr(again, "staged", None)  # nothing is measured twice
  assert {cell: again.get(cell) for cell in cells} == found

  (tmp_path / "docs").mkdir()
  for file in (tmp_path / "docs" / "results.md", tmp_path / "README.md"):
    file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
  for module in (numbers, report):
    monkeypatch.setattr(module, "TASKS", {"arc_easy": 0.25})
  report.write(tmp_path / "cells.jsonl", tmp_path)
  readme = (tmp_path / "README.md").read_text()
  rise = np.mean(found[paper]["texts"]["c4"]) - np.mean(
    found[dense]["texts"]["c4"]
  )
  shown = numbers.shown(rise, "+.3f")
  read = found[paper]["calibration_tokens"]
  assert read == 256 * found[paper]["prune_steps"]
  assert f"| Adapt-Pruner (the paper's) | {read:,} | {shown} |" in readme
  told = found[default]["calibration_tokens"]
  assert told == (found[default]["prune_steps"] + 3) * 64 * 16
  assert "old" not in readme
  results = (tmp_path / "docs" / "results.md").read_text()
  assert results.count("####") == 6
  gains = [
    np.mean(found[cell]["texts"]["c4"]) - np.mean(found[other]["texts"]["c4"])
    for cell, other in ((ours, plain), (warm, default))
  ]
  assert (
    f"| 1,024 | 0 | 1 | KL at 2 | KL at 2 | {numbers.shown(gains[0], '+.3f')} ("
    in results
  )
  assert gains[1]  # temperatures differ
  line = json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[0])
  assert line["cell"]["method"] == DENSE
  assert from_hex(to_hex([1, 0, 1]), 3).tolist() == [1, 0, 1]


@pytest.mark.slow
def test_budgets_asks_the_same_questions(bench, tmp_path, monkeypatch):
  import budgets_bench
  from real_model_bench import DENSE, Cell

  monkeypatch.setattr(budgets_bench, "TEST_BEGIN", SIZES["TEST_BEGIN"])
  monkeypatch.setattr(budgets_bench, "SLICE", 240)
  where = tmp_path / "budgets", tmp_path / "rows.jsonl"
  rows = budgets_bench.Bench(tmp_path / "model", tmp_path, *where, 0)
  found = rows.measured(tmp_path / "model")
  asked = bench().get(Cell("tasks", DENSE))
  assert found["correct"] == asked["correct"]
  assert np.isfinite(found["nats"]["books"]).all()
