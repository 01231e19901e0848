"""Hours turned into tokens: by hand, and in a run whose clock is given."""

import dataclasses

import pytest

from adapt_pruner_jax import cli
from adapt_pruner_jax.distributed.stopping import Stopping
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.planning import cost, hours, memory
from adapt_pruner_jax.planning.hardware import Hardware
from adapt_pruner_jax.pruning import targets
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs import deadline, tiny_model
from adapt_pruner_jax.storage import json_files
from tests import small_runs

FULL = tiny_model.config_of(small_runs.SMALL)


def recipe(path="none", stages=2, **train):
  config = small_runs.recipe(path, stages=stages)
  config.train = dataclasses.replace(config.train, **train)
  return config


def test_the_hours_are_filled():
  config = recipe(hours=1.0)
  target = targets.resolve_target(FULL, config.prune)
  with_tokens = recipe(tokens=config.data.step_tokens)
  rows = cost.stage_table(with_tokens, FULL, target)
  flops = sum(row["prune_flops"] for row in rows)
  # Pruning takes 2 x 100 s, compiling 2 x 40 s, a step 10 s, of 2880 s.
  speed = hours.Speed(10.0, 40.0)
  found = hours.choose(with_tokens_of(config), FULL, speed, flops / 100)
  assert found["stages"] == 2
  assert found["tokens"] == 260 * config.data.step_tokens
  assert found["prune_seconds"] == 280
  # What went before, such as the timing of the step, is of the hours too.
  args = with_tokens_of(config), FULL, speed, flops / 100
  found = hours.choose(*args, spent=600)
  assert found["tokens"] == 200 * config.data.step_tokens


def test_stages_that_would_take_too_long_are_fewer():
  config = with_tokens_of(recipe(hours=1.0, stages=9))
  found = hours.choose(config, FULL, hours.Speed(1.0, 400.0), 1e12)
  assert found["stages"] == 3  # 1200 s of compiling are at most half of 2880
  assert found["tokens"] == (2880 - 1200 - 1) * config.data.step_tokens


def test_too_few_hours_say_how_many():
  config = with_tokens_of(recipe(hours=0.01, stages=1))
  said = "hours=0.01 are too few: .* about 0.14;"  # 360 + 40 s, by 0.8
  with pytest.raises(UserError, match=said):
    hours.choose(config, FULL, hours.Speed(40.0, 360.0), 1e15)


@pytest.mark.parametrize(
  ("most", "wanted"),
  [
    (100, {"remat": "auto", "accumulation": 1, "lora_rank": 0}),
    (70, {"remat": "full", "accumulation": 1, "lora_rank": 0}),
    (40, {"remat": "full", "accumulation": 2, "lora_rank": 0}),
    (16, {"remat": "auto", "accumulation": 1, "lora_rank": 16}),
  ],
)
def test_what_fits_the_memory(most, wanted, monkeypatch):
  """The first of: as it is, recomputed, split, adapters."""

  def measured(config, full, student, devices, size, kind):
    t = config.train
    size = 64 / t.accumulation + 30 * (t.remat != "full")
    return {"training": {"all": 1.0 if t.lora_rank else max(size, 17)}}

  monkeypatch.setattr(memory, "measure", measured)
  config = with_tokens_of(recipe(hours=1.0))
  hardware = Hardware(devices=1, memory=most / 0.92)
  made = hours.fitted(config, FULL, FULL, hardware)
  assert {name: getattr(made.train, name) for name in wanted} == wanted
  assert made.prune == config.prune


def test_microbatches_divide_over_the_devices(monkeypatch):
  tried = []

  def measured(config, *_):
    tried.append((config.train.accumulation, config.train.lora_rank))
    return {"training": {"all": 9.0 if not config.train.lora_rank else 0.0}}

  monkeypatch.setattr(memory, "measure", measured)
  config = with_tokens_of(recipe(hours=1.0))
  config.data.batch = 32
  hours.fitted(config, FULL, FULL, Hardware(devices=8, memory=1.0))
  assert tried == [(1, 0), (1, 0), (2, 0), (4, 0), (1, hours.RANK)]


def test_a_cut_vocabulary_counts_towards_the_target():
  """It may be all that is removed, or reach what units alone cannot."""
  whole = dataclasses.replace(FULL, vocab_size=100 * FULL.vocab_size)
  config = recipe(tokens=1, hours=1.0)
  config.prune.ratio = 0.9
  speed = hours.Speed(10.0, 0.0)
  given = with_tokens_of(config), FULL, speed, 1e12
  with pytest.raises(UserError):
    hours.choose(*given)
  assert hours.choose(*given, whole=whole)["tokens"]


