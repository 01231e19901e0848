import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.storage import (
  bucket_path,
  json_files,
  lock,
  places,
  publish,
)

# ---- The lock ----------------------------------------------------------------

HOLD = """
import pathlib, sys, time
from adapt_pruner_jax.storage import lock
with lock.lock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(
  tmp_path, subprocess_env
):
  run = tmp_path / "new" / "run"
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(run)],
    stdout=subprocess.PIPE,
    env=subprocess_env(),
  )
  try:
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError) as refusal, lock.lock(run):
      pass
    for text in (str(run), str(process.pid), socket.gethostname()):
      assert text in str(refusal.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.lock(run):
      pass
  finally:
    process.kill()
    process.wait()


def test_the_lock_is_free_after_an_error_and_names_its_new_holder(tmp_path):
  with pytest.raises(KeyError), lock.lock(tmp_path):
    raise KeyError
  (tmp_path / lock.LOCK).write_text("process 123456789 on some-other-host")
  with (
    lock.lock(tmp_path),
    pytest.raises(UserError) as refusal,
    lock.lock(tmp_path),
  ):
    pass
  assert f"(process {os.getpid()} on {socket.gethostname()})" in str(
    refusal.value
  )


def test_a_directory_that_cannot_be_written_to(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match="file/run cannot be written to: Not a dir"),
    lock.lock(tmp_path / "file" / "run"),
  ):
    pass


@pytest.fixture
def read_only(tmp_path):
  """A directory on a read-only file system, with a file in it."""
  path = tmp_path / "read_only"
  path.mkdir()
  (path / "rows.jsonl").write_text('{"a": 1}\n')
  bind = ["mount", "--bind", str(path), str(path)]
  again = ["mount", "-o", "remount,ro,bind", str(path)]
  if os.getuid():
    path.chmod(0o555)
    yield path
    path.chmod(0o755)
    return
  if subprocess.run(bind, capture_output=True).returncode:
    pytest.skip("cannot mount a read-only directory")
  try:
    subprocess.run(again, check=True)
    yield path
  finally:
    subprocess.run(["umount", str(path)], check=True)


def test_a_read_only_directory(read_only):
  with (
    pytest.raises(UserError, match=r"read_only cannot be written to"),
    lock.lock(read_only),
  ):
    pass
  with pytest.raises(UserError, match=r"cannot write .*new\.json"):
    json_files.write_json(read_only / "new.json", 1)
  if not os.getuid():  # the file itself may be written to by its owner
    with pytest.raises(UserError, match=r"cannot write .*rows\.jsonl"):
      json_files.append_line(read_only / "rows.jsonl", 1)
  assert json_files.read_lines(read_only / "rows.jsonl") == [{"a": 1}]


def test_a_file_system_without_locks_is_only_a_warning(
  tmp_path, monkeypatch, caplog
):
  def refuse(*_):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", refuse)
  with lock.lock(tmp_path):
    assert (tmp_path / lock.LOCK).exists()


def test_what_only_process_0_does(monkeypatch):
  """Of several processes; here it is one that plays both parts."""

  def refuse():
    raise UserError("no room")

  assert agreement.on_writer(lambda: 3) == 3
  with pytest.raises(UserError, match="no room"):
    agreement.on_writer(refuse)
  monkeypatch.setattr(agreement, "is_writer", lambda: False)
  assert agreement.on_writer(refuse) is None
  monkeypatch.setattr(agreement, "same", lambda _: [False, "no room"])
  with pytest.raises(UserError, match="process 0: no room"):
    agreement.on_writer(refuse)
  monkeypatch.setattr(agreement, "same", lambda _: [True, "asked"])
  with pytest.raises(StoppedError, match="asked"):
    agreement.on_writer(refuse)


def test_a_mount_without_renames_is_refused_at_once(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(publish.Path, "rename", refuse)
  with (
    pytest.raises(UserError, match=r"cannot be renamed there .*not impl"),
    lock.lock(tmp_path),
  ):
    pass
  assert [p.name for p in tmp_path.iterdir()] == [lock.LOCK]
  monkeypatch.undo()
  with lock.lock(tmp_path):
    pass


def test_what_another_machine_has_published_may_show_late(tmp_path):
  late = tmp_path / "late"
  assert not publish.wait_for(late, seconds=0.0)
  timer = threading.Timer(0.3, late.touch)
  timer.start()
  assert publish.wait_for(late, seconds=60.0)
  timer.join()


@pytest.mark.parametrize("text", ["gs://", "gs:///run", "~nobody-at-all/x"])
def test_places_that_name_nothing(text):
  with pytest.raises(UserError):
    places.to_path(text)


def test_a_child_that_is_named_like_its_folder(monkeypatch):
  """As `gsutil cp -r` leaves it; the entry of the folder itself is none."""
  found = ["b/llama/", "b/llama/llama/", "b/llama/a"]
  fs = types.SimpleNamespace(ls=lambda path, detail: found)
  monkeypatch.setattr(bucket_path, "file_system", lambda url: fs)
  place = places.to_path("gs://b/llama")
  assert [*place.iterdir()] == [place / "a", place / "llama"]


def test_a_cache_that_cannot_be_made(monkeypatch):
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", "/dev/null/x")
  place = places.to_path("gs://b/m.gguf")
  with (
    pytest.raises(UserError, match="set ADAPT_PRUNER_CACHE"),
    publish.file(place),
  ):
    pass


def test_room_on_the_disk(tmp_path, monkeypatch):
  usage = publish.shutil.disk_usage(tmp_path)._replace(free=10_000_000)
  monkeypatch.setattr(publish.shutil, "disk_usage", lambda _: usage)
  publish.require_space(tmp_path, 5_000_000, "the export")
  with pytest.raises(UserError) as refusal:
    publish.require_space(tmp_path, 2_000_000_000, "the export")
  for text in ("the export needs 2.041 GB", "0.010 GB free", str(tmp_path)):
    assert text in str(refusal.value)


# ---- JSON --------------------------------------------------------------------


def strict(text):
  """JSON as the standard has it."""

  def refuse(name):
    raise ValueError(name)

  return json.loads(text, parse_constant=refuse)


def test_json_comes_back_and_is_valid(tmp_path):
  path = tmp_path / "x.json"
  value = {
    "floats": [0.1, 1e-310, math.nan, math.inf, -math.inf],
    "numpy": {"a": np.float32(0.5), "b": np.arange(2), "c": np.float64("nan")},
    "jax": jnp.int32(3),
    "tuple": (1, None, True, "ä"),
  }
  json_files.write_json(path, value)
  expected = {
    "floats": [0.1, 1e-310, "NaN", "Infinity", "-Infinity"],
    "numpy": {"a": 0.5, "b": [0, 1], "c": "NaN"},
    "jax": 3,
    "tuple": [1, None, True, "ä"],
  }
  assert strict(path.read_text(encoding="utf-8")) == expected
  assert json_files.read_json(path) == expected
  assert float("-Infinity") == -math.inf


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  json_files.write_json(path, "old")

  def full(_):
    raise OSError(28, "No space left on device")

  for name in ("fsync", "replace"):
    with monkeypatch.context() as patch:
      patch.setattr(publish.os, name, lambda *_: full(0))
      with pytest.raises(UserError, match=r"x\.json: No space left"):
        json_files.write_json(path, "new")
    assert os.listdir(tmp_path) == ["x.json"]
    assert json_files.read_json(path) == "old"
  with pytest.raises(TypeError):
    json_files.write_json(path, object())
  assert json_files.read_json(path) == "old"


@pytest.mark.parametrize(
  "data, error",
  [
    (b'{"a": 1', r"x\.json is damaged.*line 1"),
    (b"", r"x\.json is damaged"),
    (b'{"a": "\xff"}', r"x\.json is damaged"),
    (None, r"cannot read .*x\.json: No such file"),
  ],
)
def test_damaged_json_is_named(tmp_path, data, error):
  if data is not None:
    (tmp_path / "x.json").write_bytes(data)
  with pytest.raises(UserError, match=error):
    json_files.read_json(tmp_path / "x.json")


# ---- JSON lines --------------------------------------------------------------

ROWS = [{"step": 1, "loss": 0.1}, {"step": 2, "text": "zwei ä"}, {"step": 3}]


def test_rows_come_back(tmp_path):
  path = tmp_path / "rows.jsonl"
  assert json_files.read_lines(path) == []
  for row in ROWS:
    json_files.append_line(path, row)
  assert json_files.read_lines(path) == ROWS
  assert [strict(line) for line in path.read_text().splitlines()] == ROWS
  json_files.rewrite_lines(path, ROWS[:1])
  json_files.append_line(path, {"x": math.nan})
  assert json_files.read_lines(path) == [ROWS[0], {"x": "NaN"}]
  json_files.rewrite_lines(path, [])
  assert json_files.read_lines(path) == []
  assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_file_cut_anywhere_loses_only_the_cut_row(tmp_path):
  whole = tmp_path / "whole.jsonl"
  json_files.rewrite_lines(whole, ROWS)
  data = whole.read_bytes()
  path = tmp_path / "cut.jsonl"
  for size in range(len(data) + 1):
    path.write_bytes(data[:size])
    rows = ROWS[: data[:size].count(b"\n")]
    assert json_files.read_lines(path) == rows
    json_files.append_line(path, {"new": size})
    assert json_files.read_lines(path) == [*rows, {"new": size}]


def test_a_row_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
  path = tmp_path / "rows.jsonl"
  json_files.append_line(path, ROWS[0])
  real = open

  class Full:
    """A file with room for five more bytes."""

    def __init__(self, file):
      self.file = file

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.file.close()

    def __getattr__(self, name):
      return getattr(self.file, name)

    def write(self, data):
      return self.file.write(data[:5])

  monkeypatch.setattr(
    "builtins.open", lambda *args, **kwargs: Full(real(*args, **kwargs))
  )
  with pytest.raises(UserError, match=r"rows\.jsonl: No space left"):
    json_files.append_line(path, ROWS[1])
  monkeypatch.undo()
  assert path.read_text() == json.dumps(ROWS[0]) + "\n"


def test_a_damaged_row_is_named(tmp_path):
  path = tmp_path / "rows.jsonl"
  json_files.rewrite_lines(path, ROWS)
  lines = path.read_bytes().split(b"\n")
  for number in (1, 2, 3):
    damaged = list(lines)
    damaged[number - 1] = damaged[number - 1][:-1]
    path.write_bytes(b"\n".join(damaged))
    with pytest.raises(UserError, match=rf"rows\.jsonl, line {number} is dam"):
      json_files.read_lines(path)
