"""The baselines against recordings of each method's published code.

`golden/baselines` holds what that code did to two small random LLaMAs, one
with as many KV heads as query heads (mha) and one with fewer (gqa).
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Flap, LlmPruner, Prune, SliceGpt, Uniform
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import layer, model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import (
  allotment,
  exact_target,
  methods,
  steps,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.baselines import (
  activations,
  flap,
  llm_pruner,
  shortgpt,
  slicegpt,
  wanda_sp,
)
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Masked,
  Measured,
  PruneTask,
  Step,
)

ROOT = pathlib.Path(__file__).parent.parent / "golden" / "baselines"
LOGITS = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
  """These tests compile for much longer than they compute."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def dense(name):
  """The pair in folder `name`; float16 files, float32 params."""
  return load.load(str(ROOT / name), dtype="float32")


def array(*path):
  return np.load(ROOT.joinpath(*path).with_suffix(".npy"))


def trace(*path):
  return json.loads(ROOT.joinpath(*path, "trace.json").read_text())


def logits(config, params, tokens_BT):
  decoder = Decoder(config)
  return np.asarray(jax.jit(decoder.apply)({"params": params}, tokens_BT)[0])


def check_logits(pruned, name, case=""):
  found = logits(pruned.config, pruned.params, array(name, "eval_ids"))
  np.testing.assert_allclose(found, array(name, case, "logits"), **LOGITS)


def task_of(
  name, method, *, target=None, batch=4, mesh=None, settings=None, **given
):
  """A method's task on a golden model, with all of its calibration tokens."""
  config, params = dense(name)
  if mesh is not None:
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
  settings = dataclasses.replace(settings or Prune(), method=method)
  draw = lambda step: array(name, "calib")
  return PruneTask(
    config, params, settings, draw, target, batch=batch, mesh=mesh, **given
  )


def run(method, name, **given):
  return methods.prune(task_of(name, method, **given))


def run_at(task, counts_of, number=1):
  """A prune in which `counts_of(masked, measured)` units go, not a target."""
  settings = dataclasses.replace(task.settings, max_steps=number)
  method = dataclasses.replace(
    methods.method_of(settings),
    allot=lambda *found: Allotted(counts_of(*found)),
  )
  return steps.prune(method, dataclasses.replace(task, settings=settings))


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_dense_logits(name):
  found = logits(*dense(name), array(name, "eval_ids"))
  np.testing.assert_allclose(found, array(name, "logits"), rtol=1e-4, atol=1e-4)


# ---- SliceGPT ----------------------------------------------------------------


@pytest.mark.parametrize(
  "case",
  [
    "mha/slicegpt_d48",
    "mha/slicegpt_d48_keepmean",
    "mha/slicegpt_d64",
    "mha/slicegpt_d64_keepmean",
    "gqa/slicegpt_d48",
    "gqa/slicegpt_d64",
    "gqa/slicegpt_d64_keepmean",
  ],
)
def test_slicegpt_golden(case, monkeypatch):
  name, folder = case.split("/")
  want = trace(name, folder)
  eigenvalues = []

  def principal(covariance):
    eigenvalues.append(found := plain(covariance))
    return found

  plain = slicegpt.principal
  monkeypatch.setattr(slicegpt, "principal", principal)
  settings = Prune(slicegpt=SliceGpt(subtract_mean=want["demean_embeddings"]))
  task = task_of(name, "slicegpt", settings=settings)
  pruned = slicegpt.slice_to_width(task, want["dim"])
  norms = 2 * 4 * want["dim"] + 64  # the tool has none: they no longer scale
  assert (
    model_config.count_params(pruned.config) == want["params_sliced"] + norms
  )
  np.testing.assert_allclose(
    [e[0] for e in eigenvalues],
    array(name, folder, "eigenvalues"),
    rtol=1e-4,
  )
  check_logits(pruned, name, folder)


def test_slicegpt_reaches_a_target():
  target = 150_000
  pruned = run("slicegpt", "gqa", target=target)
  size = model_config.count_params(pruned.config)
  assert size == pruned.trace[0]["params"]
  # No place could be one wider.
  widths = slicegpt.place_widths(pruned.config)
  assert max(widths[:-1]) - min(widths[:-1]) <= 1
  assert widths[-1] == 64
  for place in range(len(widths) - 1):
    more = [w + (i == place) for i, w in enumerate(widths)]
    wider = slicegpt.with_place_widths(pruned.config, more)
    assert size <= target < model_config.count_params(wider)


