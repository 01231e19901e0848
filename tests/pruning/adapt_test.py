"""Which units go, how many, and what the arrays are afterwards."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt_pruner_jax.config import Prune, Train
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import attention_inputs, place, run_layer
from adapt_pruner_jax.pruning import (
  choice,
  exact_target,
  methods,
  passes,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning import scores as scores_
from adapt_pruner_jax.pruning.task import PruneTask, Step
from adapt_pruner_jax.training.step import init_optimizer
from tests import small

MANY = settings(
  max_examples=150,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FEW = settings(MANY, max_examples=25)


def config_of(K, F, **changes):
  return dataclasses.replace(
    small.CONFIG, kv_groups=tuple(K), ffn_widths=tuple(F), **changes
  )


def same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


# ---- Trimming ----------------------------------------------------------------


@st.composite
def planned_removals(draw):
  L = draw(st.integers(1, 3))
  full = config_of(
    draw(st.lists(st.integers(1, 5), min_size=L, max_size=L)),
    draw(st.lists(st.integers(1, 40), min_size=L, max_size=L)),
    qkv_bias=draw(st.booleans()),
    head_dim=draw(st.sampled_from([1, 4])),
    hidden_size=draw(st.sampled_from([2, 16])),
  )
  prunable = {
    u: np.array(draw(st.lists(st.booleans(), min_size=L, max_size=L)))
    for u in UNITS
  }
  round_to = draw(st.sampled_from([1, 1, 4, 8]))
  counts = {}
  for u in UNITS:
    units = np.array(full.units()[u])
    n = np.array([draw(st.integers(0, int(w) - 1)) for w in units])
    if u == "F":
      n = np.maximum(units - -(-(units - n) // round_to) * round_to, 0)
    counts[u] = np.where(prunable[u], n, 0)
  target = draw(st.integers(0, model_config.count_params(full)))
  return full, prunable, counts, target, round_to


def size_after(full, counts):
  width = {u: np.array(full.units()[u]) - counts[u] for u in UNITS}
  return model_config.count_params(surgery.with_widths(full, width))


@given(planned_removals())
@settings(MANY, max_examples=500)
def test_trim_ends_just_below_the_target(case):
  full, prunable, counts, target, round_to = case
  masks = surgery.to_masks(surgery.everything(full), full)
  rounding = Prune(round_ffn_to=round_to)
  got = exact_target.trim(full, masks, counts, prunable, target, rounding)
  size = size_after(full, got)
  if size_after(full, counts) > target or target >= model_config.count_params(
    full
  ):
    same(got, counts)
    return
  assert size <= target
  cost = model_config.unit_cost(full)
  channels = any(prunable["F"] & (np.array(full.ffn_widths) > round_to))
  for u in UNITS:
    units = np.array(full.units()[u])
    assert np.all(got[u] >= 0)
    assert np.all(got[u] < units)  # no module is emptied
    assert np.all(got[u][~prunable[u]] == 0)
  assert np.all(got["K"] <= counts["K"])
  touched = (np.array(full.ffn_widths) - got["F"])[got["F"] > 0]
  assert np.all(touched % round_to == 0)
  if got["K"].sum() == 0 or target - size < round_to * cost["F"]:
    # Only channels went, or they made up the difference.
    assert target - size < round_to * cost["F"]
  else:
    # Within one group; and without the last group, all channels that there are
    # would not have been enough.
    assert target - size < cost["K"]
    if channels:
      spare = sum(
        (w - 1) // round_to * round_to
        for w, p in zip(full.ffn_widths, prunable["F"], strict=True)
        if p
      )
      assert (
        size + cost["K"] - spare * cost["F"] > target - cost["F"] * round_to
      )


def test_trim_takes_channels_in_place_of_a_group_too_much():
  full = config_of((4, 4), (40, 40))
  cost = model_config.unit_cost(full)
  assert cost == {"K": 16 * (2 + 1 + 1 + 2) * 4, "F": 3 * 16}  # 384 = 8 x 48
  masks = surgery.to_masks(surgery.everything(full), full)
  everywhere = {u: np.ones(2, bool) for u in UNITS}
  counts = {"K": np.array([2, 1]), "F": np.array([4, 2])}
  size = model_config.count_params(full)
  # In turn: F0 at 1/4, F0 F1 K0 at 1/2, F0 at 3/4, F0 F1 K0 K1 at 1.
  trim = lambda n: exact_target.trim(full, masks, counts, everywhere, size - n)
  same(trim(48), {"K": [0, 0], "F": [1, 0]})
  same(trim(3 * 48), {"K": [0, 0], "F": [2, 1]})
  # One parameter more would take the group of layer 0; a fourth channel does.
  same(trim(3 * 48 + 1), {"K": [0, 0], "F": [3, 1]})
  same(trim(384), {"K": [1, 0], "F": [0, 0]})
  same(trim(384 + 1), {"K": [1, 0], "F": [1, 0]})
  # Nothing to trim where the counts only just reach it, or do not.
  all_of_it = 3 * 384 + 6 * 48
  same(trim(all_of_it), counts)
  same(trim(all_of_it + 1), counts)


# ---- The loop, without a model -----------------------------------------------


@pytest.fixture
def fake_scores(monkeypatch):
  """Random importances and salience, in place of the model's."""

  def measure_step(config, stacked, masks, tokens_MBT, valid_MB, **_):
    # Of what is measured, so that a repeated step is the same.
    rng = np.random.default_rng(int(np.sum(tokens_MBT) + masks["F"].sum()))
    sizes = config.sizes(0) | {"L": config.num_layers}
    letters = {"q": "LKG", "k": "LK", "v": "LK", "o": "LKG"}
    letters |= dict.fromkeys(("gate", "up", "down"), "LF")
    return {
      "loss_M": np.ones(len(tokens_MBT), np.float32),
      "importance_ML": rng.normal(size=(len(tokens_MBT), config.num_layers)),
      "salience": {
        n: rng.random([sizes[x] for x in text]) for n, text in letters.items()
      },
    }

  fake = passes.Programs(measure_step)
  monkeypatch.setattr(scores_, "PROGRAMS", fake)


