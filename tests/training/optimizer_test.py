import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.training import optimizer


def rates(kind, total, peak=1.0, minimum=0.1):
  settings = Train(schedule=kind, learning_rate=peak, min_learning_rate=minimum)
  rate = optimizer.schedule(settings, total)
  return np.array([rate(step) for step in range(total)])


def test_wsd_values():
  found = rates("wsd", 100)
  np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
  np.testing.assert_allclose(found[5:90], 1.0)
  # 90 is the first of ten equal steps down, 99 the last step of the run.
  np.testing.assert_allclose(found[90:], 1 - 0.09 * np.arange(1, 11), rtol=1e-5)


def test_cosine_values():
  found = rates("cosine", 100)
  np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
  done = np.arange(1, 96) / 95
  expected = 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
  np.testing.assert_allclose(found[5:], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7, 19, 20])
def test_short_runs_stay_in_range(kind, total):
  found = rates(kind, total)
  assert np.all(np.isfinite(found))
  assert np.all((found >= 0.1 - 1e-6) & (found <= 1 + 1e-6))


def test_decay_pulls_at_matrices_only():
  names = {n: jnp.zeros([2] * len(axes.AXES[n])) for n in axes.AXES}
  mask = optimizer.decayed(names)
  matrices = {"embedding", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}
  matrices |= {"attn_shortcut", "mlp_shortcut", "q_gate"}
  matrices |= {"shared_gate", "shared_up", "shared_down", "shared_open"}
  matrices |= {"router", "moe_gate", "moe_up", "moe_down"}
  matrices |= {f"delta_{x}" for x in ("q", "k", "v", "gate", "o")}
  matrices |= {"delta_beta", "delta_decay"}
  matrices |= {f"wide_{x}" for x in ("q", "k", "v", "o")}
  matrices |= {"told", "told_proj", "told_gate", "told_out"}
  assert {n for n, pulled in mask.items() if pulled} == matrices


def test_update_by_hand():
  """Clip to norm 1, bias-corrected Adam, decoupled decay."""
  params = {"embedding": jnp.array([[2.0, -2.0]]), "final_norm": jnp.ones(2)}
  grads = {
    "embedding": jnp.array([[3.0, 0.0]]),
    "final_norm": 4 * jnp.eye(2)[0],
  }
  transform = optimizer.optimizer(weight_decay=0.1)
  state = transform.init(params)
  updates, state = transform.update(grads, state, params)
  # After bias correction, the first step of Adam is the sign of the gradient.
  np.testing.assert_allclose(
    updates["embedding"], [[1 + 0.1 * 2, 0 - 0.1 * 2]], rtol=1e-5
  )
  np.testing.assert_allclose(updates["final_norm"], [1, 0], rtol=1e-5)
  mu = optax.tree_utils.tree_get(state, "mu")
  np.testing.assert_allclose(mu["embedding"], [[0.1 * 0.6, 0]], rtol=1e-5)
  nu = optax.tree_utils.tree_get(state, "nu")
  np.testing.assert_allclose(nu["final_norm"], [0.05 * 0.8**2, 0], rtol=1e-5)


def test_moments_in_bfloat16():
  """Rounded between steps; a step from the same moments is the same."""
  params = {"embedding": jnp.array([[2.0, -2.0, 0.5]])}
  whole, half = (optimizer.optimizer(0.1, d) for d in ("float32", "bfloat16"))
  state, rounded = whole.init(params), half.init(params)
  rng = np.random.default_rng(0)
  get = optax.tree_utils.tree_get
  for _ in range(40):
    draw = rng.normal(size=3) * [1e-3, 1e-6, 1e-9]
    grads = {"embedding": jnp.asarray(draw, jnp.float32)[None]}
    update, state = whole.update(grads, state, params)
    other, rounded = half.update(grads, rounded, params)
    np.testing.assert_allclose(
      other["embedding"], update["embedding"], atol=0.03
    )
  for name in ("mu", "nu"):
    exact, kept = (get(s, name)["embedding"] for s in (state, rounded))
    assert kept.dtype == jnp.bfloat16
    spread = np.sqrt(get(state, "nu")["embedding"])
    off = abs(kept.astype(np.float32) - exact)
    assert (off < 0.03 * (spread if name == "mu" else exact)).all()


def test_moments_lie_where_their_params_do():
  config = model_config.ModelConfig(
    "llama", 32, 16, 2, 8, (3, 1), (20, 13), 1e-5, Rope(), 32, True
  )
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    model_config.abstract_params(config, jnp.float32),
  )
  mesh = sharding.make_mesh(2, 2, 2)
  placed = sharding.param_shardings(params, mesh)
  params = jax.device_put(params, placed)
  state = optimizer.init(optimizer.optimizer(0.1), params, placed, mesh)
  for moment in ("mu", "nu"):
    tree = optax.tree_utils.tree_get(state, moment)
    assert jax.tree.map(lambda x: x.sharding, tree) == placed
    assert axes.map_named(lambda *a: a[0], tree)["layer_1"]["q"] == "q"
  count = optax.tree_utils.tree_get(state, "count")
  assert count.sharding.is_fully_replicated
  assert model_config.count_params(config) == sum(
    x.size for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))
  )