@pytest.mark.slow
def test_slicegpt_of_nothing_changes_nothing():
  """Not even with biases, scaled embeddings, head norms and absent halves."""
  config = ModelConfig(
    family="llama",
    vocab_size=32,
    hidden_size=16,
    queries_per_group=2,
    head_dim=4,
    kv_groups=(2, 0, 1),
    ffn_widths=(12, 8, 0),
    norm_eps=1e-6,
    rope=Rope(),
    context=16,
    tied=True,
    qkv_bias=True,
    o_bias=True,
    down_bias=True,
    qk_norm="head",
    norm_offset=1.0,
    embed_scale=4.0,
    residual_scale=0.5,
    window=(0, 0, 2),
  )
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype),
    model_config.abstract_params(config, jnp.float32),
  )
  tokens = random.integers(0, 32, (2, 8), dtype=np.int32)
  task = PruneTask(config, params, Prune(), lambda step: tokens)
  pruned = slicegpt.slice_to_width(task, config.hidden_size)
  want = logits(config, params, tokens)
  found = logits(pruned.config, pruned.params, tokens)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_slicegpt_can_slice_again():
  """A second time to the same width changes nothing."""
  task = task_of("gqa", "slicegpt")
  first = slicegpt.slice_to_width(task, 48)
  again = dataclasses.replace(task, config=first.config, params=first.params)
  second = slicegpt.slice_to_width(again, 48)
  assert second.config == first.config
  tokens = array("gqa", "eval_ids")
  np.testing.assert_allclose(
    logits(second.config, second.params, tokens),
    logits(first.config, first.params, tokens),
    **LOGITS,
  )


def test_slicegpt_refuses_norms_that_it_cannot_fold():
  config, params = dense("gqa")
  config = dataclasses.replace(config, norm_order="sandwich")
  with pytest.raises(UserError, match="norms behind its attention"):
    slicegpt.prune(PruneTask(config, params, Prune(), None, 1))


def test_slicegpt_says_what_it_can_reach():
  with pytest.raises(UserError, match=r"width of 1 .* remain"):
    run("slicegpt", "gqa", target=10_000)


# ---- ShortGPT ----------------------------------------------------------------


def drop(number):
  def counts_of(masked, measured):
    lowest = np.argsort(measured.importance_L, kind="stable")
    return shortgpt.dropping(masked, lowest[:number])

  return counts_of


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_shortgpt_golden(name):
  want = trace(name, "shortgpt")
  number = len(want["removed"])
  pruned = run_at(task_of(name, "shortgpt"), drop(number))
  task = task_of(name, "shortgpt")
  stacked = surgery.expand(
    task.config, task.params, task.kept, task.full, task.mesh
  )
  masked = Masked(task, stacked, Step(0, task.begin, {}, 0))
  influence = shortgpt.measure(masked, array(name, "calib")).importance_L
  np.testing.assert_allclose(
    np.array(influence) * want["tokens"],
    want["bi_sum_raw_block_outputs"],
    rtol=1e-4,
  )
  assert np.argsort(influence).tolist() == want["order_raw"]
  assert [i for i in range(4) if pruned.config.kv_groups[i]] == want["kept"]
  assert [bool(f) for f in pruned.config.ffn_widths] == [
    k > 0 for k in pruned.config.kv_groups
  ]
  check_logits(pruned, name, "shortgpt")


