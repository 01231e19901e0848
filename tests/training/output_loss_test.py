import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import embedding, sharding
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.training import losses, output_loss, step
from tests import small

V, T, B = 43, 13, 8
TIED = dataclasses.replace(
  small.CONFIG, vocab_size=V, tied=True, final_softcap=3.0
)
UNTIED = dataclasses.replace(small.CONFIG, vocab_size=V, logit_scale=0.25)
ONE, EIGHT = (1, 1, 1), (2, 2, 2)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def mesh_of(shape):
  return sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


def ends(config, seed, mesh):
  """A stream behind the final norm, and an output matrix where it belongs."""
  name = decoder.output_name(config)
  rng = np.random.default_rng(seed)
  x_BTD = rng.normal(size=(B, T, config.hidden_size)).astype(np.float32)
  matrix = 0.5 * small.random_params(config, seed)[name]
  placed = sharding.param_sharding(name, matrix.shape, mesh)
  rows = jax.NamedSharding(mesh, jax.P(sharding.BATCH))
  return jax.device_put(x_BTD, rows), jax.device_put(matrix, placed)


def tokens(seed=0):
  rng = np.random.default_rng(seed)
  targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
  weights_BT = rng.integers(0, 3, (B, T)).astype(np.float32)
  weights_BT[0] = 0
  return targets_BT, weights_BT


def plain(objective, matrix, x_BTD, targets_BT, weights_BT, taught):
  """The same from whole logits, by nothing but JAX's own rules."""

  def logits(config, x_BTD, matrix):
    matrix_VD = matrix if config.tied else matrix.T
    logits_BTV = config.logit_scale * jnp.einsum(
      "btd,vd->btv", x_BTD, matrix_VD, precision="highest"
    )
    if cap := config.final_softcap:
      logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    return logits_BTV

  student = logits(objective.config, x_BTD, matrix)
  nll = losses.next_token(student, targets_BT, weights_BT)[0]
  if objective.teacher is None:
    return nll, nll
  teacher = logits(objective.teacher, *taught)
  kl = losses.distillation(student, teacher, weights_BT, objective.temperature)[
    0
  ]
  return (1 - objective.alpha) * nll + objective.alpha * kl, nll


@pytest.mark.parametrize(
  "config, teacher, alpha, temperature, shape, chunk",
  [
    slow(TIED, None, 0.0, 2.0, ONE, 2**26),
    (UNTIED, TIED, 0.5, 1.0, ONE, V * B * 4),
    slow(UNTIED, None, 0.0, 2.0, EIGHT, 2**26),
    slow(TIED, UNTIED, 0.5, 2.0, EIGHT, V * B),
    slow(UNTIED, TIED, 1.0, 4.0, (1, 8, 1), 1),
    slow(TIED, None, 0.0, 2.0, (1, 1, 8), V),
    slow(UNTIED, None, 0.0, 2.0, (8, 1, 1), V),
  ],
)
def test_gradients_are_those_of_whole_logits(
  config, teacher, alpha, temperature, shape, chunk, monkeypatch
):
  monkeypatch.setattr(output_loss, "CHUNK", chunk)
  mesh = mesh_of(shape)
  objective = output_loss.Objective(config, mesh, teacher, alpha, temperature)
  x_BTD, matrix = ends(config, 0, mesh)
  taught = teacher and ends(teacher, 1, mesh)
  targets_BT, weights_BT = tokens()

  def gradient(loss):
    def mean(matrix, x_BTD, *rest):
      found = loss(objective, matrix, x_BTD, *rest)
      return found[0] / 7, found[1]

    return jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))

  args = matrix, x_BTD, targets_BT, weights_BT, taught
  (value, nll), (dmatrix, dx) = gradient(output_loss.loss)(*args)
  (value_, nll_), (dmatrix_, dx_) = gradient(plain)(*args)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  near(value, value_)
  near(nll, nll_)
  near(dmatrix, dmatrix_, atol=1e-5 * np.abs(dmatrix_).max())
  near(dx, dx_, atol=1e-5 * np.abs(dx_).max())
  assert not np.asarray(dx[0]).any()
  # Without gradients, and with those of the stream alone, as under LoRA.
  only = jax.jit(output_loss.loss, static_argnums=0)
  near(only(objective, *args)[0] / 7, value)
  alone = jax.jit(
    jax.grad(lambda x: output_loss.loss(objective, matrix, x, *args[2:])[0])
  )
  near(alone(x_BTD) / 7, dx, atol=1e-5 * np.abs(dx_).max())


@pytest.mark.parametrize("shape", [ONE, slow(EIGHT)])
def test_log_probs_of_tokens(shape, monkeypatch):
  monkeypatch.setattr(output_loss, "CHUNK", V)
  mesh = mesh_of(shape)
  x_BTD, matrix = ends(UNTIED, 0, mesh)
  targets_BT, _ = tokens()
  logits_BTV = 0.25 * np.asarray(x_BTD) @ np.asarray(matrix)
  targets_BT[:, 1] = logits_BTV[:, 1].argmax(-1)
  found = jax.jit(output_loss.token_log_probs, static_argnums=(0, 1))
  got_BT, hits_BT = found(UNTIED, mesh, matrix, x_BTD, targets_BT)
  want_BT, _ = losses.log_probs(logits_BTV, targets_BT)
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5)
  np.testing.assert_array_equal(hits_BT, logits_BTV.argmax(-1) == targets_BT)


