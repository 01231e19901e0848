"""Budgets against files and against sums by hand."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_pruner_jax.config import Config, Prune, check
from adapt_pruner_jax.data.tuning_questions import TuningQuestions
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.pruning import (
  allotment,
  budgets,
  methods,
  quality,
  steps,
  surgery,
  targets,
)
from adapt_pruner_jax.pruning.steps import Method
from adapt_pruner_jax.pruning.task import (
  Masked,
  Measured,
  PruneTask,
  Quality,
  Step,
)
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


def test_a_norm_of_both_halves_counts_once():
  config = small.option("parallel")
  settings = Prune(budget="bytes", budget_export="f32")
  size = 4 * model_config.count_params(config)
  assert budgets.count(config, settings) == size
  gone = config.with_units({"K": (4, 0, 3), "F": (24, 40, 17)})
  size = 4 * model_config.count_params(gone)
  assert budgets.count(gone, settings) == size


@pytest.mark.parametrize("widths", [(96, 160, 128), (96, 100, 33)])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_bytes_are_those_of_the_file(kind, widths):
  """Of a gguf the tensors' own; rows of no whole blocks are float16."""
  config = dataclasses.replace(WIDE, window=(), ffn_widths=widths)
  settings = Prune(budget="bytes", budget_export=kind)
  found = budgets.count(config, settings)
  if kind not in ("q8_0", "q4_0"):  # as safetensors: every number alike
    size = {"f32": 4, "f16": 2, "bf16": 2}[kind]
    assert found == size * model_config.count_params(config)
    return
  params = model_config.abstract_params(config, jnp.dtype("float32"))
  total = 0
  for tensor in writer.tensors(config, params, "deci", kind):
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    total += int(np.prod(tensor.shape)) // block * size
  assert found == total


def test_q4_k_m_by_the_block_rules_of_llama_cpp():
  """Written by its own tool: the kind of each matrix is listed by hand."""
  config = dataclasses.replace(
    small.CONFIG,
    hidden_size=256,
    head_dim=64,
    kv_groups=(2,) * 7 + (1,),  # the last one's o has rows of 128
    ffn_widths=(512,) * 6 + (288, 100),  # of no whole blocks of 256, of 32
    tied=True,
  )
  kinds, sizes = gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES
  of = lambda kind, n: n // sizes[kinds[kind]][0] * sizes[kinds[kind]][1]
  total = of("Q6_K", config.vocab_size * 256) + 4 * 256
  for layer, (K, F) in enumerate(
    zip(config.kv_groups, config.ffn_widths, strict=True)
  ):
    more = layer in (0, 3, 6, 7)  # the first and last eighth, every third
    total += 4 * 2 * 256
    total += of("Q4_K", 2 * K * 64 * 256) + of("Q4_K", K * 64 * 256)
    total += of("Q6_K" if more else "Q4_K", K * 64 * 256)
    total += of("Q4_K" if K == 2 else "Q5_0", 2 * K * 64 * 256)
    total += 2 * of("Q4_K", F * 256)
    down = {512: "Q6_K" if more else "Q4_K", 288: "Q8_0", 100: "F16"}[F]
    total += of(down, F * 256)
  settings = Prune(budget="bytes", budget_export="q4_k_m")
  assert budgets.count(config, settings) == total
  assert settings.rounding() == {"K": 1, "F": 256}


# ---- Milliseconds ------------------------------------------------------------


TABLE = {
  "format": "adapt-pruner latency 1",
  "device": "a phone",
  "engine": "llama.cpp",
  "dtype": "q8_0",
  "model": {
    "hidden_size": 64,
    "head_dim": 16,
    "queries_per_group": 2,
    "vocab_size": 40,
  },
  "multiples": {"kv_groups": 1, "ffn": 32},
  "measured": [
    {
      "phase": "decode",
      "batch": 1,
      "context": 32,
      "rest_ms": 0.25,
      "attention_ms": [[0, 0], [1, 0.5], [4, 0.8]],
      "mlp_ms": [[0, 0], [32, 0.4], [96, 0.2], [160, 1.2]],
    }
  ],
}


def in_table(tmp_path, **changes):
  """Settings of a budget that is counted by `TABLE`."""
  file = tmp_path / "table.json"
  file.write_text(json.dumps(TABLE | changes))
  return Prune(
    budget="latency", budget_context=32, budget_table=str(file), ratio=0.3
  )


