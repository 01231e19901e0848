import io
import json
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.reporting import log as log_
from adapt_pruner_jax.reporting import progress, tensorboard, trace, trackers
from adapt_pruner_jax.storage import publish
from tests import small_runs

HEAD = """
import sys
from adapt_pruner_jax.reporting.log import Log
log = Log(None)
for number in range(20_000):
  log.say(f"line {number}")
print("all was said", file=sys.stderr)
"""


def test_a_reader_that_goes_away_does_not_end_the_run():
  """As `| tee log`, which Ctrl-C ends too."""
  program = subprocess.Popen(
    [sys.executable, "-c", HEAD],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert program.stdout.readline() == "line 0\n"
  program.stdout.close()
  assert program.stderr.read() == "all was said\n"
  assert program.wait() == 0


class Clock:
  """A clock that only the test moves."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    for module in (log_, progress, tensorboard):
      monkeypatch.setattr(
        module,
        "time",
        types.SimpleNamespace(
          monotonic=lambda: self.now,
          monotonic_ns=lambda: int(self.now * 1e9),
          time=lambda: 1e9 - self.now,  # goes backwards
        ),
      )


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
  """Makes the console a terminal of 60 columns; returns what it shows."""
  shown = io.StringIO()

  def console(quiet, stderr):
    assert not stderr
    return Console(file=shown, force_terminal=True, width=60, quiet=quiet)

  monkeypatch.setattr(log_, "_Console", console)
  return shown


def rows(directory):
  def refuse(name):
    raise ValueError(name)

  text = (directory / "metrics.jsonl").read_text()
  return [json.loads(r, parse_constant=refuse) for r in text.splitlines()]


def scalars(directory):
  """(step, name, value) of all event files below, and their restarts.

  Read by the format of the files: length, checksum, an Event, checksum.
  """
  from tensorboardX.proto import event_pb2

  found, restarts = [], []
  for path in sorted(directory.glob("events*")):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      for value in event.summary.value:
        found.append((event.step, value.tag, value.simple_value))
      if event.HasField("session_log"):
        restarts.append(event.step)
  return found, restarts


# ---- Console -----------------------------------------------------------------


def test_what_is_said_is_one_line_as_it_is(capsys):
  with log_.Log(None) as logger:
    logger.say("a [bold]long[/bold] line 1 " * 10)
    logger.metrics("train", 1, {"loss": 1.0})
  assert capsys.readouterr().out == "a [bold]long[/bold] line 1 " * 10 + "\n"


def test_phase_without_a_terminal(capsys, clock, monkeypatch):
  monkeypatch.setattr(log_, "peak_memory", lambda: 3 * 10**9)
  with log_.Log(None).phase("stage 1 of 2: train", 10_000, "tokens") as phase:
    clock.now += 60  # compiling
    phase.update(1_000, loss=3.25, params=1_234_567)
    for _ in range(4):
      clock.now += 5
      phase.update(phase.done + 2_000, loss=2.5)
    clock.now += 2
    phase.update(10_000)
  assert capsys.readouterr().out.splitlines() == [
    "stage 1 of 2: train: 10,000 tokens, compiling first",
    "stage 1 of 2: train: 1,000 / 10,000 tokens, loss 3.25, params 1,234,567",
    "stage 1 of 2: train: 5,000 / 10,000 tokens, loss 2.5, params 1,234,567, "
    "400 tokens/s, 12 s left",
    "stage 1 of 2: train: 9,000 / 10,000 tokens, loss 2.5, params 1,234,567, "
    "400 tokens/s, 2 s left",
    "stage 1 of 2: train: 10,000 / 10,000 tokens, loss 2.5, params 1,234,567, "
    "409.1 tokens/s, took 1 min 22 s, memory at most 3.00 GB",
  ]


def test_phase_of_a_resumed_run_starts_where_it_was(capsys, clock):
  with log_.Log(None).phase("train", 100, "steps") as phase:
    phase.update(90)
    clock.now += 10
    phase.update(95)
  assert "95 / 100 steps, 0.5 steps/s, 10 s left" in capsys.readouterr().out


def test_phase_without_updates_or_time(capsys, clock):
  with log_.Log(None).phase("save", 0, "bytes"):
    pass
  with log_.Log(None).phase("save", 2, "files") as phase:
    phase.update(1)
    phase.update(2)  # on the same tick
  assert "save: 0 / 0 bytes, took 0 s" in capsys.readouterr().out


def test_mfu_where_the_peak_is_known(capsys, clock, monkeypatch):
  monkeypatch.setattr(log_, "peak_flops", lambda device: 1e9)
  with log_.Log(None).phase("train", 100, "tokens", flops=4e7) as phase:
    phase.update(0)
    clock.now += 1
    phase.update(100)  # 4e9 FLOP/s on 8 devices
    assert phase.mfu == pytest.approx(0.5)
  assert "100 tokens/s, MFU 50.0%, took 1 s" in capsys.readouterr().out
  monkeypatch.setattr(log_, "peak_flops", lambda device: None)
  with log_.Log(None).phase("train", 100, "tokens", flops=4e7) as phase:
    phase.update(0)
    clock.now += 1
    phase.update(100)
    assert phase.mfu is None


def test_phase_on_a_terminal(terminal):
  logger = log_.Log(None)
  with logger.phase("stage 1 of 2: train [x]", 4_000, "tokens") as phase:
    phase.update(1_000, loss=3.25)
    logger.say("in between")
    phase.update(4_000, loss=2.5, params_now=1_234_567)
  shown = terminal.getvalue()
  assert "in between\n" in shown
  last = shown[shown.rindex("stage 1 of 2") :]
  assert last.startswith("stage 1 of 2: train [x]")
  assert "━" in last
  assert "4,000 / 4,000 tokens, loss 2.5, params now 1,234,567" in last


def test_a_phase_that_fails_gives_the_terminal_back(terminal):
  logger = log_.Log(None)
  with pytest.raises(UserError), logger.phase("train", 1, "steps"):
    raise UserError
  logger.say("after")
  with logger.phase("train", 1, "steps"):
    pass


ROWS = [["adapt", 0.2, 123_456, None], ["flap [x]", 0.25, 7, 12345.678]]
COLUMNS = ["method", "ratio", "params", "perplexity"]


def test_table_without_a_terminal(capsys):
  log_.Log(None).table("Results", COLUMNS, ROWS)
  assert capsys.readouterr().out.splitlines() == [
    "Results",
    "method    ratio   params  perplexity",
    "adapt       0.2  123,456           -",
    "flap [x]   0.25        7      12,346",
  ]


def test_table_on_a_terminal(terminal):
  log_.Log(None).table("Results [x]", COLUMNS, ROWS)
  shown = terminal.getvalue()
  for text in ("Results [x]", "flap [x]", "123,456", "12,346", "perplexity"):
    assert text in shown


@pytest.mark.parametrize(
  "value, text",
  [
    (None, "-"),
    ("x", "x"),
    (True, "True"),
    (1_234_567, "1,234,567"),
    (12345.6, "12,346"),
    (3.14159, "3.142"),
    (2e-5, "2e-05"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
  ],
)
def test_values_for_people(value, text):
  assert progress.show(value) == text


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.4, "0 s"),
    (59.6, "1 min 00 s"),
    (200, "3 min 20 s"),
    (7500, "2 h 05 min"),
  ],
)
def test_durations_for_people(seconds, text):
  assert progress.duration(seconds) == text


# ---- Files -------------------------------------------------------------------


def test_metrics_are_valid_json_and_in_tensorboard(tmp_path, clock):
  with log_.Log(tmp_path) as logger:
    logger.metrics("train", 0, {"loss": 2.5, "tokens": 7, "note": "x"})
    clock.now += 1
    logger.metrics("train", 1, {"loss": float("nan"), "norm": float("inf")})
    logger.metrics("prune", 0, {"loss": jnp.float32(0.5), "by": np.ones(2)})
  assert rows(tmp_path) == [
    {"kind": "train", "step": 0, "loss": 2.5, "tokens": 7, "note": "x"}
    | {"time": 1e9 - 1000},
    {"kind": "train", "step": 1, "loss": "NaN", "norm": "Infinity"}
    | {"time": 1e9 - 1001},
    {"kind": "prune", "step": 0, "loss": 0.5, "by": [1.0, 1.0]}
    | {"time": 1e9 - 1001},
  ]
  train, _ = scalars(tmp_path / "tensorboard" / "train")
  assert train == [(0, "loss", 2.5), (0, "tokens", 7.0)]
  assert scalars(tmp_path / "tensorboard" / "prune")[0] == [(0, "loss", 0.5)]


def test_a_resumed_run_overrides_what_it_redoes(tmp_path):
  with log_.Log(tmp_path) as logger:
    for step in range(4):
      logger.metrics("train", step, {"loss": float(step)})
      logger.metrics("prune", step, {"loss": float(step)})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"kind": "train", "st')  # as after a kill
  with log_.Log(tmp_path) as logger:
    logger.rewind("train", 2)
    logger.rewind("never", 0)
    logger.metrics("train", 2, {"loss": 20.0})
    logger.rewind("train", 2)  # and again in the same process
    logger.metrics("train", 2, {"loss": 21.0})
  kept = [(r["kind"], r["step"], r["loss"]) for r in rows(tmp_path)]
  assert [r[1:] for r in kept if r[0] == "train"] == [
    (0, 0.0),
    (1, 1.0),
    (2, 21.0),
  ]
  assert [r[1] for r in kept if r[0] == "prune"] == [0, 1, 2, 3]
  train, restarts = scalars(tmp_path / "tensorboard" / "train")
  assert restarts == [2, 2]
  assert train[-1] == (2, "loss", 21.0)
  assert scalars(tmp_path / "tensorboard" / "prune")[1] == []


def test_a_full_disk_ends_the_run_with_a_message(small_disk):
  (small_disk / "filler").write_bytes(bytes(6_000_000))
  logger = log_.Log(small_disk)

  def write_on():
    for step in range(1000):
      logger.metrics("train", step, {"text": "x" * 4000, "loss": 2.5})

  with pytest.raises(UserError, match="No space left"):
    write_on()
  assert len(rows(small_disk)) > 100
  (small_disk / "filler").unlink()
  with log_.Log(small_disk) as another:
    another.metrics("train", 1000, {"loss": 2.5})
  assert rows(small_disk)[-1]["step"] == 1000


def test_only_tensorboard_meets_the_full_disk(small_disk):
  """Its file is written now and then; closing it must not hang either."""
  logger = log_.Log(small_disk)
  for step in range(10):
    logger.metrics("train", step, {"loss": 2.5})
  free = publish.shutil.disk_usage(small_disk).free
  (small_disk / "filler").write_bytes(bytes(free))
  with pytest.raises(UserError, match=r"tensorboard/train: No space left"):
    logger.close()


def test_nothing_but_what_is_asked_for(tmp_path, capsys, monkeypatch):
  with log_.Log(tmp_path, tensorboard=False) as logger:
    assert list(tmp_path.iterdir()) == []
    logger.metrics("train", 0, {"loss": 2.5})
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
  monkeypatch.setattr(agreement, "is_writer", lambda: False)  # another host
  quiet = tmp_path / "quiet"
  with log_.Log(quiet) as logger:
    logger.say("not heard")
    logger.table("not", ["heard"], [[1]])
    logger.metrics("train", 0, {"loss": 2.5})
    logger.rewind("train", 0)
    with logger.phase("not heard", 1, "steps") as phase:
      phase.update(1)
  assert not quiet.exists()
  assert capsys.readouterr().out == ""


def test_torch_is_not_loaded(tmp_path, subprocess_env):
  program = """
import sys, pathlib
from adapt_pruner_jax.reporting import log
with log.Log(pathlib.Path(sys.argv[1])) as logger:
  assert "tensorboardX" not in sys.modules
  logger.metrics("train", 0, {"loss": 2.5})
assert "tensorboardX" in sys.modules
assert "torch" not in sys.modules
"""
  subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)],
    env=subprocess_env(),
    check=True,
  )


# ---- Trackers and peaks ------------------------------------------------------


class Tracker(types.ModuleType):
  def __init__(self, name):
    super().__init__(name)
    self.calls = []

  def init(self, **kwargs):
    self.calls.append(kwargs)

  def log(self, values):
    self.calls.append(values)

  def finish(self):
    self.calls.append("finish")


def test_trackers_that_are_asked_for(tmp_path, monkeypatch):
  fakes = {name: Tracker(name) for name in trackers.NAMES}
  for name, fake in fakes.items():
    monkeypatch.setitem(sys.modules, name, fake)
  for step in (3, 4):  # as a run that is continued
    with log_.Log(tmp_path, trackers="wandb, trackio") as logger:
      values = {"loss": 2.5, "bad": float("nan")}
      logger.metrics("train", step, values)
  (known,) = json.loads((tmp_path / "tracker.json").read_text()).values()
  begun = {"project": "adapt-pruner", "resume": "allow"}
  for name, own in (
    ("wandb", {"id": known, "name": tmp_path.name}),
    ("trackio", {"name": f"{tmp_path.name}-{known}"}),
  ):
    rows = ({"train/step": step, "train/loss": 2.5} for step in (3, 4))
    calls = [(begun | own, row, "finish") for row in rows]
    assert fakes[name].calls == [*calls[0], *calls[1]]


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"mean wandb\?"):
    log_.Log(tmp_path, trackers="wanbd")
  refusing = Tracker("wandb")
  refusing.init = lambda **_: 1 / 0  # as one that nobody is logged in to
  monkeypatch.setitem(sys.modules, "wandb", refusing)
  with (
    pytest.raises(UserError, match="wandb does not begin: division by zero;"),
    log_.Log(tmp_path, trackers="wandb") as logger,
  ):
    logger.metrics("train", 0, {"loss": 1.0})
  monkeypatch.setitem(sys.modules, "trackio", None)
  with pytest.raises(UserError, match="pip install trackio"):
    log_.Log(tmp_path, trackers="trackio")


def test_steps_to_trace_that_are_behind(tmp_path):
  """As of a run that is continued with such flags: said, once."""
  said = []
  profile = trace.Profile("2:4", tmp_path, said.append)
  got = [*profile.watch(iter("ab"), 4), *profile.watch(iter("c"), 6)]
  assert got == [*"abc"]
  assert said == ["log.profile_steps ends before step 4: nothing is traced"]
  [*trace.Profile("", tmp_path, said.append).watch(iter("a"), 4)]
  assert len(said) == 1


# ---- Speed and memory --------------------------------------------------------


def test_step_time_and_phases(tmp_path, clock, monkeypatch):
  """By hand: 100 tokens in 2 s on 4 chips; what else takes time is left out."""
  monkeypatch.setattr(log_, "peak_memory", lambda: 5)
  pace = progress.Pace(100, 6e9, 4, 1e9)
  assert pace.step() == {}
  clock.now += 2
  assert pace.step() == {
    "step_seconds": 2,
    "tokens_per_second_per_chip": 12.5,
    "mfu": pytest.approx(0.75),
  }
  pace.pause()
  clock.now += 50
  assert pace.step() == {}
  with log_.Log(tmp_path, tensorboard=False) as logger:
    for title in "ab":
      with logger.phase(title, 10, "tokens") as phase:
        phase.update(1)
        clock.now += 3
        phase.update(10)
      assert (tmp_path / "metrics.jsonl").exists() == (title == "b")
      logger.metrics("prune", 0, {"loss": 1.0})
  found = [row for row in rows(tmp_path) if row["kind"] == "phase"]
  assert [(row["title"], row["step"]) for row in found] == [("a", 0), ("b", 1)]
  wanted = {"seconds": 3, "per_second": 3, "memory_peak": 5, "mfu": None}
  assert all(wanted.items() <= row.items() for row in found)


def test_profile_of_some_steps(tmp_path):
  said = []
  profile = trace.Profile("3:5", tmp_path, said.append)
  for step in profile.watch(iter(range(2, 7)), 2):
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      jax.device_put(step).block_until_ready()
  assert said == [f"the profile is in {tmp_path / 'profile'}"]
  assert small_runs.profiled(tmp_path) == [3, 4]
  profile.close()
  assert len(said) == 1
