"""LLM Surgeon against dense Fisher matrices, and Torch's gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Config, Prune, Surgeon, check
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.pruning import linear_algebra, methods, steps, surgery
from adapt_pruner_jax.pruning.baselines import kronecker, surgeon
from adapt_pruner_jax.pruning.task import PruneTask
from tests import small

DAMPING = 0.01
change = jax.jit(kronecker.change)
READERS = {"K": ("q", "k", "v"), "F": ("gate", "up")}


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def task_of(config, params, tokens_NT, ratio=0.2, **given):
  settings = Prune(method="surgeon", surgeon=Surgeon(**given))
  target = int(model_config.count_params(config) * (1 - ratio))
  return PruneTask(
    config, params, settings, lambda step: tokens_NT, target, batch=4
  )


# ---- One matrix --------------------------------------------------------------


def damped(own_CC):
  diagonal_C = np.diag(own_CC)
  return own_CC + DAMPING * diagonal_C.mean() * np.eye(len(own_CC))


def least(matrix, rows):
  """The least 1/2 d^T (own (x) far) d with d = -w in some rows: (it, d).

  Of the whole Kronecker product, by its blocks.
  """
  weight_CE, own_CC, far_EE = matrix
  fisher = np.kron(damped(own_CC), far_EE)
  fixed = np.zeros(weight_CE.shape, bool)
  fixed[rows] = True
  fixed = fixed.ravel()
  d = np.where(fixed, -weight_CE.ravel(), 0.0)
  d[~fixed] = -np.linalg.solve(fisher[~fixed][:, ~fixed], fisher[~fixed] @ d)
  return d @ fisher @ d / 2, d.reshape(weight_CE.shape)


def some_matrix(rng, C, E):
  gram = lambda n: np.cov(
    rng.normal(size=(n, 3 * n)) * rng.uniform(0.2, 2, n)[:, None]
  )
  return rng.normal(size=(C, E)), gram(C), gram(E)


def on_device(matrix):
  return kronecker.Matrix(*map(jnp.float32, matrix), DAMPING)


@pytest.mark.parametrize(
  "rounds", [pytest.param(64, marks=pytest.mark.slow), 2]
)
def test_rises_and_changes_are_those_of_the_dense_fisher(rounds, monkeypatch):
  """Units of two rows in one matrix and one row in another; one is absent."""
  monkeypatch.setattr(kronecker, "ROUNDS", rounds)
  rng = np.random.default_rng(0)
  U = 5
  both = {"a": some_matrix(rng, 2 * U, 4), "b": some_matrix(rng, U, 3)}
  rows = lambda units, J: np.ravel(np.array(units)[:, None] * J + np.arange(J))
  absent = 3
  for (weight_CE, own_CC, _), J in zip(both.values(), (2, 1), strict=True):
    for r in rows([absent], J):
      weight_CE[r] = own_CC[r] = own_CC[:, r] = 0
  mean = lambda own: np.diag(own).sum() / (np.diag(own) > 0).sum()
  for name, (w, own, far) in both.items():  # `damped` takes all rows
    own[np.diag(own) == 0] = 0
    r = np.flatnonzero(np.diag(own) == 0)
    own[r, r] = mean(own)
    both[name] = w, own, far
  wanted = lambda units: sum(
    least(m, rows(units, J))[0]
    for m, J in zip(both.values(), (2, 1), strict=True)
  )
  given = {}
  for name, (w, own, far) in both.items():
    own = own.copy()
    dead = ~w.any(1)
    own[dead] = own[:, dead] = 0
    given[name] = on_device((w, own, far))
  mask_U = jnp.arange(U) != absent
  # A function of its own, since ROUNDS is read when it compiles.
  found = jax.jit(lambda *args: kronecker.rank(*args))(given, mask_U)
  place_U = np.where(mask_U, found.place_U, U)
  order = np.argsort(place_U)[:4]
  here = [0, 1, 2, 4]
  for n in range(1, 5):
    total = float(np.asarray(found.rise_U)[order[:n]].sum())
    assert total == pytest.approx(wanted(order[:n]), rel=1e-4)
  if rounds == 64:  # one at a time: each is the cheapest of those that are left
    for n in range(4):
      left = [u for u in here if u not in order[:n]]
      costs = [wanted([*order[:n], u]) for u in left]
      assert left[int(np.argmin(costs))] == order[n]
  keep_U = jnp.array([False, True, True, False, True])
  for (name, matrix), J in zip(given.items(), (2, 1), strict=True):
    change_CE = change(matrix, keep_U)
    _, want_CE = least(both[name], rows([0], J))
    want_CE[rows([0, absent], J)] = 0
    np.testing.assert_allclose(change_CE, want_CE, rtol=1e-4, atol=1e-5)


def test_columns_have_no_part_in_a_change():
  rng = np.random.default_rng(1)
  weight_CE, own_CC, _ = some_matrix(rng, 6, 3)
  keep_U = jnp.array([True, False, True, True, False, True])
  one, two = (
    change(on_device((weight_CE, own_CC, far)), keep_U)
    for far in (np.eye(3), some_matrix(rng, 3, 3)[1])
  )
  np.testing.assert_array_equal(one, two)


# ---- A model, by Torch -------------------------------------------------------


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
  """A Llama with biases everywhere, and its pair."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=32,
    attention_bias=True,
    mlp_bias=True,
  )
  model = transformers.LlamaForCausalLM(config).float()
  for name, weight in model.named_parameters():
    if "bias" in name:
      torch.nn.init.normal_(weight, std=0.3)
  path = tmp_path_factory.mktemp("llama")
  model.save_pretrained(path)
  return model, load.load(str(path), "float32", small.one_device())


