"""Layers trained in stacked runs, compared with the unrolled step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.training import loop, lora, stacking, step
from adapt_pruner_jax.training.stacking import Run
from tests import small
from tests.training.step_test import CONSTANT, assert_close, random_batch

# Absent halves, and one layer without both.
UNEVEN = dataclasses.replace(
  small.CONFIG,
  kv_groups=(4, 0, 3, 0),
  ffn_widths=(24, 40, 0, 0),
)
RUNS = (Run(0, 1, 4, 24), Run(1, 4, 3, 40))


def train(config, settings, mesh, teacher=None, seed=0):
  """Three steps; returns losses, what was trained, and Adam's state."""
  placed = lambda c, seed: jax.device_put(
    small.random_params(c, seed),
    sharding.param_shardings(
      model_config.abstract_params(c, jnp.float32), mesh
    ),
  )
  if teacher is not None:
    teacher = teacher, placed(teacher, 1)
  training = loop.start(
    (config, placed(config, seed)), settings, CONSTANT, mesh, teacher=teacher
  )
  losses = []
  batches = iter([random_batch(config, 8, 12, seed) for seed in range(3)])
  training, _ = loop.recover(
    training, batches, 0, 3, mesh, log=lambda _, m: losses.append(m["loss"])
  )
  return losses, training.trained, training.opt_state


def compare(monkeypatch, config, runs, settings=None, mesh=None, **kwargs):
  """Stacked training equals unrolled training, to the last parameter."""
  settings, mesh = (
    settings or Train(weight_decay=0.1),
    mesh or small.one_device(),
  )
  plain = train(config, settings, small.one_device(), **kwargs)
  monkeypatch.setattr(stacking, "cheapest", lambda *_: runs)
  scanned = dataclasses.replace(settings, scan_layers="on")
  losses, trained, state = train(config, scanned, mesh, **kwargs)
  np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
  assert_close((trained, state), plain[1:], atol=5e-5)
  return trained


@pytest.mark.slow
def test_uneven_layers_with_absent_halves(monkeypatch):
  compare(monkeypatch, UNEVEN, RUNS)


@pytest.mark.slow
def test_biases_of_experts_that_are_gone_learn_nothing(monkeypatch):
  """They have no unit, and are there in a run with layers that have them."""
  config = dataclasses.replace(
    small.option("experts"),
    ffn_widths=(24, 0, 16),
    expert_bias=True,
    swiglu_limit=0.2,
    swiglu_alpha=1.5,
  )
  compare(monkeypatch, config, (Run(0, 3, 4, 24),))


@pytest.mark.slow
@pytest.mark.parametrize(
  "names",
  [
    ("biases", "norm of each head", "scales"),
    ("norm of all heads",),
    ("sandwich",),
    ("wide",),
    ("shared",),
  ],
)
def test_options_of_families(monkeypatch, names):
  """Biases, norms over all heads, windows, rotary tables, sizes of heads, keys
  and values of other layers."""
  settings, config = Train(remat="full", weight_decay=0.1), small.CONFIG
  for name in names:
    config = dataclasses.replace(config, **small.OPTIONS[name])
  compare(monkeypatch, config, (Run(0, 3, 4, 40, 2),), settings)


@pytest.mark.slow
def test_eight_devices(monkeypatch):
  mesh = sharding.make_mesh(2, 2, 2)
  settings = Train(accumulation=2, remat="full")
  trained = compare(monkeypatch, UNEVEN, RUNS, settings, mesh)
  placed = sharding.param_shardings(trained, mesh)
  assert jax.tree.map(lambda x: x.sharding, trained) == placed


@pytest.mark.slow
def test_adapters(monkeypatch):
  compare(monkeypatch, UNEVEN, RUNS, Train(lora_rank=3))


@pytest.mark.slow
def test_teacher_has_runs_of_its_own(monkeypatch):
  compare(
    monkeypatch,
    small.CONFIG,
    (Run(0, 3, 4, 40),),
    Train(distill_alpha=0.3),
    teacher=dataclasses.replace(small.CONFIG, kv_groups=(4,) * 3),
  )


