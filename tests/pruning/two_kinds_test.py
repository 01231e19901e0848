"""Pruning models of two kinds of layer.

Some have gated delta nets, whose units are key heads, some heads of another
size.
"""

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
KINDS = pytest.mark.parametrize("option", ["delta", "wide", "shared"])


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Most of the time goes into compiling programs that run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def params(option):
  return small.random_params(small.option(option))


def tokens(seed=0):
  return small.tokens(CONFIG, 6, 20, seed)


def task(option, settings, target=None):
  return PruneTask(
    small.option(option),
    params(option),
    settings,
    tokens,
    target=target,
    refit_samples=tokens,
    batch=3,
  )


def target(option):
  return int(0.7 * model_config.count_params(small.option(option)))


@functools.cache
def pruned(option):
  """By Adapt-Pruner, to a size that no whole KV group ends at."""
  settings = Prune(step_size=0.1)
  return methods.prune(task(option, settings, target(option)))


@pytest.mark.slow
@KINDS
def test_ends_at_its_target(option):
  found, full = pruned(option), small.option(option)
  channel, most = model_config.unit_cost(full)["F"], target(option)
  assert most - channel < model_config.count_params(found.config) <= most
  assert found.config.kv_groups[1] < full.kv_groups[1]  # of the second kind


@pytest.mark.slow
@KINDS
def test_scores_are_weights_times_gradients(option):
  config, weights = small.option(option), params(option)

  def loss(params):
    logits, _ = Decoder(config).apply({"params": params}, tokens())
    said = jax.nn.log_softmax(logits[:, :-1])
    next_BT1 = tokens()[:, 1:, None]
    # Two minibatches of three rows: a sum of their means.
    return -2 * jnp.take_along_axis(said, next_BT1, axis=-1).mean()

  grads = jax.jit(jax.grad(loss))(weights)
  masked = steps._begin(task(option, Prune(max_steps=1)))
  found = scores.measure(masked, tokens(), kind="taylor").scores
  for i in range(config.num_layers):
    for unit in axes.UNITS:
      total = 0.0
      for name, grad in grads[f"layer_{i}"].items():
        if name in axes.SCORED[unit]:
          at = axes.AXES[name].index(axes.cut_of(name))
          each = np.abs(np.float64(weights[f"layer_{i}"][name]) * grad)
          total += np.moveaxis(each, at, 0).reshape(grad.shape[at], -1).sum(1)
      here = found[unit][i]
      np.testing.assert_allclose(here[: len(total)], total, rtol=2e-4)
      assert not here[len(total) :].any()


READERS = {
  "shared": ("wide_q", "wide_k", "wide_v"),
  "delta": ("delta_q", "delta_k", "delta_v", "delta_gate", "delta_decay"),
  "wide": ("wide_q", "wide_k"),
}


@pytest.mark.slow
@KINDS
def test_refit_of_all_matrices(option):
  """What is held out fits better, in both kinds of layer."""
  found, config = pruned(option), small.option(option)
  _, records = refit.refit(
    (config, params(option)),
    (found.config, found.params),
    found.kept,
    small.tokens(CONFIG, 40, 20, 1),
    20,
    refit_all=True,
  )
  by_name = {(r["layer"], r["matrix"]): r for r in records}
  for name in ("q", "o", *["q_gate"] * config.attn_gate):
    assert (2, name) in by_name
  for name in (*READERS[option], "delta_o" if option == "delta" else "wide_o"):
    assert (1, name) in by_name
  better = [r for r in records if r["refitted"]]
  assert all(r["after"] < r["before"] for r in better)
  names = {r["matrix"] for r in better}
  assert "down" in names
  assert names & {*READERS[option]}


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


def test_costs_of_wide_heads():
  """A KV group without a matrix of values, of three heads of eight channels."""
  config = small.option("wide")
  fewer = config.with_units({**config.units(), "K": (4, 1, 3)})
  group = config.hidden_size * (2 * 3 * 8 + 8)
  assert model_config.unit_cost(config, 1)["K"] == group
  assert config.head_channels() == (4 * 2 * 4, 2 * 3 * 8, 3 * 2 * 4)
  settings = Prune(budget="kv_bytes", budget_value=1.0, budget_context=64)
  whole, less = (budgets.count(c, settings) for c in (config, fewer))
  curve = budgets.curves(config, settings)["K"][1]
  assert whole - less == curve[2] - curve[1] == 2 * 8 * 64 * 2


@pytest.mark.parametrize(
  "settings",
  [Prune(method=m) for m in ("flap", "wanda_sp", "minitron", "slicegpt")]
  + [Prune(method="curvature"), Prune(method="surgeon")],
)
def test_methods_of_one_kind_of_layer_are_refused(settings):
  with pytest.raises(UserError, match="gated delta net in place of"):
    methods.check(CONFIG, settings)
  with pytest.raises(UserError, match="layers with wider heads, which this"):
    methods.check(small.option("wide"), settings)
