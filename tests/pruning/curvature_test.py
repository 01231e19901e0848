"""The curvature score against brute force, and the ranking by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import (
  Calibration,
  Config,
  Prune,
  Ranking,
  check,
  get,
)
from adapt_pruner_jax.data import calibration
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import attention_inputs, place, read
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import (
  allotment,
  curvature,
  methods,
  refit,
  surgery,
)
from adapt_pruner_jax.pruning.task import PruneTask

CONFIG = ModelConfig(
  family="llama",
  vocab_size=31,
  hidden_size=16,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(3, 3),
  ffn_widths=(24, 24),
  norm_eps=1e-5,
  rope=Rope(),
  context=16,
  tied=True,
  residual_scale=0.7,
)


def random_params(config, seed=0):
  """Weights of a size at which half layers matter."""
  rng = np.random.default_rng(seed)

  def draw(name, _, leaf):
    if "norm" in name:
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    return jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32)

  return axes.map_named(draw, model_config.abstract_params(config, jnp.float32))


def samples(step):
  rng = np.random.default_rng(step)
  return rng.integers(0, CONFIG.vocab_size, (16, 8), np.int32)


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG)


# ---- Scores ------------------------------------------------------------------


def cheapest_deletion(gram, hessian, weight, removed):
  """Least tr(H X^T G X) over changes X of the weight that delete rows.

  The quadratic form of all entries of X is written out and minimised over the
  rows that stay.
  """
  C, D = weight.shape
  form = np.kron(gram, hessian)  # of X.ravel()
  fixed = np.isin(np.repeat(np.arange(C), D), removed)
  change = np.where(fixed, -weight.ravel(), 0)
  free = ~fixed
  right = -form[np.ix_(free, fixed)] @ change[fixed]
  change[free] = np.linalg.lstsq(form[np.ix_(free, free)], right, rcond=None)[0]
  return change @ form @ change


@pytest.mark.parametrize("units", [6, 3])
def test_score_is_the_loss_after_the_best_refit(units):
  rng = np.random.default_rng(units)
  C, D = 6, 4
  x, g = rng.normal(size=(50, C)), rng.normal(size=(50, D))
  x[:, 0] += x[:, 1:3].sum(1)  # so that the rest can stand in for some
  gram, hessian = x.T @ x / 50, g.T @ g
  weight = rng.normal(size=(C, D))
  ridge = 1e-2
  ridged = gram + ridge * np.median(np.diag(gram)) * np.eye(C)
  rows = np.arange(C).reshape(units, -1)
  expected = [cheapest_deletion(ridged, hessian, weight, r) for r in rows]
  arrays = [jnp.asarray(a, jnp.float32) for a in (gram, hessian, weight)]
  found = curvature.unit_scores(*arrays, ridge, units)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def scores_by_hand(params, masks, tokens):
  """Scores from inputs and gradients of a plain unrolled model, float64."""
  c, L = CONFIG, CONFIG.num_layers
  B, T = tokens.shape
  decoder, plain = Decoder(c), attention_inputs(c, T)
  fed = lambda u, w, x: read(u, c, w, place(c, 0), plain, x)[0]

  def run(nudges):
    inputs = []
    x = decoder.apply({"params": params}, tokens, method=Decoder.embed)
    for i in range(L):
      w = params[f"layer_{i}"]
      y = fed("K", w, x) * masks["K"][i][:, None, None]
      inputs.append(y.reshape(B * T, -1))
      x = x + 0.7 * (jnp.einsum("btkgh,kghd->btd", y, w["o"]) + nudges[2 * i])
      y = fed("F", w, x) * masks["F"][i]
      inputs.append(y.reshape(B * T, -1))
      x = x + 0.7 * (y @ w["down"] + nudges[2 * i + 1])
    logits = decoder.apply({"params": params}, x, method=Decoder.head)
    logp = jax.nn.log_softmax(logits)[:, :-1]
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)
    return -picked.mean(1).sum(), inputs

  nudges = [jnp.zeros((B, T, c.hidden_size))] * (2 * L)
  grads, inputs = jax.jit(jax.grad(run, has_aux=True))(nudges)
  scores = {"K": np.zeros((L, 3)), "F": np.zeros((L, 24))}
  halves = {"K": np.zeros(L), "F": np.zeros(L)}
  for j in range(2 * L):
    unit, name = ("K", "o") if j % 2 == 0 else ("F", "down")
    x, g = np.asarray(inputs[j], np.float64), np.asarray(grads[j], np.float64)
    g = g.reshape(B * T, -1)
    layer = params[f"layer_{j // 2}"]
    W = np.asarray(layer[name], np.float64).reshape(-1, c.hidden_size)
    mask = masks[unit][j // 2]
    live = np.repeat(mask, len(W) // len(mask))
    x, W = x[:, live], W[live]
    gram = x.T @ x / len(x)
    strength = 1e-3 if len(x) >= 4 * len(W) else 0.1
    ridge = strength * np.median(np.diag(gram))
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    saliency = W @ g.T @ g @ W.T
    halves[unit][j // 2] = np.trace(gram @ saliency)
    size = len(W) // mask.sum()
    for n, u in enumerate(np.flatnonzero(mask)):
      at = slice(n * size, (n + 1) * size)
      block_score = np.linalg.solve(inverse[at, at], saliency[at, at])
      scores[unit][j // 2, u] = np.trace(block_score)
  return scores, halves


@pytest.mark.parametrize("devices", [1, 8])
def test_scores_of_a_masked_model(params, devices):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  masks = {"K": np.ones((2, 3), bool), "F": np.ones((2, 24), bool)}
  masks["K"][1, 0] = False
  masks["F"][0, :10] = False
  tokens = samples(0)[:14]  # not a multiple of the minibatch
  expected, halves = scores_by_hand(params, masks, jnp.asarray(tokens))
  found = curvature.measure_step(
    surgery.dense(CONFIG),
    surgery.expand(CONFIG, params, surgery.everything(CONFIG), CONFIG, mesh),
    placement.replicate(masks, mesh),
    *placement.minibatches(tokens, 8, mesh),
    mesh=mesh,
    halves=True,
  )
  for u in "KF":
    at = masks[u]
    scores_LU, half_L = map(np.asarray, found["scores"][u])
    np.testing.assert_allclose(scores_LU[at], expected[u][at], rtol=2e-3)
    np.testing.assert_allclose(half_L, halves[u], rtol=2e-3)
  assert found["loss_M"].shape == (2,)


# ---- The ranking -------------------------------------------------------------

# One KV group costs (2 G + 2) H D = 384 parameters, one channel 3 D = 48.
GROUP, CHANNEL = 384, 48


def whole():
  return {"K": np.ones((2, 3), bool), "F": np.ones((2, 24), bool)}


def even_scores(value=10.0):
  """Every unit costs `value` per parameter."""
  return {
    "K": np.full((2, 3), value * GROUP),
    "F": np.full((2, 24), value * CHANNEL),
  }


def choose(scores, remove, target=0, masks=None, prunable=None, **kw):
  masks = masks or whole()
  prunable = prunable or {u: np.ones(2, bool) for u in "KF"}
  size = surgery.count(CONFIG, masks)
  counts = allotment.choose(
    CONFIG, scores, masks, prunable, size - remove, target, **kw
  )
  return {u: n.tolist() for u, n in counts.items()}


def test_cheapest_per_parameter_go_first():
  assert model_config.unit_cost(CONFIG) == {"K": GROUP, "F": CHANNEL}
  scores = even_scores()
  scores["K"][1, 2] = 1 * GROUP  # cheaper for its size than any channel
  scores["F"][0, [3, 7]] = 2 * CHANNEL
  assert choose(scores, GROUP) == {"K": [0, 1], "F": [0, 0]}
  assert choose(scores, GROUP + 90) == {"K": [0, 1], "F": [2, 0]}


def test_no_module_loses_more_than_the_cap_or_its_last_unit():
  scores = even_scores()
  scores["F"][0] = np.arange(24)
  found = choose(scores, 10 * CHANNEL, cap=0.1)
  assert found == {"K": [1, 0], "F": [2, 0]}
  scores = even_scores()
  scores["K"][:] = scores["F"][0] = 0
  found = choose(scores, 10**6)
  assert found == {"K": [2, 2], "F": [23, 23]}


def test_a_group_too_large_for_the_target_is_passed_over():
  scores = even_scores()
  scores["K"][0, 0] = 0
  target = surgery.count(CONFIG, whole()) - 100
  found = choose(scores, 10**6, target)
  assert found["K"] == [0, 0]
  assert sum(found["F"]) == 3  # 144 parameters, the least above 100
  only = {"K": np.ones(2, bool), "F": np.zeros(2, bool)}
  assert choose(scores, 10**6, target, prunable=only)["K"] == [1, 0]


def test_widths_become_multiples():
  scores = even_scores()
  scores["F"][0] = 0
  masks = whole()
  masks["F"][0, :3] = False  # 21 left
  eights = Prune(round_ffn_to=8)
  found = choose(scores, 6 * CHANNEL, masks=masks, settings=eights)
  assert found["F"] == [5 + 8, 0]


# ---- Whole stages ------------------------------------------------------------


def prune(config, params, settings, samples, target=None, batch=8, **given):
  settings = dataclasses.replace(settings, method="curvature")
  return methods.prune(
    PruneTask(config, params, settings, samples, target, batch=batch, **given)
  )


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_ends_within_a_channel_of_the_target(params, ratio):
  size = model_config.count_params(CONFIG)
  target = int(size * (1 - ratio))
  settings = Prune(refit="2")
  pruned = prune(CONFIG, params, settings, samples, target)
  assert target - CHANNEL < model_config.count_params(pruned.config) <= target
  sizes = [size] + [r["params"] for r in pruned.trace]
  assert np.all(np.diff(sizes) < 0)
  refits = [r["step"] for r in pruned.trace if "refit" in r]
  assert refits == [r["step"] for r in pruned.trace[:-1] if r["step"] % 2 == 0]
  shapes = model_config.param_shapes(pruned.config)
  assert jax.tree.map(jnp.shape, pruned.params) == shapes


def test_goes_on_from_a_step_and_on_other_devices(params):
  settings = Prune()
  target = int(model_config.count_params(CONFIG) * 0.75)
  log = []
  call = lambda **kw: prune(CONFIG, params, settings, samples, target, **kw)
  first = call(log=lambda record, step: log.append(step))
  again = call(after=log[1])
  assert again.trace == first.trace[2:]
  wide = call(mesh=sharding.make_mesh(data=2, fsdp=4))
  for other in (again, wide):
    assert other.config == first.config
    for u in "KF":
      for a, b in zip(first.kept[u], other.kept[u], strict=True):
        np.testing.assert_array_equal(a, b)
  # Without a refit the weights are slices of the old ones.
  _, slices = surgery.gather(
    CONFIG, params, first.kept, sharding.make_mesh(devices=jax.devices()[:1])
  )
  jax.tree.map(np.testing.assert_array_equal, first.params, slices)


def test_a_second_stage_numbers_units_as_the_original(params):
  size = model_config.count_params(CONFIG)
  settings = Prune(refit="2")
  call = lambda c, p, **kw: prune(c, p, settings, samples, **kw)
  one = call(CONFIG, params, target=int(size * 0.9))
  two = call(
    one.config, one.params, target=int(size * 0.8), full=CONFIG, kept=one.kept
  )
  for u in "KF":
    for before, after in zip(one.kept[u], two.kept[u], strict=True):
      assert set(after) <= set(before)
  assert model_config.param_shapes(two.config) == jax.tree.map(
    jnp.shape, two.params
  )


def test_refusals(params):
  settings = Prune(mlp_layers="0:0", ranking=Ranking(step_size=0.2))
  with pytest.raises(UserError, match="nothing more can be removed"):
    prune(CONFIG, params, settings, samples, 10)
  gemma = dataclasses.replace(CONFIG, family="gemma2", norm_order="sandwich")
  with pytest.raises(UserError, match="gemma2"):
    prune(gemma, params, settings, samples, 10)


@pytest.mark.parametrize(
  "field, value, match",
  [
    ("prune.refit", "0", "number of pruning steps"),
    ("prune.refit", "fianl", "is not none, final"),
    ("prune.refit_ridge", -1.0, "at least 0"),
    ("prune.ranking.cap", 0.0, r"in \(0, 1\]"),
    ("calibration.refit_samples", 1, "at least 2"),
    ("prune.ratio", 0.0, "no target"),
  ],
)
def test_settings(field, value, match):
  recipe = Config(prune=Prune(method="curvature", ratio=0.2, refit="2"))
  check(recipe)
  section, _, name = field.rpartition(".")
  setattr(get(recipe, section), name, value)
  with pytest.raises(UserError, match=match):
    check(recipe)


def test_steps_alone_are_for_methods_with_a_step_size():
  """Said before any work."""
  for settings in Prune(), Prune(method="flap", allotment="ranking"):
    check(Config(prune=dataclasses.replace(settings, max_steps=2)))
  for settings in Prune(method="flap"), Prune(allotment="uniform"):
    with pytest.raises(UserError, match="needs a target"):
      check(Config(prune=dataclasses.replace(settings, max_steps=2)))


@pytest.mark.slow
def test_better_than_the_paper_on_a_real_model(shared_data):
  path = str(shared_data / "models" / "stories260K")
  config, params = load.load(path)
  tokenizer = load_tokenizer(path)
  text = shared_data / "text"
  source = Calibration(
    source=f"text:{text / 'tinystories_train.txt'}", samples=64
  )
  windows = calibration.calibration_data(
    source, tokenizer, config.vocab_size, 0
  )
  many = dataclasses.replace(source, samples=512)
  many = calibration.calibration_data(
    many, tokenizer, config.vocab_size, 1
  ).batch(0)
  heldout = np.array(
    tokenizer.encode((text / "tinystories_heldout.txt").read_text())
  )
  target = int(model_config.count_params(config) * 0.6)

  def loss(config, params):
    _, total, count = perplexity.perplexity(config, params, heldout, 256, 8)
    return total / count

  def run(settings):
    found = methods.prune(
      PruneTask(config, params, settings, windows.batch, target)
    )
    new, _ = refit.refit(
      (config, params), (found.config, found.params), found.kept, many, 64
    )
    return loss(found.config, found.params), loss(found.config, new)

  # The loss of the dense model is 1.4; the reference study, on other text:
  # 4.3 raw, 3.4 refitted, and 3.0.
  raw, refitted = run(Prune(gqa_fold="reference"))
  _, recipe = run(Prune(method="curvature", refit="2"))
  print(raw, refitted, recipe)
  assert refitted < raw - 0.5
  assert recipe < refitted - 0.15
