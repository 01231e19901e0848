import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import arithmetic, axes, decoder, model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.training import forward, loop, lora, optimizer
from adapt_pruner_jax.training.losses import distillation, next_token
from adapt_pruner_jax.training.step import (
  check_rows,
  init_optimizer,
  make_loss,
  make_step,
)
from tests import small

UNEVEN = ModelConfig(
  family="llama",
  vocab_size=48,
  hidden_size=16,
  queries_per_group=2,
  head_dim=8,
  kv_groups=(3, 1),
  ffn_widths=(20, 13),
  norm_eps=1e-5,
  rope=Rope(),
  context=32,
  tied=True,
  qkv_bias=True,
)
CONSTANT = lambda step: 1e-2


def random_params(config, seed=0):
  """Random everywhere, so that no norm or bias is trivial."""
  rng = np.random.default_rng(seed)

  def draw(name, _, leaf):
    offset = 1.0 if name.endswith("norm") else 0.0
    return np.float32(offset + 0.1 * rng.normal(size=leaf.shape))

  return axes.map_named(draw, model_config.abstract_params(config, jnp.float32))


def random_batch(config, rows, length, seed=0):
  rng = np.random.default_rng(seed)
  segments = 1 + (np.arange(length) >= length // 3) * np.ones((rows, 1))
  starts = np.where(np.arange(length) >= length // 3, length // 3, 0)
  return {
    "tokens_BT": rng.integers(0, config.vocab_size, (rows, length)).astype(
      np.int32
    ),
    "targets_BT": rng.integers(0, config.vocab_size, (rows, length)).astype(
      np.int32
    ),
    "segments_BT": segments.astype(np.int32),
    "positions_BT": np.tile(np.arange(length) - starts, (rows, 1)).astype(
      np.int32
    ),
    "weights_BT": rng.integers(0, 2, (rows, length)).astype(np.float32),
  }


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def placed_params(params, mesh):
  return jax.device_put(params, sharding.param_shardings(params, mesh))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, batch):
  inputs = [batch[f"{n}_BT"] for n in ("tokens", "segments", "positions")]
  return decoder.Decoder(config).apply({"params": params}, *inputs)[0]


@functools.cache
def _shared_step(config, settings, mesh):
  return make_step(config, Train(*settings), CONSTANT, mesh)


def shared_step(config, settings, mesh):
  """One step for all tests of the same settings: compiling takes long."""
  return _shared_step(config, dataclasses.astuple(settings), mesh)


def run_steps(
  config, params, batches, settings=None, mesh=None, schedule=CONSTANT, **kwargs
):
  """Trains one step a batch; returns params, optimizer state, metrics."""
  settings = settings or Train()
  mesh = mesh or one_device()
  params = placed_params(params, mesh)
  state = init_optimizer(params, settings, mesh)
  if kwargs or schedule is not CONSTANT:
    step_fn = make_step(config, settings, schedule, mesh, **kwargs)
  else:
    step_fn = shared_step(config, settings, mesh)
  seen = []
  (_, params, state), step = loop.recover(
    loop.Training(step_fn, params, state),
    iter(batches),
    0,
    len(batches),
    mesh,
    log=lambda step, metrics: seen.append((step, metrics)),
  )
  assert step == len(batches)
  assert [step for step, _ in seen] == list(range(len(batches)))
  return params, state, [metrics for _, metrics in seen]


def assert_close(tree, other, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other
  )


@pytest.fixture(scope="module")
def plain():
  """Three plain steps on one device, the reference of many tests."""
  params = random_params(UNEVEN)
  batches = [random_batch(UNEVEN, 8, 12, seed) for seed in range(3)]
  return params, batches, run_steps(UNEVEN, params, batches)


def test_metrics(plain):
  params, batches, (_, _, metrics) = plain
  batch = batches[0]
  logits = logits_of(UNEVEN, params, batch)
  total, count = next_token(logits, batch["targets_BT"], batch["weights_BT"])
  assert metrics[0]["tokens"] == count == batch["weights_BT"].sum()
  assert metrics[0]["loss"] == pytest.approx(float(total / count), rel=1e-6)
  assert metrics[0]["learning_rate"] == pytest.approx(1e-2)
  assert metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_equal_one(plain, shape):
  params, batches, (one, state, metrics) = plain
  mesh = sharding.make_mesh(*shape)
  many, many_state, many_metrics = run_steps(UNEVEN, params, batches, mesh=mesh)
  for got, expected in zip(many_metrics, metrics, strict=True):
    assert got == pytest.approx(expected, rel=1e-5)
  assert_close(many, one, atol=2e-5)
  assert_close(many_state, state, atol=2e-5)
  placed = sharding.param_shardings(params, mesh)
  assert jax.tree.map(lambda x: x.sharding, many) == placed
  mu = optax.tree_utils.tree_get(many_state, "mu")
  assert jax.tree.map(lambda x: x.sharding, mu) == placed


@pytest.mark.parametrize(
  "shape, remat",
  [
    ((1, 1, 1), "dots"),
    ((2, 2, 2), "attention+mlp"),
    pytest.param((1, 1, 1), "offload", marks=pytest.mark.slow),
  ],
)
def test_accumulation_equals_one_big_batch(plain, shape, remat):
  """Microbatches hold different numbers of counted tokens."""
  params, batches, (whole, _, metrics) = plain
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
  settings = Train(accumulation=2, remat=remat)
  split, _, split_metrics = run_steps(
    UNEVEN, params, batches, settings, mesh=mesh
  )
  for got, expected in zip(split_metrics, metrics, strict=True):
    assert got == pytest.approx(expected, rel=1e-5)
  assert_close(split, whole, atol=2e-5)


@pytest.mark.slow
def test_packed_documents_equal_separate_ones(plain):
  params, _, _ = plain
  packed = random_batch(UNEVEN, 2, 12)
  cut, length = 4, 12
  apart = {name: np.zeros((4, length), x.dtype) for name, x in packed.items()}
  apart["positions_BT"][:] = np.arange(length)
  for name in ("tokens_BT", "targets_BT", "weights_BT"):
    apart[name][:2, :cut] = packed[name][:, :cut]
    apart[name][2:, : length - cut] = packed[name][:, cut:]
  together, _, metrics = run_steps(UNEVEN, params, [packed])
  alone, _, alone_metrics = run_steps(UNEVEN, params, [apart])
  assert alone_metrics[0] == pytest.approx(metrics[0], rel=1e-5)
  assert_close(together, alone, atol=2e-5)


def test_gradients_in_float32():
  """Products as ever, but a matrix's gradient is rounded nowhere."""
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(size=(2, 64, 16)), jnp.bfloat16)
  w_DF = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)

  def product(w_DF):
    y_BTF = arithmetic.project("btd,df->btf", x_BTD, w_DF)
    return jnp.sum(jnp.sin(y_BTF.astype(jnp.float32))), y_BTF

  made = jax.value_and_grad(product, has_aux=True)
  half = w_DF.astype(jnp.bfloat16)
  ((_, y), exact), ((_, y_half), rounded) = made(w_DF), made(half)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, y_half)
  assert exact.dtype == jnp.float32
  assert (exact != exact.astype(jnp.bfloat16)).any()
  np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))
  settings = Train(dtype="bfloat16", gradient_dtype="float32")
  found = forward.cast({"q": w_DF, "attn_norm": w_DF[0]}, settings)
  assert (found["q"].dtype, found["attn_norm"].dtype) == ("float32", "bfloat16")