@pytest.mark.slow
def test_padding_stays_zero(monkeypatch):
  """In weights and moments, decayed too, whatever the batches are."""
  mesh, settings = small.one_device(), Train(scan_layers="on", weight_decay=0.1)
  monkeypatch.setattr(stacking, "cheapest", lambda *_: RUNS)
  config = dataclasses.replace(UNEVEN, qkv_bias=True, gate_up_bias=True)
  params = jax.device_put(small.random_params(config))
  step_fn, trained, state = loop.start(
    (config, params), settings, CONSTANT, mesh
  )
  trained, state = (stacking.stack(RUNS, x, mesh) for x in (trained, state))
  for seed in range(2):
    batch = loop.place(random_batch(config, 8, 12, seed), mesh)
    trained, state, _ = step_fn(trained, state, batch, 0)
  for tree in (trained, state):
    again = stacking.stack(
      RUNS, stacking.unstack(RUNS, config, tree, mesh), mesh
    )
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_there_and_back():
  mesh = sharding.make_mesh(2, 2, 2)
  where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  params = small.random_params(UNEVEN)
  params = jax.device_put(params, sharding.param_shardings(params, mesh))
  adapters = lora.init_lora(UNEVEN, 2, jax.random.key(0), mesh)
  for tree in (params, adapters):
    stacked = stacking.stack(RUNS, tree, mesh)
    expected = stacking.abstract(
      RUNS, jax.tree.map(lambda x: jax.typeof(x), tree), mesh
    )
    runs = {run.name for run in RUNS}
    assert where({n: stacked[n] for n in runs}) == where(
      {n: expected[n] for n in runs}
    )
    back = stacking.unstack(RUNS, UNEVEN, stacked, mesh)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert where(back) == where(tree)
  assert stacked["layers_1_4"]["q"]["b"].shape == (3, 2, 3, 2, 4)


def test_stacking_frees_what_it_was_made_of():
  mesh = small.one_device()
  params = jax.device_put(small.random_params(UNEVEN))
  stacked = stacking.stack(RUNS, params, mesh, donate=True)
  assert params["layer_0"]["q"].is_deleted()
  assert not params["embedding"].is_deleted()
  stacking.unstack(RUNS, UNEVEN, stacked, mesh, donate=True)
  assert stacked["layers_1_4"]["q"].is_deleted()


# ---- Which layers ------------------------------------------------------------


