"""Budgets against files and against sums by hand."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, check
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning import budgets, methods, surgery, targets
from adapt_pruner_jax.pruning.task import PruneTask
from tests import small

WIDE = dataclasses.replace(
  small.CONFIG,
  hidden_size=64,
  head_dim=16,
  ffn_widths=(96, 160, 128),
  window=(0, 5, 0),
)
BUDGETS = {
  "params": Prune(),
  "flops": Prune(budget="flops", budget_context=32),
  "kv_bytes": Prune(budget="kv_bytes", budget_context=32, budget_batch=3),
  "bf16": Prune(budget="bytes"),
  "q8_0": Prune(budget="bytes", budget_export="q8_0"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_unit_costs_what_goes_with_it(name):
  """Of any layer, also of one that sees a window; blocks of 32 channels."""
  settings = BUDGETS[name]
  cost, whole = budgets.unit_cost(WIDE, settings), WIDE.units()
  for u, block in (("K", 1), ("F", 32)):
    for i in range(WIDE.num_layers):
      fewer = list(whole[u])
      fewer[i] -= block
      less = WIDE.with_units(whole | {u: tuple(fewer)})
      gone = budgets.count(WIDE, settings) - budgets.count(less, settings)
      assert gone == block * cost[u][i]


def test_flops_and_cache_by_hand():
  config = dataclasses.replace(WIDE, kv_groups=(2, 1, 0), ffn_widths=(32, 0, 0))
  D, H, G, V = 64, 16, 2, config.vocab_size
  assert budgets.count(config, BUDGETS["kv_bytes"]) == (
    2 * 2 * H * 3 * (2 * 32 + 1 * 5)  # keys and values, 2 bytes, 3 sequences
  )
  matrices = 3 * (2 * G + 2) * D * H + 3 * 32 * D + V * D
  norms = D * (2 + 1 + 1)  # as if each number were a multiplication
  scores = 4 * G * H * (2 * 32 + 1 * 5)
  found = budgets.count(config, BUDGETS["flops"])
  assert found == 2 * (matrices + norms) + scores


@pytest.mark.parametrize("widths", [(96, 160, 128), (96, 100, 33)])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_bytes_are_those_of_the_file(kind, widths):
  """Of a gguf the tensors' own; rows of no whole blocks are float16."""
  config = dataclasses.replace(WIDE, window=(), ffn_widths=widths)
  settings = Prune(budget="bytes", budget_export=kind)
  found = budgets.count(config, settings)
  if kind != "q8_0":  # as safetensors: every number alike
    size = {"f32": 4, "f16": 2, "bf16": 2}[kind]
    assert found == size * model_config.count_params(config)
    return
  params = model_config.abstract_params(config, jnp.dtype("float32"))
  total = 0
  for tensor in writer.tensors(config, params, "deci", kind):
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    total += int(np.prod(tensor.shape)) // block * size
  assert found == total


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize(
  "method",
  ["magnitude", "curvature", pytest.param("adapt", marks=pytest.mark.slow)],
)
def test_the_largest_model_not_above(name, method):
  """Whatever it is counted in, one unit more would be above the target."""
  settings = dataclasses.replace(BUDGETS[name], method=method, ratio=0.3)
  settings.group_importance = "l2" if method == "magnitude" else "random"
  if method == "adapt" and name == "kv_bytes":
    settings.step_size = 0.1  # of few KV groups; a small step is none of them
  target = targets.resolve_target(WIDE, settings)
  assert target == int(budgets.count(WIDE, settings) * 0.7)
  task = PruneTask(
    WIDE,
    small.random_params(WIDE),
    settings,
    lambda step: small.tokens(WIDE, 4, 8, step),
    target,
    batch=4,
  )
  pruned = methods.prune(task)
  left = budgets.count(pruned.config, settings)
  assert left <= target
  cost = budgets.unit_cost(WIDE, settings)
  block = 32 if name == "q8_0" else 1
  unit = cost["F"].max() * block if name != "kv_bytes" else cost["K"].max()
  assert left + unit > target
  if name == "kv_bytes":  # MLPs have no part in it
    assert pruned.config.ffn_widths == WIDE.ffn_widths
  assert {*pruned.kept} == {*UNITS}
  assert surgery.with_units(WIDE, pruned.kept) == pruned.config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"budget": "watts"}, "is not one of params, flops, bytes, kv_bytes"),
    ({"budget": "flops", "target_params": 9}, "goes with prune.ratio or"),
    ({"budget": "flops", "method": "flap"}, "--config.prune.method=adapt"),
    ({"budget_value": 9.0}, "are both given"),
    ({"budget_context": 0}, "must be at least 1"),
  ],
)
def test_bad_input(fields, message):
  given = {"ratio": 0.0 if "target_params" in fields else 0.2} | fields
  with pytest.raises(UserError, match=message):
    check(Config(prune=Prune(**given)))


def test_a_budget_out_of_reach():
  settings = Prune(budget="flops", budget_value=10.0)
  with pytest.raises(UserError, match=r"10 FLOPs cannot be reached: .* remain"):
    targets.resolve_target(WIDE, settings)
  settings = Prune(budget="bytes", budget_value=1e9)
  with pytest.raises(UserError, match=r"budget_value=1,000,000,000 is not b"):
    targets.resolve_target(WIDE, settings)
