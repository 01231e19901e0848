"""Comparisons on a model of 27 thousand parameters and on stories260K."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import CHOICES, Config
from adapt_pruner_jax.data import calibration, packing
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.pruning import methods, surgery, targets
from adapt_pruner_jax.pruning.task import PruneTask
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import compare, compare_methods, compare_table
from adapt_pruner_jax.runs.inputs import load_model, open_inputs, read_eval_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

TWO = "adapt,uniform"


@pytest.fixture(scope="module")
def recipe(shared_data):
  """stories260K with a short text and few calibration windows."""
  config = Config()
  config.model.path = str(shared_data / "models" / "stories260K")
  text = shared_data / "text"
  config.calibration.source = f"text:{text / 'tinystories_train.txt'},limit=50"
  config.calibration.samples = 16
  config.calibration.refit_samples = 32
  config.calibration.batch = 16
  config.data.source = config.calibration.source
  config.data.seq_len = 64
  config.data.batch = 8
  config.train.learning_rate = 1e-3
  config.eval.text = str(text / "tinystories_heldout.txt")
  config.prune.step_size = 0.1
  config.log.tensorboard = False
  return config


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
  """A comparison of two methods at two ratios."""
  path = tmp_path_factory.mktemp("compare")
  return compare.compare(recipe, path, TWO, "0.4,0.2"), path


def by_key(found: dict) -> dict:
  return {(r["method"], r["ratio"]): r for r in found["rows"]}


def without_seconds(rows: list[dict]) -> list[dict]:
  return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


# ---- A comparison ------------------------------------------------------------


def test_rows_are_complete_and_in_order(finished):
  found, path = finished
  assert [(r["method"], r["ratio"]) for r in found["rows"]] == [
    ("dense", 0.0),
    ("adapt", 0.2),
    ("uniform", 0.2),
    ("adapt", 0.4),
    ("uniform", 0.4),
  ]
  assert json.loads((path / "compare.json").read_text()) == found
  assert found["params"] == 260_032
  for row in found["rows"][1:]:
    assert row["target_params"] == math.floor(260_032 * (1 - row["ratio"]))
    # Within one MLP channel, three times 64 weights, of the target.
    assert 0 <= row["target_params"] - row["params"] < 192
    assert row["removed"] == 1 - row["params"] / 260_032
    assert row["seconds"] > 0
    assert row["calibration_tokens"] % (16 * 64) == 0
    assert "train_tokens" not in row


def test_rows_equal_what_the_parts_give(finished, recipe):
  """The same prune and perplexity, each called by hand."""
  found, _ = finished
  config, params = load.load(recipe.model.path, "float32")
  tokenizer = load_tokenizer(recipe.model.path)
  windows = calibration.calibration_data(
    recipe.calibration, tokenizer, config.vocab_size, 0
  )
  text = read_eval_text(recipe.eval.text)
  text = packing.heldout_tokens(text, tokenizer, config.vocab_size)
  row = by_key(found)["adapt", 0.4]
  settings = dataclasses.replace(recipe.prune, ratio=0.4)
  target = targets.resolve_target(config, settings)
  task = PruneTask(config, params, settings, windows.batch, target, batch=16)
  pruned = methods.prune(task)
  assert row["kv_groups"] == list(pruned.config.kv_groups)
  assert row["ffn"] == list(pruned.config.ffn_widths)
  assert row["calibration_tokens"] == len(pruned.trace) * 16 * 64
  length = min(config.context, 2048)
  measure = lambda *pair: perplexity.perplexity(
    *pair, text, length, 8, begin_id=tokenizer.begin_id
  )[0]
  want = measure(pruned.config, pruned.params)
  assert row["perplexity"] == pytest.approx(want, rel=1e-4)
  dense = measure(config, params)
  assert by_key(found)["dense", 0.0]["perplexity"] == pytest.approx(
    dense, rel=1e-5
  )


def test_uniform_is_amplitude_zero(finished):
  row = by_key(finished[0])["uniform", 0.4]
  # All MLPs at one sparsity but for the trimmed last step.
  assert max(row["ffn"]) - min(row["ffn"]) <= 172 * 0.1 + 1


def test_markdown_and_plot(finished):
  found, path = finished
  text = (path / "compare.md").read_text()
  rows = re.findall(r"^\| (\d+%) \| (\w+) \| ([\d,]+) \| ([\d.]+) ", text, re.M)
  assert [r[1] for r in rows] == [r["method"] for r in found["rows"]]
  assert [r[2] for r in rows] == [f"{r['params']:,}" for r in found["rows"]]
  assert found["command"] in text
  svg = ET.parse(path / "compare.svg").getroot()
  labels = {t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")}
  assert {"adapt", "uniform", "dense"} <= labels
  assert (path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_command_makes_the_same_recipe(finished, recipe):
  """Its overrides, applied to the defaults, are the recipe."""
  command = finished[0]["command"].split()
  again = Config()
  for name, value in re.findall(r"--config\.([\w.]+)=(\S+)", " ".join(command)):
    *sections, field = name.split(".")
    section = again
    for part in sections:
      section = getattr(section, part)
    kind = type(getattr(section, field))
    setattr(section, field, value == "True" if kind is bool else kind(value))
  assert again == recipe


# ---- Going on ----------------------------------------------------------------


def test_more_methods_add_rows(finished, recipe, tmp_path, monkeypatch):
  found, path = finished
  (tmp_path / "compare.json").write_bytes((path / "compare.json").read_bytes())
  (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
  done = []
  do_job = compare.do_job
  monkeypatch.setattr(
    compare, "do_job", lambda *a: done.append(a[:2]) or do_job(*a)
  )
  more = compare.compare(recipe, tmp_path, "paper", "0.2")
  assert done == [("paper", 0.2)]
  assert len(more["rows"]) == len(found["rows"]) + 1
  assert [r for r in more["rows"] if r["method"] != "paper"] == found["rows"]
  # Ratios stay together.
  assert [r["ratio"] for r in more["rows"]] == [0, 0.2, 0.2, 0.2, 0.4, 0.4]


def test_cut_after_a_row_and_continued(finished, recipe, tmp_path, monkeypatch):
  """As after a kill: what is saved is saved, the rest is done again."""
  do_job = compare.do_job

  class Killed(BaseException):
    pass

  def killed(name, ratio, *rest):
    if (name, ratio) == ("uniform", 0.2):
      raise Killed
    return do_job(name, ratio, *rest)

  with monkeypatch.context() as patched:
    patched.setattr(compare, "do_job", killed)
    with pytest.raises(Killed):
      compare.compare(recipe, tmp_path, TWO, "0.2,0.4")
  saved = json.loads((tmp_path / "compare.json").read_text())["rows"]
  assert [r["method"] for r in saved] == ["dense", "adapt"]
  assert not (tmp_path / "compare.md").exists()
  again = compare.compare(recipe, tmp_path, TWO, "0.2,0.4")
  assert again["rows"][:2] == saved  # not computed anew, seconds and all
  assert without_seconds(again["rows"]) == without_seconds(finished[0]["rows"])


def test_asked_to_stop(recipe, tmp_path, monkeypatch):
  do_job = compare.do_job

  def stop(name, *rest):
    if name == "adapt":
      os.kill(os.getpid(), signal.SIGTERM)
    return do_job(name, *rest)

  monkeypatch.setattr(compare, "do_job", stop)
  with pytest.raises(StoppedError, match="the same command continues"):
    compare.compare(recipe, tmp_path, TWO, "0.2")
  saved = json.loads((tmp_path / "compare.json").read_text())["rows"]
  assert [r["method"] for r in saved] == ["dense"]


def test_other_recipe_is_refused(finished, recipe):
  other = dataclasses.replace(recipe, seed=3)
  with pytest.raises(UserError, match="another recipe: seed: 0 -> 3"):
    compare.compare(other, finished[1], TWO, "0.2")
  with pytest.raises(UserError, match=r"train\.tokens: 0 -> 512"):
    compare.compare(recipe, finished[1], TWO, "0.2", recover_tokens=512)


def test_overwrite(finished, recipe, tmp_path, monkeypatch):
  """Another comparison goes, a finished one too; an unfinished one goes on."""
  names = ("compare.json", "compare.md", "config.json")
  for name in names:
    (tmp_path / name).write_bytes((finished[1] / name).read_bytes())
  (tmp_path / "notes.txt").write_text("mine")
  begun_with = []

  def run_jobs(jobs, found, inputs, stopping):
    begun_with.append(len(found["rows"]))
    raise KeyboardInterrupt

  monkeypatch.setattr(compare, "run_jobs", run_jobs)
  for recipe_, ratios in (
    (recipe, "0.2,0.6"),  # has rows to add
    (recipe, "0.2"),  # finished
    (dataclasses.replace(recipe, seed=3), "0.2"),
  ):
    with pytest.raises(KeyboardInterrupt):
      compare.compare(recipe_, tmp_path, TWO, ratios, overwrite=True)
  assert begun_with == [5, 0, 0]
  left = {path.name for path in tmp_path.iterdir()}
  assert left - {"cache", "run.lock"} == {"config.json", "notes.txt"}
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_kill_nine(recipe, tmp_path, subprocess_env):
  """The command, killed after its first row, then run to the end."""
  words = compare_table.command(recipe, tmp_path, "adapt", "0.2", 0, False)
  command = [sys.executable, "-m", "adapt_pruner_jax", *words.split()[1:]]
  options = {"env": subprocess_env(1), "text": True}
  with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as running:
    for line in running.stdout:
      if "2 of 2" in line:
        running.kill()
        break
  saved = json.loads((tmp_path / "compare.json").read_text())["rows"]
  assert [r["method"] for r in saved] == ["dense"]
  subprocess.run(command, check=True, capture_output=True, **options)
  rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
  assert rows[0] == saved[0]
  assert [r["method"] for r in rows] == ["dense", "adapt"]


# ---- Recovery ----------------------------------------------------------------


@pytest.fixture(scope="module")
def recovered(recipe, tmp_path_factory):
  """Trained on 20 steps each, with the same shape from scratch beside it."""
  path = tmp_path_factory.mktemp("recovered")
  return compare.compare(
    recipe, path, TWO, "0.4", recover_tokens=20 * 512, from_scratch=True
  )


def test_recovery_at_equal_tokens(recovered, finished):
  rows = by_key(recovered)
  for name in "adapt", "uniform":
    row = rows[name, 0.4]
    assert row["train_tokens"] == 20 * 512
    # What was pruned is what is pruned without training.
    before = by_key(finished[0])[name, 0.4]
    assert row["pruned"]["perplexity"] == pytest.approx(
      before["perplexity"], rel=1e-5
    )
    assert row["perplexity"] < row["pruned"]["perplexity"]
  assert "train_tokens" not in rows["dense", 0.0]


def test_from_scratch_has_the_shape_of_adapt(recovered):
  rows = by_key(recovered)
  scratch, adapted = rows["from_scratch", 0.4], rows["adapt", 0.4]
  for field in "params", "kv_groups", "ffn", "train_tokens":
    assert scratch[field] == adapted[field]
  # It has learnt something, and not yet what a pruned model knows.
  assert adapted["perplexity"] < scratch["perplexity"] < 512
  assert "from_scratch" in compare_table.markdown(recovered)


def test_recovery_spares_the_dense_model(recipe, tmp_path):
  """Its arrays are used for every row, and training donates what it gets."""
  with Log(None) as log:
    shared = compare_methods.shared_recipe(recipe, 1024)
    inputs = open_inputs(shared, tmp_path, log)
    dense = load_model(inputs)
    before = jax.tree.map(np.array, dense[1])
    settings = compare_methods.settings_of("adapt", 0.2, shared.prune)
    args = (dense, inputs, "a test", lambda: None)
    pair, _ = compare.prune(settings, *args)
    compare.recover(pair, shared.train, *args)
  jax.tree.map(np.testing.assert_array_equal, dense[1], before)


def test_lora_where_a_half_layer_is_gone(recipe, tmp_path):
  lora = dataclasses.replace(recipe.train, lora_rank=2)
  config = dataclasses.replace(recipe, train=lora)
  with Log(None) as log:
    shared = compare_methods.shared_recipe(config, 1024)
    inputs = open_inputs(shared, tmp_path, log)
    dense = load_model(inputs)
    masks = surgery.to_masks(surgery.everything(dense[0]), dense[0])
    masks["K"][1] = False
    masks["F"][2] = False
    pair = surgery.gather(*dense, surgery.to_kept(masks), inputs.mesh)
    new, params = compare.recover(
      pair, shared.train, dense, inputs, "a test", lambda: None
    )
  assert new == pair[0]
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == model_config.param_shapes(new)
  assert not np.array_equal(params["layer_0"]["q"], pair[1]["layer_0"]["q"])


# ---- Methods that fail -------------------------------------------------------


def test_a_method_that_fails_gets_a_row(recipe, tmp_path):
  found = compare.compare(recipe, tmp_path, "slicegpt+refit,adapt", "0.3")
  rows = by_key(found)
  assert "SliceGPT" in rows["slicegpt+refit", 0.3]["error"]
  assert "params" not in rows["slicegpt+refit", 0.3]
  assert "error" not in rows["adapt", 0.3]
  assert "slicegpt+refit at 30%" in (tmp_path / "compare.md").read_text()


def test_a_ratio_that_none_can_do(recipe, tmp_path):
  with pytest.raises(UserError, match=r"no method could remove 99%.*says why"):
    compare.compare(recipe, tmp_path, "adapt", "0.99,0.2")
  rows = by_key(json.loads((tmp_path / "compare.json").read_text()))
  assert "cannot be reached" in rows["adapt", 0.99]["error"]
  assert rows["adapt", 0.2]["params"] <= 208_025
  assert (tmp_path / "compare.md").exists()


def test_tasks_are_columns(recipe, shared_data, tmp_path):
  tasks = Config().eval
  tasks.tasks, tasks.tasks_dir = "openbookqa", str(shared_data / "eval")
  config = dataclasses.replace(recipe, eval=tasks)
  found = compare.compare(config, tmp_path, "adapt", "0.4")
  columns, cells = compare_table.table(found["rows"])
  assert columns[:4] == ["removed", "method", "parameters", "openbookqa"]
  for row, cell in zip(found["rows"], cells, strict=True):
    score = row["evaluation"]["tasks"]["openbookqa"]["acc_norm"]
    assert cell[3] == f"{score:.1%}"
    assert "perplexity" not in row
  assert not (tmp_path / "compare.svg").exists()
  tasks.tasks = "openbokqa"
  with pytest.raises(UserError, match="openbookqa"):
    compare.compare(config, tmp_path / "other", "adapt", "0.4")


# ---- Bad input ---------------------------------------------------------------


def test_names():
  assert compare_methods.parse_names(" adapt , flap+refit") == [
    "adapt",
    "flap+refit",
  ]
  every = compare_methods.parse_names("all")
  assert {*CHOICES["prune.method"]} - {*every} == {
    "reap"
  }  # has to have experts
  assert {"uniform", "paper"} <= {*every}
  assert {"adapt+refit", "curvature+refit"} <= {*every}


@pytest.mark.parametrize(
  "text, message",
  [
    ("adept", r"no method adept \(did you mean adapt\?\)"),
    ("adapt,flap+refitt", r"no method flap\+refitt"),
    ("adapt,adapt", "once each"),
    ("", "once each"),
  ],
)
def test_bad_names(text, message):
  with pytest.raises(UserError, match=message):
    compare_methods.parse_names(text)


@pytest.mark.parametrize("text", ["", "0", "1", "0.2,x", "-0.1", "nan"])
def test_bad_ratios(text):
  with pytest.raises(UserError, match="--ratios="):
    compare_methods.parse_ratios(text)


def test_settings_of_names():
  config = Config()
  config.prune.trim = False
  config.prune.stages = 3
  base = compare_methods.shared_recipe(config, 0).prune
  assert (base.stages, base.trim) == (1, False)
  of = lambda name: compare_methods.settings_of(name, 0.3, base)
  assert dataclasses.asdict(of("flap")) == dataclasses.asdict(base) | {
    "method": "flap",
    "ratio": 0.3,
    "refit": "none",
  }
  assert (of("uniform").method, of("uniform").amplitude) == ("adapt", 0.0)
  paper = of("paper")
  assert (paper.method, paper.gqa_fold) == ("adapt", "reference")
  assert paper.trim
  assert (of("curvature+refit").method, of("curvature+refit").refit) == (
    "curvature",
    "final",
  )
  config.prune.refit = "5"
  base = compare_methods.shared_recipe(config, 0).prune
  assert (of("curvature+refit").refit, of("curvature").refit) == ("5", "none")
  assert of("flap+refit").refit == "final"  # only ours refit between


def test_nothing_to_compare_by(recipe, tmp_path):
  blind = dataclasses.replace(recipe, eval=Config().eval)
  with pytest.raises(UserError, match=r"nothing to compare by.*eval\.text"):
    compare.compare(blind, tmp_path, TWO, "0.2")
  assert not list(tmp_path.iterdir())


def test_from_scratch_needs_tokens_and_adapt(recipe, tmp_path):
  with pytest.raises(UserError, match="needs --recover_tokens"):
    compare.compare(recipe, tmp_path, TWO, "0.2", from_scratch=True)
  with pytest.raises(UserError, match="add adapt"):
    compare.compare(
      recipe,
      tmp_path,
      "uniform",
      "0.2",
      recover_tokens=512,
      from_scratch=True,
    )


def test_answers_are_columns():
  rows = [
    {"method": "dense", "ratio": 0.0, "answer_agreement": 1.0, "answer_kl": 0},
    {"method": "flap", "ratio": 0.2, "answer_agreement": 0.5, "answer_kl": 2.0},
    {"method": "adapt", "ratio": 0.2, "error": "no"},
  ]
  columns, cells = compare_table.table(rows)
  at = columns.index("tokens as dense")
  assert columns[at : at + 2] == ["tokens as dense", "KL to dense"]
  assert [row[at] for row in cells] == ["100.0%", "50.0%", ""]
  assert [row[at + 1] for row in cells] == ["0.000", "2.000", ""]


def test_ruined_models_are_shown():
  assert compare_table.shown("Infinity") == "inf"
  assert compare_table.shown(5.8791) == "5.879"
  assert compare_table.shown(123456.0) == "1.2e+05"
  row = {"method": "adapt", "ratio": 0.9, "removed": 0.9}
  assert not compare_table._drawable([row | {"perplexity": "Infinity"}])
  assert compare_table._drawable([row | {"perplexity": 7.0}])
