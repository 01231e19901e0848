"""Pruning models with gated delta nets, whose units are key heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import (
  budgets,
  methods,
  refit,
  scores,
  steps,
)
from adapt_pruner_jax.pruning.task import PruneTask
from tests import small

CONFIG = small.option("delta")
SIZE = model_config.count_params(CONFIG)
TARGET = int(0.7 * SIZE)


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Most of the time goes into compiling programs that run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params():
  return small.random_params(CONFIG)


def tokens(seed=0):
  return small.tokens(CONFIG, 6, 20, seed)


def task(settings, target=None):
  return PruneTask(
    CONFIG,
    params(),
    settings,
    tokens,
    target=target,
    refit_samples=tokens,
    batch=3,
  )


@functools.cache
def pruned():
  """By Adapt-Pruner, to a size that no whole KV group ends at."""
  return methods.prune(task(Prune(step_size=0.1), TARGET))


@pytest.mark.slow
def test_ends_at_its_target():
  found, channel = pruned(), model_config.unit_cost(CONFIG)["F"]
  assert TARGET - channel < model_config.count_params(found.config) <= TARGET
  assert found.config.kv_groups[1] < CONFIG.kv_groups[1]  # of the delta net


@pytest.mark.slow
def test_scores_are_weights_times_gradients():
  def loss(params):
    logits, _ = Decoder(CONFIG).apply({"params": params}, tokens())
    said = jax.nn.log_softmax(logits[:, :-1])
    next_BT1 = tokens()[:, 1:, None]
    # Two minibatches of three rows: a sum of their means.
    return -2 * jnp.take_along_axis(said, next_BT1, axis=-1).mean()

  grads = jax.jit(jax.grad(loss))(params())
  masked = steps._begin(task(Prune(max_steps=1)))
  found = scores.measure(masked, tokens(), kind="taylor").scores
  for i in range(CONFIG.num_layers):
    for unit in axes.UNITS:
      total = 0.0
      for name, grad in grads[f"layer_{i}"].items():
        if name in axes.SCORED[unit]:
          at = axes.AXES[name].index(axes.cut_of(name))
          each = np.abs(np.float64(params()[f"layer_{i}"][name]) * grad)
          total += np.moveaxis(each, at, 0).reshape(grad.shape[at], -1).sum(1)
      here = found[unit][i]
      np.testing.assert_allclose(here[: len(total)], total, rtol=2e-4)
      assert not here[len(total) :].any()


@pytest.mark.slow
def test_refit_of_all_matrices():
  """What is held out fits better, in both kinds of layer."""
  found = pruned()
  dense = CONFIG, params()
  fitted, records = refit.refit(
    dense,
    (found.config, found.params),
    found.kept,
    small.tokens(CONFIG, 40, 20, 1),
    20,
    refit_all=True,
  )
  by_name = {(r["layer"], r["matrix"]): r for r in records}
  for name in ("q", "q_gate", "o"):
    assert (2, name) in by_name
  for name in ("delta_q", "delta_v", "delta_gate", "delta_decay", "delta_o"):
    assert (1, name) in by_name
  better = [r for r in records if r["refitted"]]
  assert all(r["after"] < r["before"] for r in better)
  names = {r["matrix"] for r in better}
  assert "down" in names
  assert names & {"delta_q", "delta_k", "delta_v", "delta_gate"}
  held = small.tokens(CONFIG, 20, 20, 2)
  run = jax.jit(Decoder(found.config).apply)
  true, _ = Decoder(CONFIG).apply({"params": params()}, held)
  off = lambda p: np.square(run({"params": p}, held)[0] - true).mean()
  assert off(fitted) < 0.9 * off(found.params)


def test_costs_of_both_kinds():
  """A key head less, counted by hand, and by each budget's curve."""
  fewer = CONFIG.with_units({**CONFIG.units(), "K": (4, 1, 3)})
  D, Y = CONFIG.hidden_size, 2 * 6
  group = D * (4 + 4 + 3 * Y + 2 * 2) + 3 * (4 + 4 + Y) + 2 * 2
  assert SIZE - model_config.count_params(fewer) == group
  assert model_config.unit_cost(CONFIG, 1)["K"] == group
  for budget in ("params", "flops", "kv_bytes"):
    settings = Prune(budget=budget, budget_value=1.0, budget_context=64)
    whole, less = (budgets.count(c, settings) for c in (CONFIG, fewer))
    curve = budgets.curves(CONFIG, settings)["K"][1]
    assert whole - less == curve[2] - curve[1] > 0
  # A memory of float32, two inputs of convolutions; whatever the context is.
  assert whole - less == settings.budget_batch * (4 * 4 * Y + 2 * 2 * (8 + Y))


@pytest.mark.parametrize(
  "settings",
  [Prune(method=m) for m in ("flap", "wanda_sp", "minitron", "slicegpt")]
  + [Prune(method="curvature"), Prune(method="surgeon")],
)
def test_methods_of_one_kind_of_layer_are_refused(settings):
  with pytest.raises(UserError, match="gated delta net in place of"):
    methods.check(CONFIG, settings)