def test_bfloat16_arithmetic_keeps_float32_state(plain):
  params, batches, (_, _, metrics) = plain
  settings = Train(dtype="bfloat16")
  new, state, half_metrics = run_steps(UNEVEN, params, batches, settings)
  for leaf in jax.tree.leaves((new, state)):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  assert half_metrics[0]["loss"] != metrics[0]["loss"]
  assert half_metrics[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-2)
  # Updates far below bfloat16's resolution are not lost.
  tiny = lambda step: jnp.float32(1e-6)
  new, _, _ = run_steps(UNEVEN, params, batches, settings, schedule=tiny)
  assert np.all(new["final_norm"] != params["final_norm"])


def test_overfits_one_batch(plain):
  params, batches, _ = plain
  _, _, metrics = run_steps(UNEVEN, params, [batches[0]] * 150)
  assert metrics[0]["loss"] > 3.5
  assert metrics[-1]["loss"] < 0.5


def test_same_steps_in_two_parts(plain):
  """What a run that was stopped and continued does."""
  params, batches, (whole, state, _) = plain
  mesh, settings = one_device(), Train()
  params = placed_params(params, mesh)
  opt_state = init_optimizer(params, settings, mesh)
  step_fn = shared_step(UNEVEN, settings, mesh)
  training, step = loop.recover(
    loop.Training(step_fn, params, opt_state),
    iter(batches),
    0,
    3,
    mesh,
    stop=lambda s: s == 2,
  )
  assert step == 2
  (_, params, opt_state), step = loop.recover(
    training, iter(batches[2:]), step, 3, mesh
  )
  assert step == 3
  assert_close((params, opt_state), (whole, state), rtol=0, atol=0)