def test_divergence_is_the_distillation_at_temperature_one():
  mesh = mesh_of(ONE)
  student, teacher = ends(UNTIED, 0, mesh), ends(TIED, 1, mesh)
  _, weights_BT = tokens()
  got = output_loss.divergence(
    (UNTIED, TIED), mesh, student, teacher, weights_BT
  )
  logits = [
    decoder.finish(c, decoder.product(c, matrix, x_BTD))
    for c, (x_BTD, matrix) in ((UNTIED, student), (TIED, teacher))
  ]
  want, _ = losses.distillation(*logits, weights_BT, temperature=1.0)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_gradient_of_a_matrix_in_bfloat16_is_summed_in_float32(monkeypatch):
  """A thousand chunks of one token, each too little to change a bfloat16."""
  monkeypatch.setattr(output_loss, "CHUNK", 1)
  config = dataclasses.replace(UNTIED, vocab_size=2, hidden_size=1)
  objective = output_loss.Objective(config)
  x_BTD = jnp.ones((1, 1000, 1), jnp.bfloat16)
  matrix = jnp.zeros((1, 2), jnp.bfloat16)
  args = jnp.zeros((1, 1000), jnp.int32), jnp.ones((1, 1000))
  loss = lambda m: output_loss.loss(objective, m, x_BTD, *args)[0]
  got = jax.jit(jax.grad(loss))(matrix)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, [[-125.0, 125.0]], rtol=4e-3)


@pytest.mark.parametrize(
  "shape, vocab, width",
  [
    (EIGHT, 40, 16),
    slow(EIGHT, 43, 16),
    slow((1, 4, 2), 44, 15),
    slow((1, 2, 4), 43, 16),
  ],
)
def test_embedding_cut_over_devices(shape, vocab, width):
  """V or D or neither divides; with the gradient, which sums equal tokens."""
  mesh = mesh_of(shape)
  config = dataclasses.replace(
    TIED, vocab_size=vocab, hidden_size=width, embed_scale=3.0
  )
  rng = np.random.default_rng(0)
  table = rng.normal(size=(vocab, width)).astype(np.float32)
  tokens_BT = rng.integers(0, vocab, (6, 5)).astype(np.int32)
  dy_BTD = rng.normal(size=(6, 5, width)).astype(np.float32)
  placed = sharding.param_sharding("embedding", table.shape, mesh)
  run = lambda table: embedding.embed(
    config, {"embedding": table}, tokens_BT, mesh
  )
  pull = lambda table: jax.vjp(run, table)[1](dy_BTD)[0]
  cut = jax.device_put(table, placed)
  np.testing.assert_array_equal(jax.jit(run)(cut), 3 * table[tokens_BT])
  want = np.zeros_like(table)
  np.add.at(want, tokens_BT, 3 * dy_BTD)
  np.testing.assert_allclose(jax.jit(pull)(cut), want, rtol=1e-5, atol=1e-6)


ROWS, LENGTH, VOCAB, WIDTH = 17, 4099, 1031, 104


@pytest.mark.slow
@pytest.mark.parametrize(
  "tied, shape", [(True, (1, 1, 8)), (False, (1, 8, 1)), (False, (2, 2, 2))]
)
def test_a_train_step_has_no_logits_of_all_tokens(tied, shape):
  """Compiled only; sizes are primes that occur nowhere else."""
  config = dataclasses.replace(
    small.CONFIG,
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    kv_groups=(1,),
    ffn_widths=(8,),
    context=LENGTH,
    tied=tied,
  )
  mesh = sharding.make_mesh(*shape)
  settings = Train(distill_alpha=0.5)
  loss = step.make_loss(config, settings, mesh, config)
  abstract = model_config.abstract_params(config, jnp.float32)
  placed = sharding.param_shardings(abstract, mesh)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    placed,
  )
  rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  names = "tokens", "targets", "segments", "positions", "weights"
  batch = {f"{name}_BT": rows for name in names}
  gradient = jax.jit(
    jax.value_and_grad(loss, has_aux=True), out_shardings=((None, None), placed)
  )
  text = gradient.lower(params, None, params, batch, 1.0).compile().as_text()
  shapes = {
    tuple(map(int, dims.split(",")))
    for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
  }
  assert (ROWS, LENGTH, WIDTH) in shapes
  padded = -(-VOCAB // 8) * 8
  whole = [s for s in shapes if VOCAB in s or padded in s]
  # The matrix is stored over `fsdp` and `tensor`, and with replicas over less.
  parts = 8 if shape[0] == 1 else 2
  assert all(math.prod(s) <= padded * WIDTH // parts for s in whole), whole
