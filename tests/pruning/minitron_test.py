"""Minitron against its definition, from the activations of each sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Minitron, Prune, check
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import attention_inputs, places, run_layer
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import methods, steps
from adapt_pruner_jax.pruning.baselines import minitron
from adapt_pruner_jax.pruning.task import PruneTask
from tests import small

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
SIZE = model_config.count_params(CONFIG)
TOKENS_NT = np.random.default_rng(1).integers(0, 31, (5, 8), np.int32)


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
  return small.random_params(CONFIG)


def task_of(params, depth=0, ratio=0.25):
  settings = Prune(method="minitron", minitron=Minitron(depth))
  target = int(SIZE * (1 - ratio))
  samples = lambda step: TOKENS_NT
  return PruneTask(CONFIG, params, settings, samples, target, batch=2)


def begun(task):
  """The masked model before its first step."""
  return steps._begin(task)


def forward(params, masks):
  """The mean next-token loss, and what each writing matrix reads, by hand."""
  inputs, fed = attention_inputs(CONFIG, TOKENS_NT.shape[1]), []
  outer = {n: params[n] for n in model_config.outer_names(CONFIG)}
  apply = lambda method, x: Decoder(CONFIG).apply(
    {"params": outer}, x, method=method
  )
  x_BTD = apply(Decoder.embed, TOKENS_NT)
  for i in range(CONFIG.num_layers):
    place = jax.tree.map(lambda a, i=i: a[i], places(CONFIG))
    mask = {u: jnp.asarray(m[i]) for u, m in masks.items()}
    weights = params[axes.layer_name(i)]
    x_BTD, tap = run_layer(CONFIG, weights, place, inputs, x_BTD, mask)
    fed.append({u: np.asarray(y) for u, y in tap.fed.items()})
  logits_BTV = apply(Decoder.head, x_BTD[:, :-1])
  found = jax.nn.log_softmax(logits_BTV)
  rows, columns = np.indices((5, 7))
  return -float(found[rows, columns, TOKENS_NT[:, 1:]].mean()), fed


def test_scores_are_norms_of_mean_magnitudes(params):
  masked = begun(task_of(params))
  found = minitron.unit_scores(masked, TOKENS_NT)
  _, fed = forward(params, masked.masks)
  for i, layer in enumerate(fed):
    mean_BKC = np.abs(layer["K"]).mean(1).reshape(5, 3, -1)
    want_K = np.sqrt((mean_BKC**2).sum((0, 2)))
    np.testing.assert_allclose(found["K"][i], want_K, rtol=1e-5)
    want_F = np.sqrt((np.abs(layer["F"]).mean(1) ** 2).sum(0))
    np.testing.assert_allclose(found["F"][i], want_F, rtol=1e-5)


def test_layers_go_by_the_loss_without_them(params):
  task = task_of(params, depth=1, ratio=0.4)
  masked = begun(task)
  losses_L = minitron.losses_without(masked, TOKENS_NT)
  for i in range(3):
    masks = {u: m.copy() for u, m in masked.masks.items()}
    for mask_LU in masks.values():
      mask_LU[i] = False
    assert losses_L[i] == pytest.approx(forward(params, masks)[0], rel=1e-5)
  pruned = methods.prune(task)
  gone = int(np.argmin(losses_L))
  here = [i for i in range(3) if i != gone]
  assert pruned.config.kv_groups[gone] == pruned.config.ffn_widths[gone] == 0
  # The others are alike, but for what the target takes exactly.
  widths = [pruned.config.ffn_widths[i] for i in here]
  assert max(widths) - min(widths) <= 1
  assert max(widths) < 24
  size = model_config.count_params(pruned.config)
  assert task.target - model_config.unit_cost(CONFIG)["F"] < size <= task.target


@pytest.mark.parametrize(
  "depth, ratio, message",
  [(3, 0.25, "all of the model's 3 layers"), (2, 0.25, "below the target")],
)
def test_bad_depths(params, depth, ratio, message):
  with pytest.raises(UserError, match=message):
    methods.prune(task_of(params, depth, ratio))


@pytest.mark.slow
def test_a_masked_model_on_many_devices(params):
  """Rows that only pad count for nothing."""
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  task = dataclasses.replace(task_of(params), mesh=mesh, batch=8)
  masked = begun(task)
  masked.masks["K"][0, 1] = masked.masks["F"][2, 5] = False
  _, fed = forward(params, masked.masks)
  found = minitron.unit_scores(masked, TOKENS_NT)
  for i, layer in enumerate(fed):
    want_F = np.sqrt((np.abs(layer["F"]).mean(1) ** 2).sum(0))
    np.testing.assert_allclose(found["F"][i], want_F, rtol=1e-4)
  losses_L = minitron.losses_without(masked, TOKENS_NT)
  for i in range(3):
    masks = {u: m.copy() for u, m in masked.masks.items()}
    masks["K"][i] = masks["F"][i] = False
    assert losses_L[i] == pytest.approx(forward(params, masks)[0], rel=1e-5)


@pytest.mark.slow
def test_a_second_prune_drops_no_more_layers(params):
  one = methods.prune(task_of(params, depth=1, ratio=0.4))
  again = dataclasses.replace(
    task_of(one.params, depth=1, ratio=0.5),
    config=one.config,
    full=CONFIG,
    kept=one.kept,
  )
  two = methods.prune(again)
  gone = [[w == 0 for w in p.config.ffn_widths] for p in (one, two)]
  assert gone[0] == gone[1]
  assert sum(gone[0]) == 1


@pytest.mark.slow
def test_stages_drop_what_their_targets_allow(params):
  """Two layers at once would be below the first stage's."""
  last = task_of(params, depth=2, ratio=0.65)
  last.settings.target_params = last.target
  cost = model_config.unit_cost(CONFIG)
  most = model_config.count_params(CONFIG) - cost["K"] * 3 - cost["F"] * 24
  one = methods.prune(dataclasses.replace(last, target=most - 40))  # and norms
  assert one.config.ffn_widths.count(0) == 1
  task = dataclasses.replace(
    last, config=one.config, params=one.params, full=CONFIG, kept=one.kept
  )
  two = methods.prune(task)
  assert two.config.ffn_widths.count(0) == 2
  assert model_config.count_params(two.config) <= last.target


def test_refusals(params):
  deep = task_of(params, depth=1)
  spared = dataclasses.replace(
    deep.settings, mlp_layers="0:0", attention_layers="0:1"
  )
  with pytest.raises(UserError, match="only 0 layers may be dropped"):
    methods.prune(dataclasses.replace(deep, settings=spared))
  with pytest.raises(UserError, match="cannot reach 10 "):
    methods.prune(dataclasses.replace(task_of(params), target=10))
  recipe = Config(prune=Prune(method="minitron", ratio=0.2))
  check(recipe)
  recipe.prune.minitron.depth = -1
  with pytest.raises(UserError, match=r"prune\.minitron\.depth=-1 must be"):
    check(recipe)
  recipe.prune.minitron.depth, recipe.prune.allotment = 0, "adapt"
  with pytest.raises(UserError, match="scores and allotment are one"):
    check(recipe)