def test_learning_rate_follows_the_global_step(plain):
  params, batches, _ = plain
  mesh, settings = one_device(), Train()
  schedule = optimizer.schedule(
    Train(learning_rate=1e-3, min_learning_rate=0.0), 100
  )
  step_fn = make_step(UNEVEN, settings, schedule, mesh)
  params = placed_params(params, mesh)
  state = init_optimizer(params, settings, mesh)
  rates = {}
  loop.recover(
    loop.Training(step_fn, params, state), iter(batches), 89, 92, mesh,
    log=lambda step, metrics: rates.update({step: metrics["learning_rate"]}),
  )  # fmt: skip
  assert rates == pytest.approx({89: 1e-3, 90: 9e-4, 91: 8e-4}, rel=1e-5)


def test_nonfinite_loss_stops_and_changes_nothing(plain):
  params, batches, _ = plain
  mesh, settings = one_device(), Train()
  broken = dict(batches[1], weights_BT=batches[1]["weights_BT"] * np.inf)
  step_fn = shared_step(UNEVEN, settings, mesh)
  start = lambda: placed_params(jax.tree.map(np.copy, params), mesh)
  state = lambda: init_optimizer(start(), settings, mesh)
  training = loop.Training(step_fn, start(), state())
  with pytest.raises(UserError, match=r"at train step 6 \(batch 6") as error:
    loop.recover(training, iter([batches[0], broken]), 5, 7, mesh)
  assert "\n" not in str(error.value)
  new, new_state, _ = step_fn(start(), state(), loop.place(broken, mesh), 0)
  assert_close(new, params, rtol=0)
  assert_close(new_state, state(), rtol=0)


def test_nonfinite_loss_can_be_skipped(plain):
  params, batches, _ = plain
  mesh, settings = one_device(), Train()
  broken = dict(batches[1], weights_BT=batches[1]["weights_BT"] * np.nan)
  step_fn = shared_step(UNEVEN, settings, mesh)

  def run(batches):
    start = placed_params(jax.tree.map(np.copy, params), mesh)
    state = init_optimizer(start, settings, mesh)
    training, _ = loop.recover(
      loop.Training(step_fn, start, state),
      iter(batches),
      0,
      len(batches),
      mesh,
      skip_nonfinite=True,
    )
    return training.trained

  with_broken = run([batches[0], broken, batches[2]])
  assert_close(with_broken, run([batches[0], batches[2]]), rtol=0)


def test_data_that_ends_early_is_an_error(plain):
  params, batches, _ = plain
  mesh, settings = one_device(), Train()
  params = placed_params(params, mesh)
  state = init_optimizer(params, settings, mesh)
  step_fn = shared_step(UNEVEN, settings, mesh)
  training = loop.Training(step_fn, params, state)
  with pytest.raises(UserError, match="ended before step 1"):
    loop.recover(training, iter(batches[:1]), 0, 3, mesh)


@pytest.mark.parametrize("shape, rows", [((4, 2, 1), 12), ((2, 1, 4), 6)])
def test_batch_that_does_not_divide_is_an_error(shape, rows):
  mesh = sharding.make_mesh(*shape)
  accumulation = 2 if rows == 6 else 1
  with pytest.raises(UserError, match="multiple of"):
    check_rows(rows, accumulation, mesh)