def run(config, target, after=None, log=None, **recipe):
  task = PruneTask(
    config,
    small.random_params(config),
    Prune(**{"amplitude": 0.05} | recipe),
    lambda step: small.tokens(config, 3, 5, seed=step),
    target,
    batch=2,
    after=after,
    log=log,
  )
  return methods.prune(task)


@given(
  share=st.floats(0.02, 0.6),
  K=st.lists(st.integers(1, 4), min_size=3, max_size=3),
  F=st.lists(st.integers(30, 60), min_size=3, max_size=3),
  round_to=st.sampled_from([1, 1, 4]),
  round_kv=st.sampled_from([1, 1, 2]),
  fold=st.sampled_from(["aligned", "reference"]),
)
@FEW
def test_target_is_met_within_a_channel(
  fake_scores, share, K, F, round_to, round_kv, fold
):
  config = config_of(K, F)
  recipe = {"round_ffn_to": round_to, "gqa_fold": fold}
  recipe["round_kv_to"] = round_kv
  size = model_config.count_params(config)
  target = int(
    size - share * (size - targets.smallest(config, Prune(**recipe)))
  )
  pruned = run(config, target, **recipe)
  size = model_config.count_params(pruned.config)
  assert size == pruned.trace[-1]["params"] <= target
  assert target - size < round_to * model_config.unit_cost(config)["F"]
  for width, full in zip(pruned.config.ffn_widths, F, strict=True):
    assert width == full or width % round_to == 0
  for groups, full in zip(pruned.config.kv_groups, K, strict=True):
    assert groups > 0
    assert groups == full or groups % round_kv == 0


@pytest.mark.parametrize(
  "recipe, unit",
  [
    ({"attention_layers": "1:3", "mlp_layers": "0:0"}, "K"),
    ({"attention_layers": "0:0", "mlp_layers": ":2"}, "F"),
  ],
)
def test_only_the_layers_in_range_are_pruned(fake_scores, recipe, unit):
  config = config_of((8, 8, 8), (40, 40, 40))
  cost = model_config.unit_cost(config)[unit]
  size = model_config.count_params(config)
  pruned = run(config, size - 5 * cost - 1, **recipe)
  assert model_config.count_params(pruned.config) == size - 6 * cost
  spared = {"K": 0, "F": 2}[unit]
  other = {"K": "F", "F": "K"}[unit]
  assert pruned.config.units()[unit][spared] == config.units()[unit][spared]
  assert pruned.config.units()[other] == config.units()[other]
  for layer in pruned.trace[0]["layers"]:
    name = {"K": "mlp_importance", "F": "attn_importance"}[unit]
    assert layer[name] is None