def brute_force(config, compile_cost, param_cost, tile):
  """The lowest cost over all ways to cut the layers."""
  layers, cost = config.num_layers, model_config.unit_cost(config)
  best = np.inf
  for cuts in range(2 ** (layers - 1)):
    ends = [i + 1 for i in range(layers - 1) if cuts >> i & 1] + [layers]
    total = 0
    for first, end in zip([0, *ends], ends, strict=False):
      width = -(-max(config.ffn_widths[first:end]) // tile) * tile
      params = cost["K"] * max(config.kv_groups[first:end]) + cost["F"] * width
      total += compile_cost + param_cost * params * (end - first)
    best = min(best, total)
  return best


@pytest.mark.parametrize("compile_cost", [0, 300, 1000, 3000, 1e6])
def test_runs_are_the_cheapest(compile_cost):
  runs = stacking.cheapest(UNEVEN, compile_cost, 1.0, tile=8)
  L, cost = UNEVEN.num_layers, model_config.unit_cost(UNEVEN)
  total = sum(
    compile_cost
    + (r.end - r.first) * (cost["K"] * r.kv_groups + cost["F"] * r.ffn_width)
    for r in runs
  )
  assert total == brute_force(UNEVEN, compile_cost, 1.0, 8)
  assert [r.first for r in runs] + [L] == [0] + [r.end for r in runs]
  assert len(runs) == 1 or compile_cost < 1e6


def test_absent_halves_are_not_mixed_in_where_norms_follow():
  config = dataclasses.replace(UNEVEN, norm_order="sandwich")
  runs = stacking.cheapest(config, 1e9, 1.0)
  cuts = [(r.first, r.end) for r in runs]
  assert cuts == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_what_auto_is():
  mesh = small.one_device()
  assert stacking.choose(UNEVEN, Train(), mesh) == ()
  assert stacking.choose(UNEVEN, Train(scan_layers="off"), mesh) == ()
  assert len(stacking.choose(UNEVEN, Train(scan_layers="on"), mesh)) == 1
  many = stacking.choose(UNEVEN, Train(scan_layers="on"), mesh, tokens=10**15)
  assert len(many) > 1
  sliced = dataclasses.replace(UNEVEN, residual=((16, 16, 16),) * 4)
  assert stacking.choose(sliced, Train(scan_layers="on"), mesh) == ()


# ---- The program -------------------------------------------------------------

ROWS, TOKENS, VOCABULARY = 5, 157, 331  # primes that occur nowhere else


def lowered(config, runs, mesh):
  """A train step that is traced and lowered, but not compiled."""
  settings = Train(remat="full", attention="blocks")
  trained, state = step.abstract_state(config, settings, mesh, 0, runs)
  batch = step.abstract_batch(ROWS * mesh.size, TOKENS, mesh)
  made = step.make_step(config, settings, CONSTANT, mesh, runs=runs)
  return made.lower(trained, state, batch)


def two_runs(layers):
  half = layers // 2
  config = dataclasses.replace(
    small.CONFIG,
    vocab_size=VOCABULARY,
    kv_groups=(4, 3) * half,
    ffn_widths=(24, 23) * (half // 2) + (40, 39) * (half - half // 2),
  )
  return config, (Run(0, half, 4, 24), Run(half, layers, 4, 40))


def test_program_does_not_grow_with_the_layers():
  mesh = sharding.make_mesh(1, 8, 1)
  few, many = (lowered(*two_runs(n), mesh).as_text() for n in (4, 24))
  count = lambda text: len(re.findall(r"stablehlo\.(?!constant)\w+", text))
  assert count(few) == count(many)
  assert many.count("stablehlo.while") == few.count("stablehlo.while") > 0
  assert f"x{TOKENS}x" in many
  assert f"{TOKENS}x{TOKENS}" not in many  # scores of a whole row
  unrolled = lowered(two_runs(4)[0], (), mesh).as_text()
  assert count(unrolled) > 1.5 * count(few)


@pytest.mark.slow
def test_compiled_program_does_not_grow_with_the_layers():
  mesh = sharding.make_mesh(1, 8, 1)
  few, many = (lowered(*two_runs(n), mesh).compile().as_text() for n in (4, 8))
  computations = lambda text: len(re.findall(r"^[%\w].*\{$", text, re.M))
  assert computations(few) == computations(many) > 10
  assert f"{TOKENS},{TOKENS}" not in many


@pytest.mark.slow
def test_compiled_ahead_is_the_same_step():
  """In a thread, before there are any arrays; another model's is not taken."""
  mesh, settings = small.one_device(), Train(scan_layers="on", lora_rank=2)
  settings.lora_base = "int8"
  params = lambda: jax.device_put(small.random_params(small.CONFIG))
  ahead = loop.compile_ahead(small.CONFIG, settings, mesh, (8, 12))
  start = lambda ahead: loop.start(
    (small.CONFIG, params()), settings, CONSTANT, mesh, ahead=ahead
  )
  batches = [random_batch(small.CONFIG, 8, 12, seed) for seed in range(2)]
  train = lambda ahead: loop.recover(start(ahead), iter(batches), 0, 2, mesh)[0]
  one, other = train(ahead), train(None)
  assert one.step_fn.program is ahead.program.result()
  assert other.step_fn.program is not one.step_fn.program
  assert_close(one[1:], other[1:], rtol=0)
  wide = ahead._replace(config=UNEVEN)
  assert start(wide).step_fn.program is not one.step_fn.program