def test_distillation_weight_zero_is_plain_training(plain):
  params, batches, (new, _, metrics) = plain
  teacher = (UNEVEN, random_params(UNEVEN, seed=1))
  distilled, _, got = run_steps(UNEVEN, params, batches, teacher=teacher)
  assert got == metrics
  assert_close(distilled, new, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "shape, accumulation", [((1, 1, 1), 1), ((2, 2, 2), 2)]
)
def test_distillation_loss(plain, shape, accumulation):
  """The teacher may have other sizes than the student."""
  params, batches, _ = plain
  wide = dataclasses.replace(UNEVEN, kv_groups=(4, 2), ffn_widths=(24, 16))
  teacher = (wide, random_params(wide, seed=1))
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
  teacher = (wide, placed_params(teacher[1], mesh))
  settings = Train(distill_alpha=0.3, accumulation=accumulation)
  _, _, (got, *_) = run_steps(
    UNEVEN, params, batches, settings, mesh=mesh, teacher=teacher
  )
  batch = batches[0]
  student = logits_of(UNEVEN, params, batch)
  taught = logits_of(wide, teacher[1], batch)
  weights = batch["weights_BT"]
  nll, count = next_token(student, batch["targets_BT"], weights)
  kl, _ = distillation(student, taught, weights, settings.distill_temperature)
  assert got["next_token"] == pytest.approx(float(nll / count), rel=1e-5)
  expected = float(0.7 * nll / count + 0.3 * kl / count)
  assert got["loss"] == pytest.approx(expected, rel=1e-5)


def lora_run(params, batches, mesh, rank=3):
  settings = Train(lora_rank=rank, lora_alpha=6.0)
  base = placed_params(params, mesh)
  adapters = lora.init_lora(UNEVEN, rank, jax.random.key(0), mesh)
  state = init_optimizer(adapters, settings, mesh)
  step_fn = make_step(UNEVEN, settings, CONSTANT, mesh, base=base)
  metrics = []
  (_, adapters, _), _ = loop.recover(
    loop.Training(step_fn, adapters, state),
    iter(batches),
    0,
    len(batches),
    mesh,
    log=lambda _, found: metrics.append(found),
  )
  return base, adapters, metrics


@pytest.mark.slow
def test_lora_starts_at_the_base_and_leaves_it_alone(plain):
  params, batches, (_, _, metrics) = plain
  base, adapters, lora_metrics = lora_run(params, batches, one_device())
  assert lora_metrics[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-6)
  assert lora_metrics[2]["loss"] != pytest.approx(metrics[2]["loss"], rel=1e-6)
  assert_close(base, params, rtol=0)
  names = {*lora.LORA_NAMES} & {*params["layer_0"]}
  assert {"q", "o", "down"} <= names
  assert {n for layer in adapters.values() for n in layer} == names
  merged = lora.merge_lora(base, adapters, 6.0)
  for name in ("attn_norm", "q_bias"):
    assert_close(merged["layer_0"][name], params["layer_0"][name], rtol=0)
  for name in names:
    assert np.any(merged["layer_1"][name] != params["layer_1"][name])


@pytest.mark.slow
def test_merged_lora_computes_what_the_adapters_do(plain):
  """x @ W + alpha / r * (x @ a) @ b, written out for reading and writing."""
  params, batches, _ = plain
  base, adapters, _ = lora_run(params, batches, one_device(), rank=3)
  merged = lora.merge_lora(base, adapters, 6.0)
  x = (
    np.random.default_rng(0)
    .normal(size=(5, UNEVEN.hidden_size))
    .astype(np.float32)
  )
  w, f = base["layer_0"]["q"], adapters["layer_0"]["q"]
  expected = np.einsum("bd,dkgh->bkgh", x, w) + 2.0 * np.einsum(
    "br,rkgh->bkgh", x @ f["a"], f["b"]
  )
  got = np.einsum("bd,dkgh->bkgh", x, merged["layer_0"]["q"])
  np.testing.assert_allclose(got, expected, atol=1e-5)
  y = np.random.default_rng(0).normal(size=(5, 3, 2, 8)).astype(np.float32)
  w, f = base["layer_0"]["o"], adapters["layer_0"]["o"]
  inner = np.einsum("bkgh,kghr->br", y, f["a"])
  expected = np.einsum("bkgh,kghd->bd", y, w) + 2.0 * inner @ f["b"]
  got = np.einsum("bkgh,kghd->bd", y, merged["layer_0"]["o"])
  np.testing.assert_allclose(got, expected, atol=1e-5)


