"""Every publisher writes beside, syncs what it wrote, renames, syncs again."""

import ast
import os
import pathlib
import time

import jax
import numpy as np
import pytest

from adapt_pruner_jax.data import token_store
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.runs import compare_table, tiny_model
from adapt_pruner_jax.storage import json_files, publish
from tests import small

ROOT = pathlib.Path(__file__).resolve().parents[2]


def content_of(path):
  """What a sync of a file or of a directory's names makes last."""
  return os.listdir(path) if path.is_dir() else path.read_bytes()


class Recorder:
  """Checks each rename when it happens, and remembers the published names."""

  def __init__(self, monkeypatch, root):
    self.synced, self.waiting, self.published = {}, {}, []
    self.root = root
    fsync, rename, swap = os.fsync, os.rename, publish._swap

    def on_fsync(opened):
      fsync(opened)
      path = pathlib.Path(os.readlink(f"/proc/self/fd/{opened}"))
      self.synced[path] = content_of(path)
      for target in [t for t, p in self.waiting.items() if p == path]:
        self.published.append(self.waiting.pop(target) and target)

    def on_rename(source, target):
      self.before(source, target)
      rename(source, target)

    def on_swap(source, target):
      self.before(source, target)
      return swap(source, target)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "rename", on_rename)
    monkeypatch.setattr(os, "replace", on_rename)
    monkeypatch.setattr(publish, "_swap", on_swap)

  def before(self, source, target):
    source, target = pathlib.Path(source), pathlib.Path(target)
    if self.root not in source.parents or "orbax" in str(source):
      return
    for path in (source, *source.rglob("*")):
      assert self.synced.get(path) == content_of(path), f"{path} is not synced"
    self.waiting[target] = target.parent


def of_text(path, _):
  json_files.write_json(path / "x.json", {"a": 1})
  json_files.rewrite_lines(path / "x.jsonl", [{"a": 1}])
  return ["x.json", "x.jsonl"]


def model_as(format):
  def write(path, _):
    config = small.option("plain")
    params = jax.tree.map(np.asarray, small.random_params(config))
    out = path / "model"
    convert.write(config, params, out, format)
    convert.write(config, params, out, format, overwrite=True)
    return ["model", "model"]

  return write


def of_tokens(path, small_model):
  (path / "text.txt").write_text("a text, and some more of it")
  tokenizer = load_tokenizer(small_model)
  (source,) = parse_sources(f"text:{path}/text.txt", "data.source")
  token_store.tokenise(source, tokenizer, 1 << 20, path / "cache")
  return [p.name for p in (path / "cache").rglob("*.safetensors")]


def of_tiny_model(path, _):
  tiny_model.base_model(path / "cache", recipe=tiny_model.Recipe(steps=0))
  return [p.name for p in (path / "cache").iterdir()]


def of_plot(path, _):
  from matplotlib.figure import Figure

  compare_table.save_figure(Figure(), path / "plot")
  return ["plot.svg", "plot.png"]


PUBLISHERS = {
  "text": of_text,
  **{format: model_as(format) for format in convert.FORMATS},
  "tokens": of_tokens,
  "tiny model": of_tiny_model,
  "plot": of_plot,
}


@pytest.mark.parametrize("name", PUBLISHERS)
def test_written_synced_renamed_synced(
  name, tmp_path, small_model, monkeypatch
):
  def make(folder, *_):
    json_files.write_json(folder / "made.json", 1)

  monkeypatch.setattr(tiny_model, "_make", make)
  recorder = Recorder(monkeypatch, tmp_path)
  names = PUBLISHERS[name](tmp_path, small_model)
  assert not recorder.waiting  # each directory was synced after the rename
  published = [p.name for p in recorder.published]
  for found in names:
    assert published.count(found) >= names.count(found)
  left = [p for p in tmp_path.rglob(".*") if ".tmp" in p.name]
  assert not left


