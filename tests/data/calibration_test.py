"""Calibration windows, drawn or given."""

import numpy as np
import pytest

from adapt_pruner_jax.config import Calibration
from adapt_pruner_jax.data.calibration import calibration_data
from tests.data.words import BOS, EOS, WORDS, V, error, ids_of, write


@pytest.fixture
def numbered(tmp_path):
  """A text that is w0 w1 ... w39."""
  return f"text:{write(tmp_path / 'numbered.txt', ' '.join(WORDS))}"


def calibration(source, samples=6, seq_len=5):
  return Calibration(source=source, samples=samples, seq_len=seq_len)


def test_calibration_windows(unbegun, numbered):
  config = calibration(numbered)
  windows = calibration_data(config, unbegun, V, seed=0)
  stream = np.array([*unbegun.encode(" ".join(WORDS)), EOS])
  for step in range(20):
    batch = windows.batch(step)
    assert batch.shape == (6, 5)
    assert batch.dtype == np.int32
    starts = [int(np.flatnonzero(stream == row[0])[0]) for row in batch]
    assert len(set(starts)) == 6  # no window twice
    for start, row in zip(starts, batch, strict=True):
      np.testing.assert_array_equal(row, stream[start : start + 5])


def test_calibration_windows_start_with_the_begin_token(
  words, unbegun, numbered
):
  """It takes the first place; which windows there are stays the same."""
  config = calibration(numbered)
  with_it = calibration_data(config, words, V, seed=0)
  without = calibration_data(config, unbegun, V, seed=0)
  for step in range(5):
    want = without.batch(step)
    want[:, 0] = BOS
    np.testing.assert_array_equal(with_it.batch(step), want)


def test_calibration_windows_have_no_begin_token_twice(tmp_path, words):
  """None starts on the last token of a document, and every other is drawn."""
  rows = [{"text": f"w{i} w{i + 1}"} for i in range(0, 40, 2)]
  source = f"jsonl:{write(tmp_path / 'a.jsonl', rows)}"
  windows = calibration_data(calibration(source, 6, 3), words, V, seed=0)
  drawn = np.concatenate([windows.batch(step) for step in range(100)])
  assert (drawn[:, 0] == BOS).all()
  assert (drawn[:, 1] != BOS).all()
  [stream] = windows.streams
  tails = {
    tuple(stream.tokens[i + 1 : i + 3].tolist())
    for i in range(len(stream.tokens) - 2)
    if i + 1 not in stream.starts
  }
  assert {tuple(row[1:].tolist()) for row in drawn} == tails


def test_calibration_is_fresh_and_restartable(words, numbered):
  config = calibration(numbered)
  windows = calibration_data(config, words, V, 0)
  first = [windows.batch(step) for step in range(6)]
  assert len({b.tobytes() for b in first}) == 6
  resumed = calibration_data(config, words, V, 0)
  np.testing.assert_array_equal(resumed.batch(4), first[4])
  np.testing.assert_array_equal(resumed.batch(5), first[5])
  other = calibration_data(config, words, V, 1)
  assert (other.batch(0) != first[0]).any()


def test_calibration_mixture(tmp_path, words):
  low = write(tmp_path / "low.txt", " ".join(WORDS[:20] * 3))
  high = write(tmp_path / "high.txt", " ".join(WORDS[20:] * 3))
  config = calibration(f"text:{low},weight=1,text:{high},weight=3", samples=8)
  batch = calibration_data(config, words, V, 0).batch(0)
  assert batch.shape == (8, 5)
  # One inner token a window, so that neither <s> nor </s> is in the way.
  is_high = batch[:, 2] >= ids_of("w20")[0]
  # What refits hold out is the end: of both, as any part of a batch.
  assert [part.sum() for part in np.split(is_high, 2)] == [3, 3]


def test_calibration_too_short(words, numbered):
  # 40 words, <s> and </s>.
  calibration_data(calibration(numbered, 6, 37), words, V, 0).batch(0)
  with error("has 42 tokens, and 6 different windows of 38 need 43"):
    calibration_data(calibration(numbered, 6, 38), words, V, 0)
  with error("No such file"):  # now, not at the first step
    calibration_data(calibration("text:none"), words, V, 0)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint8])
def test_calibration_npy(tmp_path, dtype):
  given_ids = np.arange(24).reshape(2, 3, 4).astype(dtype)
  np.save(tmp_path / "a.npy", given_ids)
  config = calibration(f"npy:{tmp_path}/a.npy")
  given = calibration_data(config, None, 24, 0)
  for step in range(2):
    batch = given.batch(step)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, given_ids[step])
  with error("has samples for 2 pruning steps, and step 3 is asked for"):
    given.batch(2)


@pytest.mark.parametrize(
  ("array", "match"),
  [
    (np.zeros((2, 3), np.int32), r"shape \(2, 3\); it must be \[steps"),
    (np.zeros((0, 3, 4), np.int32), "none empty"),
    (np.zeros((1, 3, 1), np.int32), "at least 2 tokens"),
    (np.zeros((1, 3, 4), np.float32), "dtype float32"),
    (np.full((2, 3, 4), 24, np.int32), "step 0: token id 24 is outside"),
    (np.full((2, 3, 4), -1, np.int32), "token id -1 is outside"),
    (np.array([[[{}]]]), "not a plain .npy array"),
  ],
)
def test_calibration_npy_errors(tmp_path, array, match):
  np.save(tmp_path / "a.npy", array, allow_pickle=True)
  with error(match):
    calibration_data(calibration(f"npy:{tmp_path}/a.npy"), None, 24, 0)


def test_calibration_npy_is_never_unpickled(tmp_path):
  path = tmp_path / "a.npy"
  open_ = lambda: calibration_data(calibration(f"npy:{path}"), None, 24, 0)
  with error("No such file"):
    open_()
  for content in (b"", b"\x80\x04N.", b"\x93NUMPY\x01\x00v\x00{'descr'"):
    write(path, content)
    with error("not a plain .npy array"):
      open_()
  np.savez(tmp_path / "b.npz", np.zeros((1, 2, 3), np.int32))
  path.write_bytes((tmp_path / "b.npz").read_bytes())
  with error("shape None"):
    open_()