def trained_adapters(config, rank, mesh):
  """As they are in training, where `b` is no longer zero."""
  fresh = lora.init_lora(config, rank, jax.random.key(0), mesh)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + np.float32(rng.normal(size=x.shape)), fresh)


@pytest.mark.slow
@pytest.mark.parametrize("option, kept", [("biases", ""), ("sandwich", "int8")])
def test_adapters_beside_a_model_are_the_merged_model(option, kept):
  """In their loss and in their gradients; also beside eight bits, of which the
  model is then made."""
  config, mesh = small.option(option), one_device()
  settings = Train(lora_rank=2, lora_alpha=0.1, lora_base=kept)
  base = whole = small.random_params(config)
  if kept:
    base = lora.in_int8(whole, mesh)
    rounded = lambda w: np.asarray(w["int8"] * w["scale"])
    for layer in (n for n in whole if n.startswith("layer_")):
      names = [n for n in lora.LORA_NAMES if n in whole[layer]]
      coarse = {n: rounded(base[layer][n]) for n in names}
      for name, w in coarse.items():
        step = np.asarray(base[layer][name]["scale"])
        assert (np.abs(w - whole[layer][name]) <= 0.501 * step).all()
      whole = whole | {layer: whole[layer] | coarse}
  adapters = trained_adapters(config, 2, mesh)
  batch, count = random_batch(config, 2, 12), 7.0
  loss = make_loss(config, settings, mesh, None)

  def beside(adapters):
    return loss(adapters, base, None, batch, count)[0]

  def merged(adapters):
    params = lora.merge_lora(whole, adapters, settings.lora_alpha)
    return loss(params, None, None, batch, count)[0]

  value, gradient = jax.jit(jax.value_and_grad(beside))(adapters)
  value_, gradient_ = jax.jit(jax.value_and_grad(merged))(adapters)
  assert value == pytest.approx(float(value_), rel=1e-5)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient_))
  assert_close(gradient, gradient_, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.slow
def test_lora_makes_no_matrix_of_full_size():
  """Few tokens: what the step needs beside its arguments is less than one."""
  config = dataclasses.replace(
    UNEVEN, hidden_size=128, kv_groups=(2, 2), ffn_widths=(512, 512)
  )
  settings, mesh = Train(lora_rank=2), one_device()
  base = model_config.abstract_params(config, jnp.float32)
  adapters, _ = lora.abstract_adapters(config, 2, mesh)
  batch = random_batch(config, 1, 4)
  loss = make_loss(config, settings, mesh, None)
  gradient = jax.jit(jax.grad(lambda *args: loss(*args)[0]))
  compiled = gradient.lower(adapters, base, None, batch, 1.0).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 128 * 512


@pytest.mark.slow
def test_eight_bits_are_not_made_whole(monkeypatch):
  """Beside its arguments a step needs less than two layers in float32, and the
  frozen base is a quarter of what it was."""
  layers, one = 8, 4 * 128 * (2 * 128 + 2 * 64 + 3 * 512)
  config = dataclasses.replace(
    UNEVEN, hidden_size=128, kv_groups=(4,) * layers, ffn_widths=(512,) * layers
  )
  config = dataclasses.replace(config, queries_per_group=2, head_dim=16)
  settings = Train(
    lora_rank=2, scan_layers="on", remat="full", lora_base="int8"
  )
  ahead = loop.compile_ahead(config, settings, one_device(), (1, 8))
  found = ahead.program.result().memory_analysis()
  assert found.temp_size_in_bytes < 2 * one
  base = model_config.abstract_params(config, jnp.float32)
  sizes = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  less = sizes(base) - sizes(lora.in_int8(base, one_device()))
  assert less > 0.7 * layers * one


@pytest.mark.slow
def test_lora_on_eight_devices_equals_one(plain):
  params, batches, _ = plain
  _, one, metrics = lora_run(params, batches, one_device(), rank=4)
  mesh = sharding.make_mesh(2, 2, 2)
  _, many, many_metrics = lora_run(params, batches, mesh, rank=4)
  for got, expected in zip(many_metrics, metrics, strict=True):
    assert got == pytest.approx(expected, rel=1e-5)
  assert_close(many, one, atol=2e-5)


def test_step_equals_torch(plain):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = dataclasses.replace(
    UNEVEN, kv_groups=(4, 4), ffn_widths=(20, 20), qkv_bias=False
  )
  params = random_params(config)
  batch = random_batch(config, 4, 12)
  batch["segments_BT"][:] = 1
  batch["positions_BT"][:] = np.arange(12)
  peer = torch_peer(torch, transformers, config, params)
  names = dict(peer.named_parameters())
  norms = [p for n, p in names.items() if "norm" in n]
  matrices = [p for n, p in names.items() if "norm" not in n]
  groups = [
    {"params": matrices, "weight_decay": 0.1},
    {"params": norms, "weight_decay": 0.0},
  ]
  adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
  losses = []
  for _ in range(2):
    logits = peer(torch.tensor(batch["tokens_BT"])).logits
    nll = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1),
      torch.tensor(batch["targets_BT"]).long().flatten(),
      reduction="none",
    )
    weights = torch.tensor(batch["weights_BT"]).flatten()
    mean = (nll * weights).sum() / weights.sum()
    adam.zero_grad()
    mean.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    adam.step()
    losses.append(mean.item())
  new, _, metrics = run_steps(
    config, params, [batch] * 2, Train(weight_decay=0.1)
  )
  assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-5)
  for name, tensor in torch_weights(config, new).items():
    np.testing.assert_allclose(
      tensor, names[name].detach().numpy(), atol=1e-5, err_msg=name
    )