def test_units_and_trace_are_numbered_as_the_original_model(fake_scores):
  full = config_of((4, 4, 4), (40, 40, 40))
  first = run(full, int(0.8 * model_config.count_params(full)))
  params = small.random_params(full)
  target = int(0.6 * model_config.count_params(full))
  task = PruneTask(
    first.config,
    first.params,
    Prune(amplitude=0.05),
    lambda step: small.tokens(full, 3, 5, seed=step),
    target,
    full=full,
    kept=first.kept,
  )
  second = methods.prune(task)
  for u in UNITS:
    for before, after in zip(first.kept[u], second.kept[u], strict=True):
      assert set(after) <= set(before)
  _, want = surgery.gather(full, params, second.kept, small.one_device())
  same(second.params, want)
  last = second.trace[-1]
  assert last["params"] == model_config.count_params(second.config) <= target
  assert [x["ffn"] for x in last["layers"]] == list(second.config.ffn_widths)
  assert [x["kv_groups"] for x in last["layers"]] == list(
    second.config.kv_groups
  )
  json.dumps(second.trace, allow_nan=False)


@pytest.mark.parametrize("number", [1, 4])
def test_an_interrupted_stage_continues_to_the_same_result(fake_scores, number):
  config = config_of((4, 4, 4), (40, 40, 40))
  target = int(0.7 * model_config.count_params(config))
  seen = []
  kind = {"group_importance": "taylor"}
  want = run(config, target, log=lambda _, step: seen.append(step), **kind)
  assert len(seen) > 5
  # All that is kept of a step.
  step = seen[number - 1]
  left = Step(step.number, step.masks, step.sparsity, step.params)
  got = run(config, target, after=left, **kind)
  assert got.trace == want.trace[number:]
  assert got.config == want.config
  same(got.params, want.params)
  done = run(config, target, after=seen[-1], **kind)
  assert done.trace == []
  same(done.kept, want.kept)


def test_random_scores_follow_the_seed(fake_scores):
  config = config_of((4, 4), (40, 40))
  target = int(0.8 * model_config.count_params(config))

  def kept(seed):
    task = PruneTask(
      config,
      small.random_params(config),
      Prune(group_importance="random"),
      lambda step: small.tokens(config, 3, 5),
      target,
      seed=seed,
    )
    pruned = methods.prune(task)
    return [k.tolist() for k in pruned.kept["F"]]

  assert kept(1) == kept(1) != kept(2)


def test_without_trim_the_last_step_is_whole(fake_scores):
  config = config_of((8, 8, 8), (400, 400, 400))
  target = int(0.8 * model_config.count_params(config))
  trimmed, whole = run(config, target), run(config, target, trim=False)
  assert trimmed.trace[:-1] == whole.trace[:-1]
  assert model_config.count_params(whole.config) < target - 3 * 16
  assert whole.trace[-2]["params"] >= target


def test_steps_are_limited_with_and_without_a_target(fake_scores):
  config = config_of((4, 4), (40, 40))
  assert len(run(config, None, max_steps=3).trace) == 3
  assert len(run(config, 1000, max_steps=2).trace) == 2


def test_schedule_that_cannot_reach_its_target(fake_scores):
  # One of two groups stays for any sparsity: 0.99 asks for both.
  config = config_of((2, 2), (40, 40))
  recipe = {"mlp_layers": "0:0", "amplitude": 0.0, "step_size": 0.25}
  target = targets.smallest(config, Prune(**recipe))
  assert (
    model_config.count_params(run(config, target, **recipe).config) == target
  )
  with pytest.raises(UserError, match=r"stopped at .* above the target"):
    run(config, target - 1, **recipe)


def test_values_that_are_not_finite(fake_scores, monkeypatch):
  config = config_of((2, 2), (40, 40))
  measured = scores_.PROGRAMS.walk

  def broken(*args, **kwargs):
    found = measured(*args, **kwargs)
    return found | {"importance_ML": found["importance_ML"] * np.nan}

  monkeypatch.setattr(scores_, "PROGRAMS", passes.Programs(broken))
  with pytest.raises(UserError, match="step 1 are not finite"):
    run(config, 1000)


# ---- Targets -----------------------------------------------------------------


def test_resolve_target():
  config = config_of((4, 4), (40, 40))
  # 2 x 40 x 16 outside; a layer 2 x 16 + 4 x 384 + 40 x 48; 16 at the end.
  size = 1280 + 2 * (32 + 1536 + 1920) + 16
  assert model_config.count_params(config) == size == 8272
  least = 1280 + 2 * (32 + 384 + 48) + 16
  assert targets.smallest(config, Prune()) == least
  assert targets.resolve_target(config, Prune()) is None
  assert targets.resolve_target(config, Prune(ratio=0.25)) == 6204
  assert targets.resolve_target(config, Prune(target_params=least)) == least
  with pytest.raises(UserError, match=r"8,272 is not below the model's 8,272"):
    targets.resolve_target(config, Prune(target_params=size))
  with pytest.raises(UserError, match=f"be reached.* {least:,} of 8,272"):
    targets.resolve_target(config, Prune(target_params=least - 1))
  narrow = Prune(method="slicegpt", target_params=least - 1)
  assert targets.resolve_target(config, narrow) == least - 1
  rounded = Prune(target_params=least, round_ffn_to=16, mlp_layers="0:1")
  least = 1280 + 2 * (32 + 384) + (16 + 40) * 48 + 16
  with pytest.raises(UserError, match=f"{least:,} of 8,272"):
    targets.resolve_target(config, rounded)