def test_nothing_else_renames():
  """But checkpoints: Orbax commits its own, and damaged ones are set aside."""
  found = set()
  for file in (ROOT / "adapt_pruner_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
      name = node.attr if isinstance(node, ast.Attribute) else ""
      of_os = name == "replace" and getattr(node.value, "id", "") == "os"
      if name in ("rename", "renames", "move") or of_os:
        found.add(file.name)
  assert found == {"publish.py", "checkpoints.py"}


# ---- Replacing a directory ---------------------------------------------------


def fill(folder, text):
  (folder / "config.json").write_text(text)


def replaced(path, text):
  with publish.directory(path, replace=True) as folder:
    fill(folder, text)


def test_a_directory_is_swapped_in_one_moment(tmp_path, monkeypatch):
  path = tmp_path / "model"
  replaced(path, "old")
  monkeypatch.setattr(os, "rename", None)  # no second way is taken
  replaced(path, "new")
  assert (path / "config.json").read_text() == "new"
  assert os.listdir(tmp_path) == ["model"]


@pytest.fixture
def no_swap(monkeypatch):
  """A file system, such as NFS, that cannot swap two names."""
  monkeypatch.setattr(publish, "_swap", lambda *_: False)


def test_without_a_swap_the_old_one_comes_back(tmp_path, no_swap, monkeypatch):
  path = tmp_path / "model"
  replaced(path, "old")
  replaced(path, "newer")
  assert (path / "config.json").read_text() == "newer"
  assert os.listdir(tmp_path) == ["model"]

  class KilledError(BaseException):
    pass

  rename, calls = os.rename, []

  def killed(source, target):
    calls.append(source)
    if len(calls) == 2:  # the old one is aside, the new one not yet there
      raise KilledError
    rename(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", killed)
    with pytest.raises(KilledError):
      replaced(path, "newest")
  assert not path.exists()
  with pytest.raises(UserError, match="model exists: give another"):
    publish.require_free(path, False, ["config.json"])
  assert (path / "config.json").read_text() == "newer"
  replaced(path, "last")
  assert (path / "config.json").read_text() == "last"
  assert os.listdir(tmp_path) == ["model"]


def test_an_error_of_the_second_rename_puts_the_old_one_back(
  tmp_path, no_swap, monkeypatch
):
  path = tmp_path / "model"
  replaced(path, "old")
  rename = os.rename

  def refuse(source, target):
    if ".tmp-" in str(source):
      raise OSError(24, "Too many open files")
    rename(source, target)

  monkeypatch.setattr(os, "rename", refuse)
  with pytest.raises(UserError, match="model: Too many open files"):
    replaced(path, "new")
  assert (path / "config.json").read_text() == "old"
  assert os.listdir(tmp_path) == ["model"]


def test_an_error_inside_leaves_what_was_there(tmp_path):
  path = tmp_path / "model"
  replaced(path, "old")

  def fail():
    with publish.directory(path, replace=True) as folder:
      fill(folder, "new")
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  with (
    pytest.raises(UserError, match="No space left"),
    publish.file(path / "x"),
  ):
    raise OSError(28, "No space left on device")
  assert (path / "config.json").read_text() == "old"
  assert os.listdir(tmp_path) == ["model"]
  assert os.listdir(path) == ["config.json"]


def test_one_that_is_there_stays_unless_it_is_replaced(tmp_path):
  path = tmp_path / "model"
  replaced(path, "old")
  with (
    pytest.raises(UserError, match="Directory not empty"),
    publish.directory(path) as folder,
  ):
    fill(folder, "new")
  assert (path / "config.json").read_text() == "old"


def test_links_stay_links(tmp_path):
  (tmp_path / "far").mkdir()
  replaced(tmp_path / "far" / "model", "old")
  (tmp_path / "far" / "x.json").write_text("old")
  for name in ("model", "x.json"):
    (tmp_path / name).symlink_to(tmp_path / "far" / name)
  replaced(tmp_path / "model", "new")
  publish.write_text(tmp_path / "x.json", "new")
  assert (tmp_path / "model").is_symlink()
  assert (tmp_path / "far/model/config.json").read_text() == "new"
  assert (tmp_path / "far/x.json").read_text() == "new"


def test_what_killed_processes_left_goes_after_an_hour(tmp_path, monkeypatch):
  old, young = (tmp_path / f".x.json.tmp-{n}" for n in ("1-a", "2-b"))
  for path in (old, young):
    path.mkdir()
    (path / "part").write_text("")
  hours_ago = time.time() - 7200
  # The clock that counts is the file system's.
  monkeypatch.setattr(time, "time", lambda: hours_ago - 7200)
  for path in (old / "part", old):
    os.utime(path, (hours_ago, hours_ago))
  json_files.write_json(tmp_path / "x.json", 1)
  assert sorted(os.listdir(tmp_path)) == [young.name, "x.json"]
  publish.remove_cut_off(tmp_path / "x.json")  # at once
  assert os.listdir(tmp_path) == ["x.json"]


# ---- May I write here? -------------------------------------------------------


def test_what_may_be_written(tmp_path):
  marks = ["config.json"]
  out = tmp_path / "new" / "model"
  publish.require_free(out, False, marks)
  assert os.listdir(tmp_path / "new") == []
  out.mkdir()
  publish.require_free(out, True, marks)
  (out / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="exists: give another --out"):
    publish.require_free(out, False, marks)
  with pytest.raises(UserError, match="is not a model directory and is not"):
    publish.require_free(out, True, marks)
  with pytest.raises(UserError, match="is a directory: give the name of a f"):
    publish.require_free(out, True)
  with pytest.raises(UserError, match=r"cannot write .*File exists|Not a dir"):
    publish.require_free(out / "notes.txt" / "x", True)