def test_milliseconds_are_read_between_the_points_of_a_table(tmp_path):
  """At whole multiples, and never less for a wider half."""
  settings = in_table(tmp_path)
  ms = lambda K, F: budgets.value(
    budgets.count(WIDE.with_units({"K": K, "F": F}), settings), settings
  )
  assert ms((0, 0, 0), (0, 0, 0)) == 0.25
  assert ms((1, 2, 4), (0, 0, 0)) == pytest.approx(0.25 + 0.5 + 0.6 + 0.8)
  assert ms((0, 0, 0), (32, 96, 160)) == pytest.approx(0.25 + 0.4 + 0.4 + 1.2)
  assert ms((0, 0, 0), (97, 128, 33)) == pytest.approx(0.25 + 0.8 + 0.8 + 0.4)
  assert settings.rounding() == {"K": 1, "F": 32}
  assert budgets.amount(1.5, settings) == 1_500_000
  # Of a vocabulary that is cut, where the table says what falls with it.
  fewer, count = dataclasses.replace(WIDE, vocab_size=10), budgets.count
  with pytest.raises(UserError, match="another model: its vocab_size is 40"):
    budgets.check_table(fewer, settings, "a phone")
  output = {"output_ms": [[0, 0], [40, 0.2]]}
  measured = [TABLE["measured"][0] | output]
  settings = in_table(tmp_path, measured=measured)
  budgets.check_table(fewer, settings, "a phone")
  assert count(WIDE, settings) - count(fewer, settings) == 150_000


@pytest.mark.parametrize("method", ["magnitude", "curvature"])
def test_milliseconds_are_pruned_to(method, tmp_path):
  settings = in_table(tmp_path)
  settings = dataclasses.replace(
    settings,
    method=method,
    group_importance="l2" if method == "magnitude" else "random",
  )
  target = targets.resolve_target(WIDE, settings)
  assert target == int(budgets.count(WIDE, settings) * 0.7)
  pruned = pruned_to(settings, target)
  left = budgets.count(pruned.config, settings)
  assert left <= target < left + 1_000_000  # a block of a wide MLP
  assert not any(width % 32 for width in pruned.config.ffn_widths)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"format": "a"}, 'begin with "format"'),
    ({"device": 3}, "a device that is no text"),
    ({"multiples": {"ffn": 8}}, "lacks 'kv_groups'"),
    ({"measured": []}, "nothing measured"),
    ({"measured": [TABLE["measured"][0] | {"rest_ms": -1}]}, "is negative"),
    (
      {"measured": [TABLE["measured"][0] | {"mlp_ms": [[32, 1], [64, 2]]}]},
      "mlp_ms whose widths do not rise from 0",
    ),
    (
      {"measured": [TABLE["measured"][0] | {"context": 64}]},
      "has no decode of batch 1 at context 32: it has decode of batch 1 at 64",
    ),
    (
      {"measured": [TABLE["measured"][0] | {"output_ms": [[0, 0], [9, 1]]}]},
      "output_ms that does not end at the vocab_size",
    ),
    ({"model": TABLE["model"] | {"head_dim": 8}}, "of another model: its head"),
    ({"device": "a phone"}, r"of another device \(a phone\) than this one"),
  ],
)
def test_a_table_that_does_not_fit(changes, message, tmp_path):
  settings = in_table(tmp_path, **changes)
  with pytest.raises(UserError, match=message):
    budgets.check_table(WIDE, settings, "this one")
  if message.startswith("of another device"):
    settings.budget_device = "a phone"  # as it is told to say
    budgets.check_table(WIDE, settings, "this one")


def test_a_table_that_is_missing_or_no_json(tmp_path):
  settings = Prune(budget="latency", budget_table=str(tmp_path / "none"))
  with pytest.raises(UserError, match="profile --model=DIR"):
    settings.rounding()
  (tmp_path / "none").write_text("{")
  with pytest.raises(UserError, match="it is no JSON"):
    settings.rounding()


# ---- Several limits ----------------------------------------------------------


@pytest.mark.parametrize("method", ["curvature", "magnitude"])
def test_several_limits_are_all_met(method):
  """The largest model: one unit more would break one of them."""
  settings = Prune(
    method=method,
    group_importance="l2" if method == "magnitude" else "random",
    ratio=0.2,
    limits="kv_bytes=9000, flops=200000",
    budget_context=32,
  )
  target = targets.resolve_target(WIDE, settings)
  limits = targets.resolve_limits(WIDE, settings)
  assert [s.budget for s, _ in limits] == ["kv_bytes", "flops"]
  pruned = pruned_to(settings, target, limits)
  all_of = [(settings, target), *limits]
  left = [budgets.count(pruned.config, s) for s, _ in all_of]
  assert all(n <= most for n, (_, most) in zip(left, all_of, strict=True))
  assert any(
    n + max(cost.max() for cost in budgets.unit_cost(WIDE, s).values()) > most
    for n, (s, most) in zip(left, all_of, strict=True)
  )