def test_shortgpt_spares_layers():
  task = task_of("gqa", "shortgpt")
  task.settings.attention_layers = task.settings.mlp_layers = "1:3"
  masked = Masked(task, None, Step(0, task.begin, {}, 0))
  assert shortgpt.droppable(masked).tolist() == [False, True, True, False]
  measured = Measured({}, importance_L=np.arange(4.0))
  size = model_config.count_params(task.config)
  task = dataclasses.replace(task, target=size - 1)
  masked = dataclasses.replace(masked, task=task)
  counts = shortgpt.allot(masked, measured).counts
  assert np.flatnonzero(counts["F"]).tolist() == [1]
  task = dataclasses.replace(task, target=size // 10)
  masked = dataclasses.replace(masked, task=task)
  with pytest.raises(UserError, match="without the 2 layers that may go"):
    shortgpt.allot(masked, measured)


# ---- FLAP --------------------------------------------------------------------

FLAP = sorted(path.name for path in (ROOT / "mha").glob("flap_*_p*"))


@functools.cache
def moments():
  """Statistics of the MHA model, and what was recorded of them."""
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  return flap.statistics(*dense("mha"), array("mha", "calib"), 3, mesh)


@pytest.mark.parametrize("unit, part", [("K", "attn"), ("F", "mlp")])
def test_flap_statistics(unit, part):
  for field, recorded in [
    ("mean", "mean"),
    ("fluctuation", "fluc"),
    ("square", "sqnorm"),
  ]:
    found = [getattr(m, field).ravel() for m in moments()[unit]]
    want = array("mha", f"flap_stat_{part}_{recorded}")
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7)


def check_kept(pruned, want):
  assert [k.tolist() for k in pruned.kept["K"]] == [
    np.flatnonzero(k).tolist() for k in want["head_keep"]
  ]
  assert [
    sorted(set(range(176)) - set(k.tolist())) for k in pruned.kept["F"]
  ] == want["ffn_pruned"]


@pytest.mark.parametrize("case", FLAP)
def test_flap_golden(case, monkeypatch):
  measured = moments()  # before it is patched, whatever test ran first
  monkeypatch.setattr(flap, "statistics", lambda *_: measured)
  want = trace("mha", case)
  structure = want["structure"].replace("-", "")
  settings = Prune(flap=Flap(want["metrics"], structure))
  groups = want["remove_heads"] if want["remove_heads"] >= 0 else None

  def counts_of(masked, measured):
    return flap.counter(masked.task, masked.masks, measured.scores, groups)(
      want["pruning_ratio"]
    )

  pruned = run_at(task_of("mha", "flap", settings=settings), counts_of)
  check_kept(pruned, want)
  assert model_config.count_params(pruned.config) == want["params_total"]
  for name in ("o_bias", "down_bias"):
    found = [pruned.params[f"layer_{i}"][name] for i in range(4)]
    np.testing.assert_allclose(
      found, array("mha", case, name), rtol=1e-4, atol=1e-5
    )
  check_logits(pruned, "mha", case)


@pytest.mark.parametrize("case", ["wanda_sp_p50", "mag_sp_p50"])
def test_wanda_sp_golden(case, monkeypatch):
  want = trace("mha", case)
  if want["method"] == "mag_sp":  # by the 2-norms of the weights alone
    plain = flap.weight_sizes
    norms = lambda w, mesh: (np.sqrt(plain(w, mesh=mesh)[1]), None)
    monkeypatch.setattr(flap, "weight_sizes", norms)
    ones = lambda y, _, mesh: np.ones(y.shape[2:])
    monkeypatch.setattr(wanda_sp, "_square", ones)
  config, _ = dense("mha")
  ratio = want["pruning_ratio"]
  counts = {
    u: (ratio * np.array(w)).astype(int) for u, w in config.units().items()
  }
  nothing = lambda *_: Allotted(counts)
  monkeypatch.setattr(wanda_sp, "allot", nothing)
  pruned = run_at(task_of("mha", "wanda_sp"), lambda *_: counts)
  check_kept(pruned, want)
  biases = 2 * 4 * 64  # the tool adds them, as zeros
  assert (
    model_config.count_params(pruned.config) == want["params_total"] - biases
  )
  check_logits(pruned, "mha", case)


# ---- LLM-Pruner, magnitude, random -------------------------------------------

KIND = {
  "param_first": "taylor",
  "param_second": "taylor_second",
  "param_mix": "taylor_mix",
  "vectorize": "taylor_vectorize",
}


def removed_of(pruned, unit, layer):
  count = {"K": 4, "F": 176}[unit]
  return sorted(set(range(count)) - set(pruned.kept[unit][layer].tolist()))


