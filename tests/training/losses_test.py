import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.training import losses


def test_next_token_by_hand():
  # Probabilities 1/2, 1/4, 1/4; then 1/10, 8/10, 1/10; the third is masked.
  logits = jnp.log(jnp.array([[[2.0, 1, 1], [1, 8, 1], [5, 1, 1]]]))
  targets = jnp.array([[0, 1, 2]])
  total, count = losses.next_token(logits, targets, jnp.array([[1.0, 1, 0]]))
  np.testing.assert_allclose(total, np.log(2) + np.log(1.25), rtol=1e-6)
  assert count == 2


def test_next_token_weights_scale():
  logits = jnp.log(jnp.array([[[2.0, 1, 1], [1, 8, 1]]]))
  targets = jnp.array([[0, 1]])
  total, count = losses.next_token(logits, targets, jnp.array([[0.5, 2.0]]))
  np.testing.assert_allclose(
    total, 0.5 * np.log(2) + 2 * np.log(1.25), rtol=1e-6
  )
  assert count == 2.5


def test_masked_position_may_hold_anything():
  logits = jnp.array([[[1.0, 2.0], [np.nan, np.inf]]])
  weights = jnp.array([[1.0, 0.0]])
  total, _ = losses.next_token(logits, jnp.array([[1, -100]]), weights)
  np.testing.assert_allclose(total, np.log1p(np.exp(-1.0)), rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.zeros((1, 600, 4), jnp.bfloat16)
  total, count = losses.next_token(
    logits, jnp.zeros((1, 600), int), jnp.ones((1, 600), jnp.bfloat16)
  )
  assert total.dtype == count.dtype == jnp.float32
  assert count == 600
  np.testing.assert_allclose(total, 600 * np.log(4), rtol=1e-5)


def test_distillation_by_hand():
  # At temperature 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2.
  teacher = 2 * jnp.log(jnp.array([[[3.0, 1.0]]]))
  student = jnp.zeros((1, 1, 2))
  total, count = losses.distillation(student, teacher, jnp.ones((1, 1)), 2.0)
  expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
  np.testing.assert_allclose(total, 4 * expected, rtol=1e-5)
  assert count == 1


def test_distillation_is_zero_and_flat_at_the_teacher():
  teacher = jax.random.normal(jax.random.key(0), (2, 3, 5))
  weights = jnp.ones((2, 3))
  total = lambda s, t: losses.distillation(s, t, weights, 2.0)[0]
  assert abs(total(teacher, teacher)) < 1e-6
  gradient = jax.grad(total)(teacher, teacher)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_no_gradient_reaches_the_teacher():
  student, teacher = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
  weights = jnp.ones((2, 3))
  total = lambda t: losses.distillation(student, t, weights, 2.0)[0]
  gradient = jax.grad(total)
  assert not gradient(teacher).any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_distillation_gradient_hardly_depends_on_temperature(temperature):
  """What the factor T^2 is for; exact in the limit of small logits."""
  key = jax.random.key(1)
  student, teacher = 1e-2 * jax.random.normal(key, (2, 1, 1, 8))
  weights = jnp.ones((1, 1))
  gradient = jax.grad(
    lambda s: losses.distillation(s, teacher, weights, temperature)[0]
  )(student)
  centred = (student - student.mean()) - (teacher - teacher.mean())
  np.testing.assert_allclose(gradient, centred / 8, atol=5e-5)