def test_a_limit_on_the_cache_leaves_the_schedule_of_mlps():
  settings = Prune(
    ratio=0.3,
    step_size=0.1,
    group_importance="random",
    limits="kv_bytes=9000",
    budget_context=32,
  )
  target = targets.resolve_target(WIDE, settings)
  pruned = pruned_to(settings, target, targets.resolve_limits(WIDE, settings))
  sparsity_SL = np.array(
    [[layer["mlp_sparsity"] for layer in row["layers"]] for row in pruned.trace]
  )
  waiting = (np.diff(sparsity_SL, axis=0) == 0).all(axis=1)
  assert waiting.any()  # the cache was priced then
  assert (np.diff(sparsity_SL.mean(axis=1)) >= 0).all()


def test_spared_layers_stay_whole_with_a_limit():
  config = dataclasses.replace(
    WIDE, kv_groups=(4,) * 8, ffn_widths=(96,) * 8, window=(0,) * 8
  )
  settings = Prune(
    method="magnitude", ratio=0.1, limits="kv_bytes=40000", budget_context=32
  )
  limits = targets.resolve_limits(config, settings)
  assert limits
  target = targets.resolve_target(config, settings)
  pruned = pruned_to(settings, target, limits, config=config)
  assert pruned.config.kv_groups[0] == 4
  assert pruned.config.ffn_widths[0] == 96
  assert min(pruned.config.kv_groups) < 4
  with pytest.raises(UserError, match="cannot reach"):
    pruned_to(settings, target, [(limits[0][0], 20000)], config=config)


def test_a_limit_that_is_kept_already_or_out_of_reach():
  settings = Prune(ratio=0.2, limits="kv_bytes=1e9")
  assert targets.resolve_limits(WIDE, settings) == ()
  settings = Prune(ratio=0.2, limits="kv_bytes=10")
  with pytest.raises(UserError, match="10 bytes of cache cannot be reached"):
    targets.resolve_limits(WIDE, settings)


# ---- A quality to keep -------------------------------------------------------