@pytest.mark.parametrize("text", ["3", "1:9", "4:2", "-1:2", "a:b"])
def test_bad_layer_range(text):
  with pytest.raises(UserError, match=r"prune.mlp_layers=.* within 0:3"):
    targets.prunable_modules(small.CONFIG, Prune(mlp_layers=text))


def test_ranking_puts_ties_in_order_and_leaves_masked_units_out():
  masks = {"K": np.ones((1, 1), bool), "F": np.array([[1, 0, 1, 1, 1]], bool)}
  scores = {"K": np.ones((1, 1)), "F": np.array([[2.0, 0.0, 1.0, 2.0, 0.5]])}
  order = choice.order(scores, masks)
  assert order["F"][0].tolist() == [4, 2, 0, 3]
  left = choice.remove(masks, order, {"K": [0], "F": [2]})
  assert left["F"].tolist() == [[True, False, False, True, False]]
  assert masks["F"].sum() == 4  # not changed in place


# ---- Arrays ------------------------------------------------------------------

SLOW = ("parallel", "delta", "experts beside an MLP")


@pytest.mark.parametrize(
  "option",
  [
    pytest.param(o, marks=pytest.mark.slow) if o in SLOW else o
    for o in small.OPTIONS
  ],
)
def test_masked_is_removed(option):
  config = small.option(option)
  params, mesh = small.random_params(config), small.one_device()
  kept = small.random_kept(config)
  whole = surgery.everything(config)
  kept["K"] = tuple(
    (whole if config.is_held(i) else kept)["K"][i]
    for i in range(config.num_layers)
  )
  tokens = small.tokens(config, 2, 9)
  stacked = surgery.expand(config, params, whole, config, mesh)
  masks = surgery.to_masks(kept, config)
  got = masked_logits(surgery.dense(config), stacked, masks, tokens)
  cut, params = surgery.gather(config, params, kept, mesh)
  want, _ = jax.jit(Decoder(cut).apply)({"params": params}, tokens)
  assert np.std(want) > 1e-2
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def masked_logits(config, stacked, masks, tokens):
  decoder = Decoder(config)
  outer = {"params": {n: p for n, p in stacked.items() if n != "layers"}}
  inputs = attention_inputs(config, tokens.shape[1])
  x_BTD = decoder.apply(outer, tokens, method="embed")
  for i in range(config.num_layers):
    weights = {n: p[i] for n, p in stacked["layers"].items()}
    args = weights, place(config, i), inputs, x_BTD
    mask = {u: m[i] for u, m in masks.items()}
    x_BTD, _ = run_layer(config, *args, mask)
  return decoder.apply(outer, x_BTD, method="head")


@pytest.mark.parametrize("option", ["plain", "biases", "norm of all heads"])
def test_compact_is_the_inverse_of_expand(option):
  full, mesh = small.option(option), small.one_device()
  kept = small.random_kept(full)
  kept["K"] = (kept["K"][0], np.zeros(0, int), kept["K"][2])  # no attention
  config = surgery.with_widths(
    full, surgery.widths(surgery.to_masks(kept, full))
  )
  params = small.random_params(config)
  stacked = surgery.expand(config, params, kept, full, mesh)
  assert stacked["layers"]["q"].shape == (3, 16, 4, 2, 4)
  assert stacked["layers"]["down"].shape == (3, 40, 16)
  gone = np.setdiff1d(np.arange(40), kept["F"][1])
  assert not np.any(stacked["layers"]["gate"][1][:, gone])
  got_config, got = surgery.compact(stacked, kept, full, mesh)
  assert got_config == config
  same(got, params)
  again = surgery.expand(got_config, got, kept, full, mesh)
  same(again, stacked)


