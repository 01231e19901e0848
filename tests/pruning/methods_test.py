"""Scores, allotments and refits combine freely, and every prune goes on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import PUBLISHED, LlmPruner, Prune, Search, Uniform
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import methods
from adapt_pruner_jax.pruning.task import PruneTask, Step

CONFIG = ModelConfig(
  family="llama",
  vocab_size=31,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(3, 3, 3),
  ffn_widths=(24, 24, 24),
  norm_eps=1e-5,
  rope=Rope(),
  context=16,
  tied=True,
)
CHANNEL = model_config.unit_cost(CONFIG)["F"]
SIZE = model_config.count_params(CONFIG)
SLOW = {"surgeon": pytest.mark.slow}  # two programs, each of many matrices
MASKED = [
  pytest.param(name, marks=SLOW.get(name, ()))
  for name in PUBLISHED
  if name not in ("slicegpt", "reap")  # which do not mask
]


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
  """These tests compile for much longer than they compute."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)

  def draw(name, _, leaf):
    if "norm" in name:
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    return jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32)

  return axes.map_named(draw, model_config.abstract_params(CONFIG, jnp.float32))


def samples(step):
  return np.random.default_rng(step).integers(0, 31, (16, 8), np.int32)


def task_of(params, settings, **given):
  target = given.pop("target", int(SIZE * 0.75))
  return PruneTask(
    CONFIG, params, settings, samples, target, batch=8, seed=3, **given
  )


def same(one, other):
  assert one.config == other.config
  jax.tree.map(np.testing.assert_array_equal, one.kept, other.kept)
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize(
  "allotment, score",
  [
    pytest.param("search", "curvature", marks=pytest.mark.slow),
    pytest.param("ranking", "surgeon", marks=pytest.mark.slow),
    *itertools.product(
      ("adapt", "uniform", "ranking"),
      ("taylor", "l2", "random", "curvature", "fisher", "fluctuation"),
    ),
  ],
)
def test_any_score_with_any_allotment_and_refits(params, allotment, score):
  """The target is met, and a cut prune ends as the whole one does."""
  settings = Prune(
    allotment=allotment,
    group_importance=score,
    refit="2",
    uniform=Uniform(steps=3),
    search=Search(steps=3, evaluations=6, tokens=32),
    step_size=0.1,
  )
  seen = []
  note = lambda record, step: seen.append(step)
  whole = methods.prune(task_of(params, settings, log=note))
  size = model_config.count_params(whole.config)
  assert int(SIZE * 0.75) - CHANNEL < size <= int(SIZE * 0.75)
  assert len(seen) > 2
  steps_refitted = [r["step"] for r in whole.trace if "refit" in r]
  assert steps_refitted == list(range(2, len(seen), 2))
  # What pruning.json keeps of a step.
  step = seen[1]
  left = Step(
    step.number, step.masks, step.sparsity, step.params, step.refitted
  )
  rest = methods.prune(task_of(params, settings, after=left))
  same(rest, whole)
  assert rest.trace == whole.trace[2:]


@pytest.mark.parametrize("name", MASKED)
def test_a_method_alone_is_its_published_pair(params, name):
  """And goes on behind its last step, to the same."""
  settings = Prune(method=name, uniform=Uniform(steps=2))
  seen = []
  note = lambda record, step: seen.append(step)
  whole = methods.prune(task_of(params, settings, log=note))
  allotment, score = settings.pair()
  if score in (*methods.scores.KINDS, "curvature", "fisher"):
    named = dataclasses.replace(settings, group_importance=score)
    if allotment in ("adapt", "ranking"):
      named = dataclasses.replace(named, allotment=allotment, method="adapt")
    same(methods.prune(task_of(params, named)), whole)
  if name in ("flap", "wanda_sp", "shortgpt"):  # published in one pass
    assert len(seen) == 1
  if name in ("llm_pruner", "magnitude", "random"):
    assert len(seen) == 2
  for step in (seen[0], seen[-1]):
    same(methods.prune(task_of(params, settings, after=step)), whole)


def test_settings_of_a_baseline_are_its_own(params):
  alone = Prune(method="magnitude")
  other = dataclasses.replace(alone, llm_pruner=LlmPruner("global"))
  one, two = (methods.prune(task_of(params, s)) for s in (alone, other))
  same(one, two)


def test_a_prune_that_is_at_its_target_may_be_refitted(params):
  """As behind a stage that ended below the target of the next."""
  asked = []

  def tokens_of(step):
    asked.append(step)
    return samples(step)

  settings = Prune(refit="final")
  task = task_of(params, settings, target=SIZE, refit_samples=tokens_of)
  pruned = methods.prune(task)
  assert pruned.trace == []
  same(methods.refit_after(task, pruned), pruned)
  assert asked == [0]


@pytest.mark.slow
def test_refit_by_the_loss_alone(params):
  """Of OLMo 2, whose norms stand behind the matrices; each pass is new text."""
  olmo = dataclasses.replace(CONFIG, norm_order="post", family="olmo2")
  fisher, asked = Prune(method="fisher"), []

  def tokens_of(step):
    asked.append(step)
    return samples(100 + step)

  settings = dataclasses.replace(
    fisher, refit="loss", refit_passes=2, refit_rate=3e-3, refit_batch=5
  )
  abstract = model_config.abstract_params(olmo, jnp.float32)
  rng = np.random.default_rng(1)
  draw = lambda leaf: jnp.asarray(rng.normal(0.3, 0.3, leaf.shape), jnp.float32)
  task = dataclasses.replace(
    task_of(params, settings, refit_samples=tokens_of, full=olmo),
    config=olmo,
    params=jax.tree.map(draw, abstract),
  )
  pruned = methods.prune(task)
  refitted = methods.refit_after(task, pruned)
  last = pruned.trace[-1]["step"]
  assert sorted({*asked}) == [last, last + 1]
  assert refitted.refits == []
  # Whole steps of 5 windows of 8 tokens: of 15 (one is held out) and of 16.
  assert refitted.refit_loss["tokens"] == 2 * 3 * 5 * 8
  assert refitted.refit_loss["after"] < refitted.refit_loss["before"]


def test_what_does_not_combine(params):
  residual = dataclasses.replace(CONFIG, residual=((8, 8, 8),) * 3)
  with pytest.raises(UserError, match="cut by SliceGPT"):
    methods.check(residual, Prune())
  sliced = Prune(method="slicegpt", refit="2")
  with pytest.raises(UserError, match="SliceGPT changes"):
    methods.check(CONFIG, sliced)
  with pytest.raises(UserError, match="needs a target"):
    methods.prune(task_of(params, Prune(allotment="uniform"), target=None))
