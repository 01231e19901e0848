"""The cache: whose it is, and where it is for whom has no home."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from adapt_pruner_jax.storage import cache


@pytest.fixture
def kept(monkeypatch, tmp_path, caplog):
  """`kept()`: where compiled programs go, and what is said about it."""
  old = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
  said = []
  monkeypatch.setattr(
    cache.logging, "warning", lambda text, *a: said.append(text % a)
  )

  def run():
    cache.keep_compiled_programs()
    return jax.config.jax_compilation_cache_dir, said

  largest = jax.config.jax_compilation_cache_max_size
  yield run
  jax.config.update("jax_compilation_cache_dir", old)
  jax.config.update("jax_compilation_cache_max_size", largest)


def test_compiled_programs_are_the_users_alone(kept, tmp_path):
  old = os.umask(0)
  try:
    cache.make(cache.home() / "tokens")  # whatever comes first
    place, said = kept()
  finally:
    os.umask(old)
  assert place == str(tmp_path / "cache" / "jax")
  assert os.stat(place).st_mode & 0o777 == 0o700
  assert jax.config.jax_compilation_cache_max_size == cache.LARGEST > 0
  assert not said


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("name", ["cache/jax", "cache"])
def test_a_folder_that_others_can_write_to_is_not_used(
  kept, tmp_path, mode, name
):
  (tmp_path / "cache" / "jax").mkdir(parents=True)
  (tmp_path / name).chmod(mode)
  place, (line,) = kept()
  assert place is None
  assert "compiled programs are not kept" in line
  assert "chmod 700" in line
  assert "\n" not in line


def test_a_folder_of_another_user_is_not_used(kept, tmp_path, monkeypatch):
  monkeypatch.setattr(cache.os, "getuid", lambda: os.geteuid() + 1)
  place, (line,) = kept()
  assert place is None
  assert "can be written to by others" in line


def test_a_folder_that_cannot_be_made(kept, tmp_path):
  (tmp_path / "cache").write_text("")
  place, (line,) = kept()
  assert place is None
  assert "set ADAPT_PRUNER_CACHE" in line


def test_a_place_that_was_given_to_jax_stays(kept, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  assert kept() == (str(tmp_path), [])


def test_a_user_without_a_home(kept, monkeypatch, tmp_path):
  def nobody():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("ADAPT_PRUNER_CACHE")
  monkeypatch.setattr(pathlib.Path, "home", nobody)
  monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
  place, (line,) = kept()
  assert place == str(tmp_path / f"adapt_pruner_jax-{os.getuid()}" / "jax")
  assert "there is no home directory" in line


def test_a_log_line_is_one_line(subprocess_env):
  """No `WARNING: Logging before flag parsing` before it."""
  code = (
    "from absl import logging; from adapt_pruner_jax import cli\n"
    "cli.COMMANDS['report'] = lambda *_: logging.warning('one') or 0\n"
    "cli.main(['report'])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=subprocess_env(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (line,) = done.stderr.splitlines()
  assert line.endswith("] one")