def test_nothing_fits(monkeypatch):
  monkeypatch.setattr(memory, "measure", lambda *_: {"training": {"all": 9.0}})
  with pytest.raises(UserError, match="not even of adapters"):
    hours.fitted(recipe(), FULL, FULL, Hardware(devices=1, memory=1.0))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hours": 1.0, "tokens": 9}, "are both given"),
    ({"hours": -1.0}, "must be at least 0"),
  ],
)
def test_bad_input(changes, message):
  with pytest.raises(UserError, match=message):
    hours.checked(recipe(**changes))


def test_hours_need_a_target():
  config = recipe(hours=1.0, stages=1)
  config.prune.ratio, config.prune.max_steps = 0.0, 2
  with pytest.raises(UserError, match=r"give --config\.prune\.ratio"):
    hours.checked(config)


def test_training_ends_with_the_hours(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
  signals = Stopping()
  assert deadline.stopping(0.0, signals, 0) is signals
  ending = deadline.stopping(1.0, signals, spent=2800, later=200)
  now[0] += 0.92 * 3600 - 3000
  assert not ending.now()
  now[0] += 1
  assert ending.now()
  ending = deadline.stopping(1.0, signals, spent=0)
  assert not ending.now()
  signals.ask()
  assert ending.now()


def test_a_recipe_that_never_ran_leaves_the_choice(tmp_path, monkeypatch):
  """With --overwrite, and then refused: the run that is there can go on."""
  speeds = iter([hours.Speed(10.0, 0.0), hours.Speed(5.0, 0.0)])
  monkeypatch.setattr(hours, "timed", lambda *_: next(speeds))
  first, other = (recipe("model", hours=h, stages=1) for h in (0.1, 0.2))
  tokens = lambda config: (
    hours.settle(config, tmp_path, FULL, Log(None), anew=True).train.tokens
  )
  found = [tokens(first), tokens(other), tokens(first), tokens(other)]
  assert found == found[:2] * 2
  assert found[0] != found[1]


def test_what_may_change_keeps_the_choice(tmp_path):
  """As in a run: what its own errors advise must not end it."""
  config = recipe("model", hours=0.1, stages=1)
  chosen = {"tokens": 64, "stages": 1, "accumulation": 1}
  chosen |= {"lora_rank": 0, "remat": "none"}
  kept = {"asked": dataclasses.asdict(config), "chosen": chosen}
  json_files.write_json(tmp_path / "hours.json", kept)
  (tmp_path / "config.json").touch()
  settle = lambda: hours.settle(config, tmp_path, None, None).train
  settled = lambda: settle().tokens
  config.train.skip_nonfinite, config.train.remat = True, "full"
  config.log.trackers, config.mesh.data = "wandb", 1
  assert settled() == 64
  assert settle().remat == "full"
  config.train.weight_decay = 0.5
  assert settled() == config.data.step_tokens
  json_files.write_json(tmp_path / "hours.json", {"asked": "of old"})
  assert settled() == config.data.step_tokens
  # Nothing is timed for a run that another recipe has claimed.
  (tmp_path / "hours.json").unlink()
  assert settled() == config.data.step_tokens


@pytest.mark.slow
def test_a_run_that_is_told_hours(tmp_path, monkeypatch, capsys):
  """What was chosen is kept, and the same command has nothing left to do."""
  model = small_runs.make_model(tmp_path)
  calls = []

  def timed(*_):
    calls.append(1)
    return hours.Speed(10.0, 0.0)

  monkeypatch.setattr(hours, "timed", timed)
  config = recipe(model, hours=0.1, stages=1)
  config.prune.method, config.prune.group_importance = "curvature", "random"
  config.eval.text = ""
  flags = small_runs.flags_of(config, tmp_path / "work")
  for _ in range(2):
    with pytest.raises(SystemExit) as ended:
      cli.main(["run", *flags])
    assert not ended.value.code
  assert calls == [1]
  chosen = json_files.read_json(tmp_path / "work" / "hours.json")["chosen"]
  summary = json_files.read_json(tmp_path / "work" / "summary.json")
  assert summary["train_tokens"] == chosen["tokens"] > 0
  assert "is finished" in capsys.readouterr().out
  flags = [f.replace("hours=0.1", "hours=0.2") for f in flags]
  with pytest.raises(SystemExit) as ended:
    cli.main(["run", *flags])
  assert ended.value.code
  assert "another recipe" in capsys.readouterr().err


def with_tokens_of(config):
  train = dataclasses.replace(config.train, tokens=config.data.step_tokens)
  return dataclasses.replace(config, train=train)