TOKENS_NT = np.random.default_rng(1).integers(0, 31, (6, 9), np.int32)


def torch_factors(model, tokens_NT):
  """A and G of each linear layer: means over tokens; loss summed over them."""
  import torch

  seen, handles = {}, []
  for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and "layers" in name:

      def forward(_, given, out, name=name):
        out.retain_grad()
        seen[name] = given[0].detach(), out

      handles.append(module.register_forward_hook(forward))
  ids = torch.tensor(tokens_NT, dtype=torch.long)
  logits = model(ids).logits[:, :-1]
  torch.nn.functional.cross_entropy(
    logits.reshape(-1, logits.shape[-1]), ids[:, 1:].ravel(), reduction="sum"
  ).backward()
  for handle in handles:
    handle.remove()
  found = {}
  for name, (a, out) in seen.items():
    a = a.reshape(-1, a.shape[-1]).double().numpy()
    g = out.grad.reshape(-1, out.shape[-1]).double().numpy()
    found[name] = a, g
  return found


def torch_matrices(model, tokens_NT, layer, unit):
  """(weight, own, far) of the matrices of a half: readers, then the writer."""
  factors = torch_factors(model, tokens_NT)
  half = {"K": "self_attn", "F": "mlp"}[unit]
  names = [*READERS[unit], {"K": "o", "F": "down"}[unit]]
  gram = lambda x: x.T @ x / len(x)
  found = []
  for name in names:
    full = f"model.layers.{layer}.{half}.{name}_proj"
    a, g = factors[full]
    module = model.get_submodule(full)
    weight = module.weight.detach().double().numpy()
    if name in READERS[unit]:
      bias = module.bias.detach().double().numpy()[:, None]
      a = np.concatenate([a, np.ones_like(a[:, :1])], axis=1)
      found.append((np.concatenate([weight, bias], axis=1), gram(g), gram(a)))
    else:
      found.append((weight.T, gram(a), gram(g)))
  return found


def joint(matrices, units, U):
  """1/2 trace(B_RR^-1 W_R far W_R^T) of units, over matrices."""
  total = 0.0
  for weight, own, far in matrices:
    J = len(weight) // U
    rows = np.ravel(np.array(units)[:, None] * J + np.arange(J))
    block = np.linalg.inv(damped(own))[np.ix_(rows, rows)]
    energy = weight[rows] @ far @ weight[rows].T
    total += np.trace(np.linalg.solve(block, energy)) / 2
  return total


@pytest.mark.slow
@pytest.mark.parametrize("matrices", ["all", "writers"])
def test_scores_are_those_of_torchs_factors(torch_model, matrices):
  model, (config, params) = torch_model
  task = task_of(config, params, TOKENS_NT, matrices=matrices)
  masked = steps._begin(task)
  measured = surgeon.measure(masked, TOKENS_NT)
  for layer in range(2):
    for unit, U in (("K", 2), ("F", 12)):
      given = torch_matrices(model, TOKENS_NT, layer, unit)
      given = given[-1:] if matrices == "writers" else given
      gone, highest = [], 0.0
      for _ in range(U):
        left = [u for u in range(U) if u not in gone]
        costs = [joint(given, [*gone, u], U) for u in left]
        before = joint(given, gone, U) if gone else 0.0
        unit_found = left[int(np.argmin(costs))]
        gone.append(unit_found)
        highest = max(highest, min(costs) - before)
        score = measured.scores[unit][layer, unit_found]
        assert score == pytest.approx(highest, rel=2e-3)