def recorded_removals(want):
  """What a recording removed, in the numbering of the whole model."""
  left = {
    u: [list(range(n)) for _ in range(4)] for u, n in (("K", 4), ("F", 176))
  }
  for number in range(1, want["iterative_steps"] + 1):
    for event in want["pruned"]:
      if event["step"] != number:
        continue
      unit = "K" if "removed_heads" in event else "F"
      gone = event["removed_heads" if unit == "K" else "removed"]
      units = left[unit][int(event["root"].split(".")[2])]
      for index in sorted(gone, reverse=True):
        del units[index]
  return left


LLM_PRUNER = sorted(
  f"{name}/{path.name}"
  for name in ("mha", "gqa")
  for path in (ROOT / name).glob("llmpruner_*")
)


@pytest.mark.parametrize("case", LLM_PRUNER)
def test_llm_pruner_golden(case):
  name, folder = case.split("/")
  want = trace(name, folder)
  kind = KIND[want["taylor"]] if want["taylor"] else want["pruner_type"]
  layers = "{}:{}".format(*want["layers"])
  settings = Prune(
    group_importance=kind,
    attention_layers=layers,
    mlp_layers=layers,
    gqa_fold="reference",
  )
  found, number = [], want["iterative_steps"]
  task = task_of(
    name,
    "llm_pruner",
    settings=settings,
    batch=want["num_examples"],
    log=lambda record, step: found.append(step),
  )
  few = array(name, "calib")[: want["num_examples"]]
  task = dataclasses.replace(task, samples=lambda step: few)

  def counts_of(masked, measured):
    counts_at = allotment.same_share(masked.task, masked.masks)
    if want["global_pruning"]:
      counts_at = llm_pruner.everywhere(
        masked.task, masked.masks, measured.scores
      )
    return counts_at(want["pruning_ratio"] * masked.number / number)

  pruned = run_at(task, counts_of, number)
  if want["score_order"]:
    rows = slice(*want["layers"])
    for unit, part in (("K", "attn_group"), ("F", "mlp")):
      np.testing.assert_allclose(
        found[0].scores[unit][rows],
        array(name, folder, f"{part}_scores"),
        rtol=1e-4,
      )
  left = recorded_removals(want)
  for unit in "KF":
    assert [k.tolist() for k in pruned.kept[unit]] == left[unit]
  assert model_config.count_params(pruned.config) == want["params_total"]
  check_logits(pruned, name, folder)


# ---- All of them -------------------------------------------------------------

METHODS = {
  "llm_pruner": Prune(),
  "llm_pruner in 2 steps": Prune(uniform=Uniform(2)),
  "llm_pruner, global": Prune(llm_pruner=LlmPruner("global")),
  "flap": Prune(),
  "flap ALMM": Prune(flap=Flap(structure="ALMM")),
  "flap ULUM": Prune(flap=Flap(structure="ULUM")),
  "flap ULMM": Prune(flap=Flap(structure="ULMM")),
  "wanda_sp": Prune(),
  "magnitude": Prune(),
  "random": Prune(),
}


def method(name):
  return re.split(r",| ", name)[0]