@pytest.mark.slow
def test_the_loss_is_the_compacted_models():
  tokens_NT = small.tokens(WIDE, 6, 8, 99)  # the last minibatch is short
  params = small.random_params(WIDE)
  settings = Prune(budget="quality", budget_value=1.0)
  quality_ = Quality(1.0, tokens_NT)
  task = PruneTask(WIDE, params, settings, None, batch=4, quality=quality_)
  stacked = surgery.expand(WIDE, params, task.kept, WIDE, task.mesh)
  masked = Masked(task, stacked, Step(0, task.begin, None, 0))
  masks = {u: m.copy() for u, m in task.begin.items()}
  masks["F"][:, ::3], masks["K"][0, 1] = False, False
  config, less = surgery.compact(
    stacked, surgery.to_kept(masks), WIDE, task.mesh
  )
  logits_BTV = decoder.Decoder(config).apply({"params": less}, tokens_NT)[0]
  wanted = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV[:, :-1], tokens_NT[:, 1:]
  ).mean()
  found = quality.loss(masked, stacked, masks)
  assert found == pytest.approx(float(wanted), abs=1e-5)
  assert quality.begun(masked) != pytest.approx(found, abs=1e-5)

  # Of questions: three with two choices, the last two tokens of six.
  weights_NT = np.zeros((6, 7))
  weights_NT[:, 3:5] = 0.5
  answers = np.array([0, 3, 4])
  asked = TuningQuestions(tokens_NT, weights_NT, np.arange(6) // 2, answers)
  task = dataclasses.replace(task, quality=Quality(0.1, None, asked))
  log_probs = np.asarray(jax.nn.log_softmax(logits_BTV))
  told = np.take_along_axis(log_probs[:, 3:5], tokens_NT[:, 4:6, None], 2)
  picked = told.sum((1, 2)).reshape(3, 2).argmax(1) + np.arange(3) * 2
  masked = dataclasses.replace(masked, task=task)
  found = quality.accuracy(masked, stacked, masks)
  assert found == (picked == answers).mean()
  wrong = dataclasses.replace(asked, answers_Q=picked ^ 1)
  task = dataclasses.replace(task, quality=Quality(0.1, None, wrong))
  masked = dataclasses.replace(masked, task=task)
  assert not quality.accuracy(masked, stacked, masks)


@pytest.mark.parametrize("method", ["adapt", "curvature"])
def test_the_smallest_that_keeps_a_quality(method, monkeypatch):
  """With a loss that rises by a milli for each channel that is gone."""
  lost = lambda masks: 1e-3 * (sum(WIDE.ffn_widths) - masks["F"].sum())
  monkeypatch.setattr(quality, "loss", lambda masked, _, masks: lost(masks))
  measured = Measured(
    {"K": np.ones((3, 4)), "F": np.tile(np.arange(160.0), (3, 1))},
    importance_L=np.arange(3.0),
  )
  settings = Prune(
    method=method, budget="quality", budget_value=0.1, step_size=0.05
  )
  name, _ = settings.pair()
  way = Method(lambda *_: measured, methods.ALLOTMENTS[name])
  target = targets.resolve_target(WIDE, settings)
  found = Quality(0.1, None)
  task = PruneTask(
    *(WIDE, small.random_params(WIDE), settings, lambda _: None, target),
    quality=found,
  )
  pruned = steps.prune(way, task)
  *others, last = pruned.trace
  gone = sum(WIDE.ffn_widths) - sum(pruned.config.ffn_widths)
  assert last["rise"] == pytest.approx(1e-3 * gone)
  assert 97 <= gone <= 100  # halved six times
  assert last["ended"]
  assert not any(row["ended"] for row in others)
  assert last["params"] == model_config.count_params(pruned.config)
  # The masks of a step say which units it left.
  row = bytes.fromhex(last["masks"]["F"][2])
  left = np.flatnonzero(np.unpackbits(np.frombuffer(row, np.uint8)))
  assert left.tolist() == pruned.kept["F"][2].tolist()
  for step in pruned.trace:
    masks = surgery.from_hex(step["masks"], WIDE)
    assert surgery.count(WIDE, masks) == step["params"]
  # A run that was cut behind the last step has nothing left to do.
  end = Step(9, surgery.to_masks(pruned.kept, WIDE), None, 0, ended=True)
  again = steps.prune(way, dataclasses.replace(task, after=end))
  assert again.config == pruned.config
  monkeypatch.setattr(
    quality, "loss", lambda masked, _, masks: 9 * (lost(masks) > 0)
  )
  with pytest.raises(UserError, match="no smaller model keeps this"):
    steps.prune(way, task)


# ---- Whole halves ------------------------------------------------------------


def test_the_last_unit_takes_its_half_with_it():
  """By hand: a group of score 3 frees its parameters and the norm's 64; alone
  it would be dearer than a channel, with the norm it is not."""
  config = dataclasses.replace(
    WIDE, window=(), kv_groups=(1, 1, 1), ffn_widths=(96, 96, 96)
  )
  masks = surgery.to_masks(surgery.everything(config), config)
  settings = Prune(whole_halves=True)
  cost = budgets.unit_cost(config, settings)
  scores = {u: np.ones(m.shape) for u, m in masks.items()}
  group = cost["K"][0] / cost["F"][0]  # worth as much as its parameters
  scores["K"][:] = 10 * group
  scores["K"][1] = group * 1.001
  scores["F"] += np.arange(96) / 1e5  # in their order
  full = budgets.count(config, settings)
  prunable = {u: np.ones(3, bool) for u in UNITS}
  need = cost["K"][0] + 64
  chosen = lambda s: allotment.choose(
    *(config, scores, masks, prunable, full - need, full - need), settings=s
  )
  counts = chosen(settings)
  assert counts["K"].tolist() == [0, 1, 0]
  assert not counts["F"].any()
  counts = chosen(Prune())
  assert not counts["K"].any()
  assert counts["F"].sum() == -(-need // cost["F"][0])


def test_a_half_whose_units_cancel_goes_as_one_piece():
  """Its units are dear one by one, and do little together."""
  config = dataclasses.replace(
    WIDE, window=(), kv_groups=(1, 1, 1), ffn_widths=(96, 96, 96)
  )
  masks = surgery.to_masks(surgery.everything(config), config)
  settings = Prune(whole_halves=True)
  cost = budgets.unit_cost(config, settings)
  scores = {u: np.ones(m.shape) * cost[u][0] for u, m in masks.items()}
  halves = {u: s.sum(1) for u, s in scores.items()}
  prunable = {u: np.ones(3, bool) for u in UNITS}
  half = 96 * cost["F"][0] + 64  # with its norm
  aim = budgets.count(config, settings) - half

  def counts(whole: float) -> list[int]:
    halves["F"][1] = whole
    args = config, scores, masks, prunable, aim, aim
    found = allotment.choose(*args, settings=settings, halves=halves)
    return found["F"].tolist()

  assert counts(10.0) == [0, 96, 0]
  assert counts(1e6)[1] < 96  # worth more than its units: they go first


def test_where_all_that_is_left_is_too_much_the_least_goes():
  config = dataclasses.replace(
    WIDE, window=(), kv_groups=(4, 4, 4), ffn_widths=(96, 96, 96)
  )
  settings = Prune(whole_halves=True, round_ffn_to=96)
  masks = surgery.to_masks(surgery.everything(config), config)
  scores = {u: np.ones(m.shape) for u, m in masks.items()}
  scores["K"] += np.arange(4)  # so that they do not go together
  prunable = {u: np.ones(3, bool) for u in UNITS}
  aim = budgets.count(config, settings) - 1000
  counts = allotment.choose(
    *(config, scores, masks, prunable, aim, aim), settings=settings
  )
  assert counts["K"].sum() == 1
  assert not counts["F"].any()


@pytest.mark.slow
def test_halves_compete_with_units():
  """Halves that do nothing go first, and what is left is what was left."""
  params = small.random_params(WIDE)
  params["layer_1"]["down"] = params["layer_1"]["down"] * 0
  params["layer_2"]["o"] = params["layer_2"]["o"] * 0
  settings = Prune(method="curvature", ratio=0.4, whole_halves=True)
  settings.ranking.cap = 1.0  # a module may go in one step
  target = targets.resolve_target(WIDE, settings)
  pruned = pruned_to(settings, target, params=params)
  assert pruned.config.ffn_widths[1] == 0
  assert pruned.config.kv_groups[2] == 0
  left = budgets.count(pruned.config, settings)
  assert left <= target < left + budgets.unit_cost(WIDE, settings)["F"].max()
  assert "mlp_norm" not in pruned.params["layer_1"]


def test_layers_of_one_width_stay_so_without_trimming():
  config = dataclasses.replace(
    WIDE, window=(), kv_groups=(4,) * 3, ffn_widths=(160,) * 3
  )
  scores = {
    u: np.random.default_rng(0).random((3, w[0]))
    for u, w in config.units().items()
  }
  settings = Prune(
    method="curvature", allotment="uniform", ratio=0.25, round_ffn_to=32
  )
  target = targets.resolve_target(config, settings)
  for trim in (True, False):
    settings.trim = trim
    task = PruneTask(
      config, small.random_params(config), settings, None, target
    )
    masked = Masked(task, None, Step(0, task.begin, None, 0))
    counts = allotment.uniform(masked, Measured(scores)).counts
    width = {u: np.array(w) - counts[u] for u, w in config.units().items()}
    assert budgets.of_widths(config, width, settings) <= target
    assert trim == any(len({*w.tolist()}) > 1 for w in width.values())


def pruned_to(settings, target, limits=(), params=None, config=WIDE):
  task = PruneTask(
    config,
    params or small.random_params(config),
    settings,
    lambda step: small.tokens(config, 4, 8, step),
    target,
    batch=4,
    limits=limits,
  )
  return methods.prune(task)


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
  pruned = pruned_to(settings, target)
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
    ({"budget": "watts"}, "is not one of params, flops, bytes, kv_bytes, lat"),
    ({"budget": "flops", "target_params": 9}, "goes with prune.ratio or"),
    ({"budget": "flops", "method": "flap"}, "--config.prune.method=adapt"),
    ({"budget_value": 9.0}, "are both given"),
    ({"budget_context": 0}, "must be at least 1"),
    ({"limits": "kv_bytes"}, "'kv_bytes' is none"),
    ({"limits": "kv_byte=3"}, "did you mean kv_bytes"),
    ({"limits": "params=3"}, "give further budgets than params"),
    ({"limits": "kv_bytes=-3"}, "'kv_bytes=-3' is none"),
    ({"limits": "kv_bytes=3", "method": "flap"}, "limits=kv_bytes=3 goes with"),
    ({"budget": "quality"}, "budget=quality goes with prune.budget_value"),
    ({"whole_halves": True}, "goes with the allotment ranking"),
    (
      {
        "whole_halves": True,
        "method": "curvature",
        "budget": "bytes",
        "budget_export": "q8_0",
      },
      "a gguf has no layers without attention",
    ),
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
