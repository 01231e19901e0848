"""Texts that overlap, or are too short, before any work."""

import dataclasses

import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, Search, check
from adapt_pruner_jax.data.calibration import GivenData, WindowData
from adapt_pruner_jax.data.token_store import Stream
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.runs import inputs, run, text_checks
from tests import small
from tests.small_runs import recipe


def windows(tokens, samples=8, seq_len=16):
  stream = Stream(tokens, np.zeros(1, int), None, "")
  return WindowData([stream], [samples], seq_len, 0)


def tokens(seed):
  return np.random.default_rng(seed).integers(0, 40000, 6400, np.int32)


def test_overlaps_are_told_and_of_a_search_refused():
  config = Config(prune=Prune(search=Search(source="text:b")))
  config.calibration.source, config.eval.text = "text:a", "e"
  said = []
  checked = lambda **texts: text_checks.check_overlaps(
    config,
    tokens(0),
    {name.replace("__", "."): text for name, text in texts.items()},
    said.append,
  )
  shared = np.concatenate([tokens(1), tokens(0)[:3200]])
  given = GivenData("", tokens(0)[:640].reshape(2, 5, 64))
  checked(calibration__source=windows(tokens(1)), data__source=None)
  assert not said
  checked(calibration__source=windows(shared))
  checked(calibration__source=given)
  assert said[0].startswith(
    "WARNING: 50% of --config.eval.text=e is also in "
    "--config.calibration.source=text:a"
  )
  assert said[1].startswith("WARNING: 10% of")
  with pytest.raises(
    UserError, match=r"50% .* --config\.prune\.search\.source=t"
  ):
    checked(prune__search__source=windows(shared))
  text_checks.check_overlaps(config, None, {"": windows(shared)}, said.append)
  assert len(said) == 2


def test_the_text_of_a_search_wants_a_tokenizer():
  """Though calibration is token ids."""
  config = Config(prune=Prune(search=Search(source="text:b")))
  config.calibration.source, config.eval.text = "npy:a", ""
  assert inputs._reads_text(config)


def test_a_file_says_how_many_windows_a_refit_has():
  config = Config(prune=Prune(refit="loss", refit_passes=1, refit_batch=1))
  config.calibration.source, config.calibration.refit_samples = "npy:a", 2
  few, many = (GivenData("", np.zeros((2, n, 8), np.int32)) for n in (8, 20))
  checked = lambda *opened: text_checks.check_refit(
    config, sharding.one_device(), *opened
  )
  checked()
  checked(many)
  with pytest.raises(UserError, match=r"8 calibration windows .* .an npy file"):
    checked(few)
  config.calibration.source = "text:a"
  with pytest.raises(UserError, match="2 calibration windows"):
    checked()


def test_tokens_a_channel():
  """The widest matrix of the small model has 40 channels."""
  said = []

  def checked(settings, least=0.0, steps=None):
    config = Config()
    config.calibration.tokens_per_channel = least
    steps = steps or windows(tokens(0), samples=8)
    refits = windows(tokens(0), samples=2)
    text_checks.check_channels(
      settings, config, small.CONFIG, steps, refits, said.append
    )

  checked(Prune(method="adapt"), least=1e6)
  checked(Prune(method="flap"), least=1e6)
  checked(Prune(method="curvature"), least=3.2)
  assert not said
  checked(Prune(method="surgeon"))
  assert len(said) == 1
  assert "8 windows of 16 tokens are 3.2 a channel" in said[0]
  assert said[0].endswith("give at least --config.calibration.samples=10")
  checked(Prune(method="adapt", refit="final"))
  assert "the refit: 2 windows" in said[1]
  assert said[1].endswith("calibration.refit_samples=10")
  with pytest.raises(UserError, match=r"samples=15, or longer windows"):
    checked(Prune(method="curvature"), least=6.0)
  given = GivenData("", np.zeros((3, 2, 16), np.int32))
  with pytest.raises(UserError, match=r"2 windows of 16 tokens are 0\.8 a"):
    checked(Prune(group_importance="curvature"), least=1.0, steps=given)


def test_windows_that_overlap_are_told():
  """A short text has no more tokens than it has, however many are drawn."""
  said, config, short = [], Config(), tokens(0)[:100]
  for method in ("adapt", "curvature"):
    steps, refits = windows(short), windows(short, samples=6)
    text_checks.check_channels(
      Prune(method=method), config, small.CONFIG, steps, refits, said.append
    )
  assert len(said) == 3
  assert (
    "8 windows of 16 tokens overlap: --config.calibration.source" in said[0]
  )
  assert "has 100 for them" in said[0]
  assert "(100 different) are 2.5 a channel" in said[2]
  assert said[2].endswith("give a longer text")


def test_a_run_is_refused_before_any_work(small_model, tmp_path):
  text = "".join(f"{number} and then {number**2}. " for number in range(2000))
  (tmp_path / "mine.txt").write_text(text)
  (tmp_path / "reported.txt").write_text(text[5000:9000])
  config = recipe(small_model, stages=1, allotment="search")
  config.eval.text = str(tmp_path / "reported.txt")
  config.prune.search = Search(source=f"text:{tmp_path / 'mine.txt'}")
  with pytest.raises(UserError, match=r"windows of 32 tokens.*another text"):
    run.run(config, tmp_path / "work")
  assert not (tmp_path / "work" / "config.json").exists()
  config.eval.text = "embedded"
  config.calibration.tokens_per_channel = 100.0
  config.prune.refit = "final"
  with pytest.raises(UserError, match=r"below .*tokens_per_channel=100"):
    run.run(config, tmp_path / "work")
  config.prune.refit, config.prune.refit_passes = "loss", 1
  config.calibration.refit_samples = 4
  with pytest.raises(UserError, match="4 calibration windows are too few"):
    run.run(config, tmp_path / "work")


def test_a_text_of_a_search_that_cannot_be():
  searching = Prune(allotment="search", ratio=0.2)
  for source in ("npy:a.npy", "self:a.jsonl"):
    tried = dataclasses.replace(searching, search=Search(source=source))
    with pytest.raises(UserError, match="must be a text"):
      check(Config(prune=tried))
  tried = dataclasses.replace(searching, search=Search(source="text:a"))
  check(Config(prune=tried))
  tried.allotment = ""
  with pytest.raises(UserError, match=r"prune\.allotment=search with it"):
    check(Config(prune=tried))
