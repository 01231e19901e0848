"""A teacher's likeliest tokens: the loss of them, and their file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.training import losses, output_loss, step
from adapt_pruner_jax.training.teacher_cache import TeacherCache, fill
from tests import small

B, T, V = 2, 7, small.CONFIG.vocab_size


def logits(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(3 * rng.normal(size=(B, T, V)), jnp.float32)


def test_loss_of_the_likeliest_tokens():
  """KL of the tokens and of all others as one, by hand; with all it is KL."""
  student, teacher = logits(0), logits(1)
  weights_BT = jnp.ones((B, T)).at[0, 3].set(0)

  def cached(student, number):
    taught = losses.likeliest(teacher, number, 2.0)
    return losses.distillation_by_likeliest(student, taught, weights_BT, 2.0)[0]

  def whole(student):
    return losses.distillation(student, teacher, weights_BT, 2.0)[0]

  gradient = jax.value_and_grad
  got, dgot = gradient(lambda s: cached(s, V))(student)
  want, dwant = gradient(whole)(student)
  assert got == pytest.approx(float(want), rel=1e-5)
  np.testing.assert_allclose(dgot, dwant, atol=2e-6)
  few = [float(cached(student, n)) for n in (1, 4, 16, V)]
  assert few == sorted(few)  # coarser outcomes are never further apart
  p, q = (np.asarray(jax.nn.softmax(x / 2, -1)) for x in (teacher, student))
  by_hand = 0.0
  for b, t in np.ndindex(B, T):
    top = np.argsort(-p[b, t])[:4]
    outcomes = [np.append(x[b, t, top], 1 - x[b, t, top].sum()) for x in (p, q)]
    kl = (outcomes[0] * np.log(outcomes[0] / outcomes[1])).sum()
    by_hand += 4 * float(weights_BT[b, t]) * kl  # temperature squared
  assert few[1] == pytest.approx(by_hand, rel=1e-4)


def batch(seed):
  rows = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
  return step.batch_of(rows)


@pytest.mark.slow
def test_file_of_a_teacher(tmp_path):
  """Answers once, survives a kill, and trains as with the teacher beside."""
  config, mesh = small.CONFIG, sharding.one_device()
  params, calls = small.random_params(config, 1), []
  settings = Train(distill_alpha=0.7, distill_temperature=1.5, teacher_cache=V)
  batches = [batch(0), batch(1), batch(0)]

  def teacher():
    calls.append(len(calls))
    return config, params

  def filled():
    cache = TeacherCache(tmp_path / "cache" / "teacher.bin", T, V)
    done = list(fill(cache, batches, teacher, settings, mesh))
    assert done == [1, 2, 3]
    return cache

  filled()
  cache = filled()
  assert (calls, len(cache.at)) == ([0], 2 * B)
  size = cache.path.stat().st_size
  assert size == 2 * B * cache.dtype.itemsize
  with open(cache.path, "ab") as file:  # killed while it wrote
    file.truncate(size - 5)
  cache = filled()
  assert (calls, cache.path.stat().st_size) == ([0, 1], size)

  [given, *_] = cache.with_taught(batches)
  student = small.random_params(config, 2)
  count = given["weights_BT"].sum()

  def value(batch, settings, beside):
    loss = step.make_loss(config, settings, mesh, config if beside else None)
    mean = lambda student: loss(student, None, params, batch, count)[0]
    return jax.jit(jax.value_and_grad(mean))(student)

  got, dgot = value(given, settings, False)
  want, dwant = value(
    batches[0], dataclasses.replace(settings, teacher_cache=0), True
  )
  assert got == pytest.approx(
    float(want), rel=2e-3
  )  # log-probabilities in float16
  for one, other in zip(*map(jax.tree.leaves, (dgot, dwant)), strict=True):
    assert abs(one - other).max() < 5e-3 * abs(other).max() + 1e-7


def test_a_cache_that_cannot_be_written(tmp_path):
  cache = TeacherCache(tmp_path / "teacher.bin", T, V)
  cache.path.unlink()
  cache.path.mkdir()
  nothing = losses.Likeliest(*(np.zeros((B, T, V), t) for t in ("i4", "f2")))
  with pytest.raises(UserError, match=r"cannot write .*teacher\.bin"):
    cache.add(batch(0), nothing)


def test_likeliest_in_chunks(monkeypatch):
  """Also where the matrix is cut and padded."""
  monkeypatch.setattr(output_loss, "CHUNK", 2 * V)
  config, mesh = small.CONFIG, sharding.make_mesh(1, 2, 1, jax.devices()[:2])
  params = small.random_params(config, 1)
  x_BTD = np.random.default_rng(0).normal(size=(B, T, config.hidden_size))
  args = params["lm_head"], jnp.asarray(x_BTD, jnp.float32)
  one = output_loss.likeliest(config, None, *args, 3, 2.0)
  two = jax.jit(lambda *a: output_loss.likeliest(config, mesh, *a, 3, 2.0))(
    *args
  )
  np.testing.assert_array_equal(one.ids_BTC, two.ids_BTC)
  np.testing.assert_allclose(one.log_probs_BTC, two.log_probs_BTC, rtol=1e-5)
