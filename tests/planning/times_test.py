"""Hours of a run, by hand."""

import os

import pytest

from adapt_pruner_jax.models import flops
from adapt_pruner_jax.planning import cost, times
from adapt_pruner_jax.planning.hardware import Hardware
from tests.planning.plan_test import SMALL, recipe

H100 = Hardware("NVIDIA H100", 8, 80e9, 1e12, 0.5)
V5E = Hardware("TPU v5e", 8, 16e9, 1e12, 0.5)


def hours(config, hardware):
  stages = cost.stage_table(config, SMALL, 150_000)
  models = [stage.pop("config") for stage in stages]
  return times.hours(config, SMALL, models, stages, hardware), models, stages


def test_by_what_they_go_to():
  config = recipe(
    prune__method="curvature",
    prune__refit="final",
    train__tokens=9000,
    eval__text="embedded",
    eval__tasks="arc_easy, mine",
    eval__seq_len=64,
    calibration__refit_samples=8,
  )
  found, (model,), (stage,) = hours(config, H100)
  rate = 8 * 0.5e12 * 3600
  channels = 4 * [4 * 2 * 16, 96]  # heads and MLP of four layers
  cubes = sum(2 * n**3 for n in channels)
  # Each step, and the refit; in float32, on each GPU alone.
  solves = cubes * (stage["prune_steps"] + 1) * 15 / (rate / 8)
  tokens = 8 * config.calibration.seq_len
  sums = 2 * tokens * sum(n * (n + 64) for n in channels) * 15 / rate
  forward = [sum(flops.forward_flops(c, 64)) for c in (SMALL, model)]
  assert found == {
    "scoring and refits": pytest.approx(stage["prune_flops"] / rate),
    "Gram matrices": pytest.approx(sums),
    "factorisations": pytest.approx(solves),
    "training": pytest.approx(stage["train_flops"] / rate),
    "evaluation": pytest.approx((1e5 + 3.3e5 + 5e5) * sum(forward) / rate),
    "tokenising": pytest.approx(
      (9000 + 24 * config.calibration.seq_len)
      / (times.TOKENISED * os.cpu_count() * 3600)
    ),
    "compiling": pytest.approx((60 + 130 + 180) / 3600),
  }
  on_tpus, *_ = hours(config, V5E)  # a slice solves together
  assert on_tpus["factorisations"] == pytest.approx(solves * 6 / 15 / 8)


def test_of_an_unknown_device_there_are_none():
  found, *_ = hours(recipe(), Hardware(devices=1))
  assert found is None