@pytest.mark.parametrize(
  "kind", ["ALAM", "ALMM", "ULUM", "ULMM", "layer", "global"]
)
@pytest.mark.parametrize("round_to", [1, 4])
def test_any_target_is_met_within_a_channel(kind, round_to):
  random = np.random.default_rng(round_to)
  for G, H in ((1, 8), (3, 4)):
    full = dataclasses.replace(
      dense("gqa")[0],
      queries_per_group=G,
      head_dim=H,
      kv_groups=(4, 2, 3),
      ffn_widths=(64, 96, 33),
      o_bias=True,
    )
    masks = surgery.to_masks(surgery.everything(full), full)
    scores = {u: random.normal(size=m.shape) for u, m in masks.items()}
    scores["F"][1, :40] = -1.0  # ties, such as of dead channels
    task = PruneTask(full, {}, Prune(flap=Flap(structure=kind)), None)
    prunable = targets.prunable_modules(full, task.settings)
    if kind == "layer":
      counts_at = allotment.same_share(task, masks)
    elif kind == "global":
      counts_at = llm_pruner.everywhere(task, masks, scores)
    else:
      counts_at = flap.counter(task, masks, scores)
    size = model_config.count_params(full)
    rounding = Prune(round_ffn_to=round_to)
    for target in range(size // 2, size, size // 29):
      left = exact_target.solve(
        full, masks, scores, counts_at, prunable, target, rounding
      )
      step = model_config.unit_cost(full)["F"] * round_to
      assert target - step < surgery.count(full, left) <= target


@pytest.mark.parametrize("name", METHODS)
def test_width_methods_meet_the_target(name):
  pruned = run(method(name), "gqa", target=150_000, settings=METHODS[name])
  size = model_config.count_params(pruned.config)
  shapes = jax.tree.map(lambda x: x.shape, pruned.params)
  assert shapes == model_config.param_shapes(pruned.config)
  assert pruned.trace[-1]["params"] == size
  assert 150_000 - model_config.unit_cost(pruned.config)["F"] < size <= 150_000


@pytest.mark.parametrize("name", ["llm_pruner", "flap", "shortgpt"])
def test_a_target_out_of_reach(name):
  with pytest.raises(UserError, match="cannot reach 20,000 parameters"):
    run(method(name), "gqa", target=20_000)


def test_flap_bias_is_the_mean_of_what_is_gone():
  pruned = run("flap", "gqa", target=150_000)
  config, params = dense("gqa")
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  moments = flap.statistics(config, params, array("gqa", "calib"), 4, mesh)
  masks = surgery.to_masks(pruned.kept, config)
  assert not all(m.all() for m in masks["K"])
  tokens = array("gqa", "eval_ids")
  x = activations.embed(config, params, tokens, mesh)
  for i in range(config.num_layers):
    weights = params[f"layer_{i}"]
    for unit in "KF":
      _, y = activations.half(config, params, i, unit, x, mesh)
      gone = ~masks[unit][i].reshape(-1, *[1] * (y.ndim - 3))
      y = jnp.where(gone, moments[unit][i].mean, y)
      x = layer.write(unit, config, weights, x, y)
  want = Decoder(config).apply({"params": params}, x, method="head")
  found = logits(pruned.config, pruned.params, tokens)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


def half_of_each_layer(masked, _):
  return allotment.same_share(masked.task, masked.masks)(0.5)


def half_by_flap(masked, measured):
  return flap.counter(masked.task, masked.masks, measured.scores)(0.5)


EIGHT = {
  "gqa/llmpruner_taylor_first_p50": (
    "llm_pruner",
    {"settings": Prune(gqa_fold="reference"), "batch": 16},
    half_of_each_layer,
  ),
  "mha/flap_wifv_alam_p50": ("flap", {}, half_by_flap),
  "gqa/shortgpt": ("shortgpt", {}, drop(1)),
  "mha/slicegpt_d48_keepmean": ("slicegpt", {}, None),
}


@pytest.mark.parametrize("case", EIGHT)
def test_golden_on_eight_devices(case):
  """A batch of 6 fills neither the devices nor the 16 samples evenly."""
  name, folder = case.split("/")
  method, options, counts_of = EIGHT[case]
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  task = task_of(name, method, mesh=mesh, **{"batch": 6} | options)
  if counts_of is None:
    pruned = slicegpt.slice_to_width(task, 48)
  else:
    pruned = run_at(task, counts_of)
  on_one = dataclasses.replace(pruned, params=jax.device_get(pruned.params))
  check_logits(on_one, name, folder)


@pytest.mark.parametrize("name", ["magnitude", "flap", "shortgpt"])
def test_a_second_stage(name):
  """Units keep their original numbers, and nothing comes back."""
  config, params = dense("gqa")
  first = run(method(name), "gqa", target=190_000)
  task = task_of("gqa", name, target=150_000, full=config, kept=first.kept)
  task = dataclasses.replace(task, config=first.config, params=first.params)
  second = methods.prune(task)
  assert model_config.count_params(second.config) <= 150_000
  for unit in "KF":
    for was, now in zip(first.kept[unit], second.kept[unit], strict=True):
      assert set(now) <= set(was)
  i = max(range(4), key=lambda i: second.config.ffn_widths[i])
  np.testing.assert_array_equal(
    second.params[f"layer_{i}"]["gate"],
    params[f"layer_{i}"]["gate"][:, second.kept["F"][i]],
  )