def test_gather_takes_the_units_of_every_tensor():
  config = small.option("biases")
  params, mesh = small.random_params(config), small.one_device()
  keep = small.random_kept(config)
  keep["F"] = (np.zeros(0, int), *keep["F"][1:])
  cut, got = surgery.gather(config, params, keep, mesh)
  assert cut.ffn_widths[0] == 0
  layer, was = got["layer_1"], params["layer_1"]
  k, f = keep["K"][1], keep["F"][1]
  np.testing.assert_array_equal(layer["q"], was["q"][:, k])
  np.testing.assert_array_equal(layer["o"], was["o"][k])
  np.testing.assert_array_equal(layer["k_bias"], was["k_bias"][k])
  np.testing.assert_array_equal(layer["up"], was["up"][:, f])
  np.testing.assert_array_equal(layer["down"], was["down"][f])
  np.testing.assert_array_equal(layer["gate_bias"], was["gate_bias"][f])
  np.testing.assert_array_equal(layer["down_bias"], was["down_bias"])
  np.testing.assert_array_equal(got["embedding"], params["embedding"])
  # A half without units has nothing left but the bias that it still adds.
  assert "mlp_norm" not in got["layer_0"]
  assert "down_bias" in got["layer_0"]
  shapes = jax.tree.map(lambda x: x.shape, got)
  assert shapes == model_config.param_shapes(cut)


def test_moments_are_gathered_as_their_params_are():
  config, mesh = small.option("biases"), small.one_device()
  params = small.random_params(config)
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  state = init_optimizer(placed, Train(), mesh)
  # Moments with the values of params, so that they are the params gathered.
  state = jax.tree.map(
    lambda x: jnp.int32(7) if x.ndim == 0 else jnp.zeros_like(x), state
  )
  state = axes.map_named(
    lambda name, layer, x: (
      x
      if name is None
      else params[name]
      if layer is None
      else params[axes.layer_name(layer)][name]
    ),
    state,
  )
  keep = small.random_kept(config)
  cut, want = surgery.gather(config, params, keep, mesh)
  _, got = surgery.gather(config, state, keep, mesh)
  fresh = init_optimizer(want, Train(), mesh)
  assert jax.tree.structure(got) == jax.tree.structure(fresh)
  moments = [x for x in jax.tree.leaves(got) if x.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(want))
  for i, leaf in enumerate(jax.tree.leaves(want)):
    np.testing.assert_array_equal(moments[i], leaf)
    np.testing.assert_array_equal(moments[i + len(moments) // 2], leaf)
  assert {int(x) for x in jax.tree.leaves(got) if not x.ndim} == {7}


def test_relative_numbering():
  kept = {"K": (np.array([1, 3, 6]),), "F": (np.array([0, 5]),)}
  left = {"K": (np.array([1, 6]),), "F": (np.array([5]),)}
  got = surgery.relative_to(kept, left)
  assert got["K"][0].tolist() == [0, 2]
  assert got["F"][0].tolist() == [1]


@pytest.mark.parametrize("shards, rows", [(1, 4), (2, 4), (4, 4), (8, 8)])
def test_minibatches_are_in_order_and_padded(shards, rows):
  mesh = sharding.make_mesh(fsdp=shards, devices=jax.devices()[:shards])
  tokens = small.tokens(small.CONFIG, 10, 5)
  tokens_MBT, valid_MB = placement.minibatches(tokens, 4, mesh)
  assert tokens_MBT.shape == (3, rows, 5)
  assert np.asarray(valid_MB).sum(1).tolist() == [4, 4, 2]
  np.testing.assert_array_equal(tokens_MBT[valid_MB], tokens)


# In a process of its own: a gather with an output sharding does not raise, it
# aborts the process (XLA, jax 0.11.2).
JIT_PATH = """
import sys
import jax, numpy as np
from tests import small
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.pruning import surgery

config = small.option("biases")
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
params = small.random_params(config)
placed = jax.device_put(params, sharding.param_shardings(params, mesh))
kept = small.random_kept(config)  # K of 2, 1, 2 and F of 14, 24, 10
everything = surgery.everything(config)

def all_of_it():
  cut, gathered = surgery.gather(config, placed, kept, mesh)
  stacked = surgery.expand(cut, gathered, kept, config, mesh)
  whole = surgery.expand(config, placed, everything, config, mesh)
  _, compacted = surgery.compact(whole, kept, config, mesh)
  return gathered, stacked, compacted

want = all_of_it()
surgery._with_numpy = lambda mesh: False
got = all_of_it()
for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
  np.testing.assert_array_equal(one, other)
  assert one.sharding == other.sharding, (one.sharding, other.sharding)
cut = [x for x in jax.tree.leaves(got) if not x.sharding.is_fully_replicated]
assert len(cut) > 20
jax.tree.map(np.testing.assert_array_equal, got[0], got[2])
print("the same")
"""


def test_gather_under_jit_on_eight_devices(subprocess_env):
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(JIT_PATH)],
    env=subprocess_env(devices=8) | {"PYTHONPATH": "tests:."},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.strip() == "the same"