@pytest.mark.slow
def test_weights_behind_a_shot_are_those_of_torchs_factors(torch_model):
  model, (config, params) = torch_model
  task = task_of(config, params, TOKENS_NT, ratio=0.25, shots=1, matrices="all")
  pruned = methods.prune(task)
  assert pruned.trace[-1]["step"] == 1
  assert sum(pruned.config.ffn_widths) < 24
  for layer in range(2):
    found = pruned.params[axes.layer_name(layer)]
    for unit, U in (("K", 2), ("F", 12)):
      kept = pruned.kept[unit][layer]
      given = torch_matrices(model, TOKENS_NT, layer, unit)
      names = [*READERS[unit], {"K": "o", "F": "down"}[unit]]
      for name, (weight, own, _) in zip(names, given, strict=True):
        J = len(weight) // U
        gone = np.setdiff1d(np.arange(U), kept)
        rows = lambda units, J=J: np.ravel(units[:, None] * J + np.arange(J))
        inverse = np.linalg.inv(damped(own))
        R = rows(gone)
        solved = np.linalg.solve(inverse[np.ix_(R, R)], weight[R])
        want = (weight - inverse[:, R] @ solved)[rows(kept)]
        matrix = np.asarray(linear_algebra.as_matrix(name, found[name]))
        if name in READERS[unit]:
          bias = np.asarray(found[f"{name}_bias"]).reshape(-1, 1)
          matrix = np.concatenate([matrix.T, bias], axis=1)
        np.testing.assert_allclose(matrix, want, rtol=2e-3, atol=2e-4)


# ---- The prune ---------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven():
  return small.CONFIG, small.random_params(small.CONFIG)


@pytest.mark.slow
def test_what_is_masked_is_what_is_gathered(uneven):
  """The model behind a shot, in dense coordinates and cut; the next scores."""
  tokens_NT = small.tokens(small.CONFIG, 8, 12)
  seen = []
  task = dataclasses.replace(
    task_of(*uneven, tokens_NT, shots=2),
    log=lambda record, step: seen.append(step),
  )
  whole = methods.prune(task)
  first = dataclasses.replace(task, after=seen[0], log=None)
  masked = steps._begin(first, surgeon.update)
  left = surgery.to_kept(masked.masks)
  config, params = surgery.compact(masked.stacked, left, task.full, task.mesh)
  logits, _ = Decoder(config).apply({"params": params}, tokens_NT[:, :-1])
  found = jax.nn.log_softmax(logits)
  loss = -np.take_along_axis(found, tokens_NT[:, 1:, None], axis=-1).mean()
  one = surgeon.measure(masked, tokens_NT)
  assert one.losses_M.mean() == pytest.approx(float(loss), rel=1e-5)
  cut = dataclasses.replace(task, config=config, params=params, kept=left)
  two = surgeon.measure(steps._begin(cut), tokens_NT)
  for u, mask_LU in masked.masks.items():
    np.testing.assert_allclose(
      one.scores[u][mask_LU], two.scores[u][mask_LU], rtol=1e-3
    )
  # And the first shot ends half way, the second at the target.
  sizes = [record["params"] for record in whole.trace]
  size, channel = (
    model_config.count_params(small.CONFIG),
    model_config.unit_cost(small.CONFIG)["F"],
  )
  for params, goal in zip(
    sizes, (size - (size - task.target) // 2, task.target), strict=True
  ):
    assert goal - channel < params <= goal


@pytest.mark.slow
def test_many_devices_find_the_same(uneven):
  """Rows that only pad count for nothing."""
  config, params = uneven
  tokens_NT = small.tokens(config, 6, 12)
  mesh = sharding.make_mesh(data=4, fsdp=2, devices=jax.devices()[:8])
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  one = methods.prune(task_of(config, params, tokens_NT, shots=2))
  task = task_of(config, placed, tokens_NT, shots=2)
  many = methods.prune(dataclasses.replace(task, mesh=mesh, batch=8))
  jax.tree.map(np.testing.assert_array_equal, one.kept, many.kept)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4),
    *(one.params, many.params),
  )


def test_what_does_not_go_with_it():
  recipe = Config(prune=Prune(method="surgeon", ratio=0.2))
  check(recipe)
  for name, value in (("shots", 0), ("damp_a", 0.0), ("matrices", "some")):
    other = dataclasses.replace(recipe.prune, surgeon=Surgeon(**{name: value}))
    with pytest.raises(UserError, match=rf"prune\.surgeon\.{name}="):
      check(dataclasses.replace(recipe, prune=other))
  often = dataclasses.replace(recipe.prune, refit="2")
  with pytest.raises(UserError, match="behind each shot itself"):
    methods.check(small.CONFIG, often)
  with pytest.raises(UserError, match="cannot be pruned by curvature"):
    methods.check(small.option("sandwich"), recipe.prune)
