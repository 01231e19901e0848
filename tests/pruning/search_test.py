"""Search lowers the divergence, meets the target, and is the same again."""

import dataclasses

import jax
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, Search, check
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import (
  budgets,
  methods,
  search,
  steps,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.task import Measured, Step
from tests.pruning.methods_test import (  # noqa: F401
  CHANNEL,
  CONFIG,
  SIZE,
  _compile_fast,
  params,
  same,
  samples,
  task_of,
)

TARGET = int(SIZE * 0.75)
SETTINGS = Prune(
  allotment="search",
  group_importance="l2",
  search=Search(evaluations=12, tokens=64),
)


@pytest.fixture(scope="module")
def found(params):  # noqa: F811
  return methods.prune(task_of(params, SETTINGS))


def test_search_beats_its_start_at_the_target(found):
  fact = found.trace[0]["search"]
  assert fact["end"] < fact["start"]
  assert fact["evaluations"] == 12
  assert TARGET - CHANNEL < model_config.count_params(found.config) <= TARGET


def test_search_is_the_same_each_time(params, found):  # noqa: F811
  same(found, methods.prune(task_of(params, SETTINGS)))


@pytest.mark.slow
def test_the_divergence_is_that_of_the_smaller_model(params, found):  # noqa: F811
  """Masked equals gathered, and NumPy's KL."""
  task = task_of(params, SETTINGS)
  divergence = search._divergence(steps._begin(task))
  masks = surgery.to_masks(found.kept, CONFIG)
  some = samples(0)[np.linspace(0, 15, 8).astype(int)]

  def log_probs(config, params):
    logits = Decoder(config).apply({"params": params}, some)[0]
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  p, q = log_probs(CONFIG, params), log_probs(found.config, found.params)
  expected = (np.exp(p) * (p - q)).sum(-1).mean()
  np.testing.assert_allclose(divergence(masks), expected, rtol=1e-4)
  assert divergence(task.begin) < 1e-6


@pytest.mark.slow
def test_candidates_are_tried_on_the_tuning_text(params, found):  # noqa: F811
  given = dataclasses.replace(
    task_of(params, SETTINGS), tuning=lambda step: samples(step + 50)
  )
  masked = steps._begin(given)
  masks = surgery.to_masks(found.kept, CONFIG)
  mine = search._divergence(masked)(masks)
  other = dataclasses.replace(given, samples=given.tuning, tuning=None)
  assert mine == search._divergence(steps._begin(other))(masks)
  plain = search._divergence(steps._begin(task_of(params, SETTINGS)))(masks)
  assert mine != plain


@pytest.mark.slow
def test_four_devices_find_the_same(params, found):  # noqa: F811
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  one = methods.prune(task_of(placed, SETTINGS, mesh=mesh))
  jax.tree.map(np.testing.assert_array_equal, one.kept, found.kept)


def test_fewer_calibration_tokens_than_a_candidate_takes_are_an_error(params):  # noqa: F811
  recipe = Config()
  recipe.prune.ratio, recipe.prune.allotment = 0.2, "search"
  recipe.calibration.samples, recipe.calibration.seq_len = 4, 8
  with pytest.raises(UserError, match=r"search\.tokens=2048"):
    check(recipe)
  settings = dataclasses.replace(SETTINGS, search=Search(tokens=129))
  with pytest.raises(UserError, match=r"search\.tokens=129"):
    methods.prune(task_of(params, settings))


@pytest.mark.slow
def test_search_in_steps_goes_on(params):  # noqa: F811
  settings = dataclasses.replace(
    SETTINGS, search=Search(steps=2, evaluations=8, tokens=64)
  )
  told: list[Step] = []
  log = lambda record, step: told.append(step)
  whole = methods.prune(task_of(params, settings, log=log))
  assert len(told) == 2
  same(whole, methods.prune(task_of(params, settings, after=told[0])))


def test_a_target_out_of_reach_is_an_error(params):  # noqa: F811
  with pytest.raises(UserError, match="cannot reach"):
    methods.prune(task_of(params, SETTINGS, target=100))


@pytest.mark.parametrize("budget", ["flops", "bytes"])
def test_candidates_meet_another_budget(budget):
  settings = dataclasses.replace(SETTINGS, budget=budget, budget_context=32)
  masks = surgery.to_masks(surgery.everything(CONFIG), CONFIG)
  target = int(budgets.count(CONFIG, settings) * 0.75)
  prunable = targets.prunable_modules(CONFIG, settings)
  space = search.Space(CONFIG, masks, prunable, target, settings)
  random = np.random.default_rng(0)
  scores = {u: random.random(m.shape) for u, m in masks.items()}
  found = search.starts(space, Measured(scores))
  found += [search.candidate(space, found[0], random) for _ in range(5)]
  left, channel = (
    surgery.widths(masks),
    budgets.unit_cost(CONFIG, settings)["F"],
  )
  for counts in filter(None, found):
    width = {u: left[u] - counts[u] for u in left}
    size = budgets.of_widths(CONFIG, width, settings)
    assert target - channel.max() < size <= target


def test_a_cache_is_not_searched_for():
  config = Config(prune=dataclasses.replace(SETTINGS, ratio=0.2))
  config.prune.budget = "kv_bytes"
  with pytest.raises(UserError, match="tries out MLPs"):
    check(config)
