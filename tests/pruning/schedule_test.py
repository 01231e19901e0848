"""The arithmetic of how much to prune where, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner_jax.pruning import schedule


def modules(K, F):
  return {"K": np.array(K), "F": np.array(F)}


def test_relative_importance_counts_a_layer_with_both_modules_twice():
  prunable = modules([True, False, True], [True, True, False])
  got = schedule.relative_importance(np.array([1.0, 3.0, 7.0]), prunable)
  # Listed: 1, 7 (attention) and 1, 3 (MLP); mean 3, farthest 4 away.
  np.testing.assert_array_equal(got["K"], [-0.5, np.nan, 1.0])
  np.testing.assert_array_equal(got["F"], [-0.5, 0.0, np.nan])


def test_equal_importances_are_all_zero():
  prunable = modules([True, True], [True, False])
  got = schedule.relative_importance(np.array([2.0, 2.0]), prunable)
  np.testing.assert_array_equal(got["K"], [0, 0])
  np.testing.assert_array_equal(got["F"], [0, np.nan])


def test_sparsity_is_the_last_one_plus_step_minus_importance_clipped():
  previous = modules([0.5, 0.97, 0.01], [0.0, 0.2, 0.0])
  relative = modules([0.5, -1.0, 1.0], [0.0, 1.0, -0.5])
  got = schedule.next_sparsity(previous, relative, 3, 0.02, 0.04)
  np.testing.assert_allclose(got["K"], [0.5, 0.99, 0.0], rtol=1e-14)
  np.testing.assert_allclose(got["F"], [0.02, 0.18, 0.04], rtol=1e-14)


def test_without_amplitude_the_schedule_is_uniform():
  zeros = modules([0.0, 0.0], [0.0, 0.0])
  got = schedule.next_sparsity(zeros, zeros, 35, 0.02, 0.0)
  # As the authors divide it; 35 * 0.02 is one bit more than 0.7.
  np.testing.assert_array_equal(got["K"], 0.7)
  np.testing.assert_array_equal(got["F"], 0.7)


@pytest.mark.parametrize(
  "initial, current, wanted, group, round_to, want",
  [
    (8, 8, 0.25, 16, 1, 2),  # 96 of 128 channels stay
    (8, 8, 0.3, 16, 1, 2),  # 89.6 -> 89 channels, rounded up to 6 heads
    (8, 6, 0.3, 16, 1, 0),  # counted from the initial width
    (176, 176, 0.1, 1, 1, 18),  # 158.4 -> 158 stay
    (176, 170, 0.1, 1, 1, 12),
    (176, 150, 0.1, 1, 1, 0),  # what is gone does not come back
    (4, 4, 0.99, 16, 1, 0),  # all groups: refused whole
    (176, 20, 0.99, 1, 1, 19),  # 1.76 -> 1 channel stays
    (50, 10, 0.99, 1, 1, 0),  # 0.5 -> none would stay: refused
    (100, 1, 0.99, 1, 1, 0),  # a single channel is left alone
    (176, 176, np.nan, 1, 1, 0),  # not prunable
    (300, 300, 0.3, 1, 128, 44),  # 210 -> 256 stay
    (300, 256, 0.3, 1, 128, 0),
    (300, 256, 0.7, 1, 128, 128),  # 90 -> 128 stay
    (100, 100, 0.5, 1, 128, 0),  # narrower than a block
  ],
)
def test_removals(initial, current, wanted, group, round_to, want):
  got = schedule.removals(
    np.array([initial]),
    np.array([current]),
    np.array([wanted]),
    group,
    round_to,
  )
  assert got.tolist() == [want]


@given(
  initial=st.integers(1, 400),
  gone=st.integers(0, 399),
  wanted=st.floats(0, 0.99),
  group=st.sampled_from([1, 8, 64]),
  round_to=st.sampled_from([1, 8, 128]),
)
@settings(max_examples=300, deadline=None)
def test_removals_never_empty_a_module(initial, gone, wanted, group, round_to):
  current = max(1, initial - gone)
  n = schedule.removals(
    np.array([initial]),
    np.array([current]),
    np.array([wanted]),
    group,
    round_to,
  )[0]
  assert 0 <= n < current
  left = current - n
  # Rounded up, never down: within what was asked for.
  assert left >= min(current, initial * (1 - wanted) - 1e-9) - 1 / group
  if n and round_to > 1:
    assert left % round_to == 0


def test_stage_targets_fall_linearly_to_exactly_the_target():
  assert schedule.stage_targets(100, 40, 4) == [85, 70, 55, 40]
  assert schedule.stage_targets(101, 40, 4) == [86, 71, 56, 40]
  assert schedule.stage_targets(494_032_768, 376_100_000, 1) == [376_100_000]


def test_stage_ends():
  assert schedule.stage_ends(100, 4, "linear") == [10, 30, 60, 100]
  assert schedule.stage_ends(7, 3, "constant") == [2, 5, 7]
  assert schedule.stage_ends(0, 2, "cosine") == [0, 0]


def test_token_shares():
  got = schedule.token_shares(4, "linear")
  np.testing.assert_allclose(got, [0.1, 0.2, 0.3, 0.4])
  assert schedule.token_shares(5, "constant") == [0.2] * 5
  # 1 - cos at 90 and 180 degrees: 1 and 2.
  np.testing.assert_allclose(schedule.token_shares(2, "cosine"), [1 / 3, 2 / 3])
  for kind in ("linear", "constant", "cosine"):
    assert sum(schedule.token_shares(20, kind)) == pytest.approx(1)
