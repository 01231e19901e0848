"""`data.bos` in a run: where it counts, and where it is said."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import processors

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import inputs, run
from adapt_pruner_jax.runs.tiny_model import END
from tests.small_runs import recipe


@pytest.fixture(scope="module")
def begun(small_model, tmp_path_factory):
  """The small model, with a tokenizer that adds a begin token."""
  path = tmp_path_factory.mktemp("begun") / "model"
  shutil.copytree(small_model, path)
  backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
  backend.post_processor = processors.TemplateProcessing(
    single=f"{END} $A", special_tokens=[(END, 0)]
  )
  backend.save(str(path / "tokenizer.json"))
  return path


def opened(path, work, bos):
  config = recipe(path, stages=1, tokens=256)
  config.data.bos = bos
  return inputs.open_inputs(config, work, Log(None))


def test_all_that_a_run_reads(begun, small_model, tmp_path):
  """Windows and rows start with it; with none, and without one, with text."""
  auto = opened(begun, tmp_path / "a", "auto")
  none = opened(begun, tmp_path / "n", "none")
  plain = opened(small_model, tmp_path / "p", "auto")
  assert (auto.calibration.batch(0)[:, 0] == 0).all()
  assert (auto.rows.batch(0)["tokens_BT"][:, 0] == 0).all()
  assert auto.eval_tokens[0] == 0
  assert auto.tokenizer.begin_id == 0
  for other in (none, plain):
    assert not (other.calibration.batch(0)[:, 0] == 0).all()
    assert not (other.rows.batch(0)["tokens_BT"][:, 0] == 0).all()
    assert other.tokenizer.begin_id is None


@pytest.mark.slow
def test_it_is_recorded_and_said(begun, tmp_path, capsys):
  found = {}
  for bos in ("auto", "none"):
    config = recipe(begun, stages=1, method="magnitude")
    config.data.bos = bos
    work = tmp_path / bos
    run.run(config, work)
    found[bos] = summary = json.loads((work / "summary.json").read_text())
    assert summary["bos"] == bos
    assert json.loads((work / "config.json").read_text())["data"]["bos"] == bos
    said = capsys.readouterr().out
    line = {
      "auto": f"windows start with {END}; --config.data.bos=none: without",
      "none": f"windows without {END}; --config.data.bos=auto: with",
    }[bos]
    # Of the original and of the result.
    assert said.count(line) == 2
    assert (f"perplexity, windows from {END}" in said) == (bos == "auto")
    report = (work / "report.html").read_text()
    assert ("windows start with" in report) == (bos == "auto")
  assert found["auto"]["begin_token"] == END
  assert found["none"]["begin_token"] is None
  # Other windows, so another number.
  before = [found[bos]["perplexity_before"] for bos in found]
  assert before[0] != before[1]


def test_bos_is_checked(begun, tmp_path):
  config = recipe(begun)
  config.data.bos = "yes"
  with pytest.raises(
    UserError, match=r"data\.bos=yes is not one of auto, none"
  ):
    run.run(config, tmp_path)