def torch_weights(config, params):
  """Params under Transformers' names and shapes."""
  found = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"],
  }
  for i in range(config.num_layers):
    p = {n: np.asarray(x) for n, x in params[f"layer_{i}"].items()}
    prefix = f"model.layers.{i}."
    D = config.hidden_size
    for n in "qkv":
      found[f"{prefix}self_attn.{n}_proj.weight"] = p[n].reshape(D, -1).T
    found[f"{prefix}self_attn.o_proj.weight"] = p["o"].reshape(-1, D).T
    for n in ("gate", "up", "down"):
      found[f"{prefix}mlp.{n}_proj.weight"] = p[n].T
    found[f"{prefix}input_layernorm.weight"] = p["attn_norm"]
    found[f"{prefix}post_attention_layernorm.weight"] = p["mlp_norm"]
  return found


def torch_peer(torch, transformers, config, params):
  peer = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.ffn_widths[0],
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.kv_groups[0] * config.queries_per_group,
      num_key_value_heads=config.kv_groups[0],
      head_dim=config.head_dim,
      rms_norm_eps=config.norm_eps,
      tie_word_embeddings=True,
      attn_implementation="eager",
    )
  )
  with torch.no_grad():
    for name, array in torch_weights(config, params).items():
      peer.get_parameter(name).copy_(torch.tensor(np.ascontiguousarray(array)))
  return peer


def test_fsdp_gathers_weights_not_activations():
  """No device ever holds the logits, or the MLP, of the whole batch. The output
  matrix, and the embedding, stay where they are."""
  config = dataclasses.replace(UNEVEN, vocab_size=96, ffn_widths=(40, 72))
  mesh = sharding.make_mesh(1, 8, 1)
  rows, length = 16, 12
  text = compiled_text(config, mesh, rows, length)
  for width in (40, 72):
    assert f"f32[{rows // 8},{length},{width}]" in text
    assert f"f32[{rows},{length},{width}]" not in text
  assert f"f32[{rows},{length},{96 // 8}]" in text
  assert f"{length},96]" not in text
  assert f"f32[96,{config.hidden_size}]" not in text


def compiled_text(config, mesh, rows, length):
  """The optimized program of a train step."""
  params = placed_params(random_params(config), mesh)
  state = init_optimizer(params, Train(), mesh)
  batch = loop.place(random_batch(config, rows, length), mesh)
  step_fn = make_step(config, Train(), CONSTANT, mesh)
  return (
    jax.jit(step_fn, static_argnums=3)
    .lower(params, state, batch, 0)
    .compile()
    .as_text()
  )
