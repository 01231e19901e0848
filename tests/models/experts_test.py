"""Mixture of experts: products by expert, the router, the balance of experts.

Whole families against Transformers: tests/formats/families_test.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import experts
from adapt_pruner_jax.training import step
from tests import small
from tests.formats import zoo


@pytest.mark.parametrize("sizes", [(3, 0, 9, 5), (0, 17, 0), (1, 40, 2, 0)])
def test_products_by_group(sizes):
  """With their gradients, also of many at once, and as accelerators do it."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x_PI, w_XIO = draw(sum(sizes), 6), draw(len(sizes), 6, 7)
  group_P, sizes_X = np.repeat(np.arange(len(sizes)), sizes), np.int32(sizes)
  square = lambda y: jnp.sum(y**2)
  plain = lambda x, w: jnp.einsum("pi,pio->po", x, w[group_P])
  want = plain(x_PI, w_XIO)
  got = experts.grouped(x_PI, w_XIO, sizes_X)
  np.testing.assert_allclose(got, want, atol=1e-5)
  ours = lambda x, w: square(experts.grouped(x, w, sizes_X))
  theirs = lambda x, w: square(plain(x, w))
  gradients = (jax.grad(f, (0, 1))(x_PI, w_XIO) for f in (ours, theirs))
  for one, two in zip(*gradients, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
  both = np.stack([x_PI, 2 * x_PI])
  many = jax.vmap(lambda x: experts.grouped(x, w_XIO, sizes_X))(both)
  np.testing.assert_allclose(many[1], 2 * want, atol=1e-5)
  accelerated = jax.lax.ragged_dot(x_PI, w_XIO, sizes_X)
  np.testing.assert_allclose(accelerated, want, atol=1e-5)
  outer = [
    f(jnp.asarray(x_PI), jnp.asarray(want), sizes_X)
    for f in (experts._ragged_outer, experts._outer_of_blocks)
  ]
  np.testing.assert_allclose(*outer, atol=1e-4)


@pytest.mark.slow
def test_loss_and_gradients_equal_transformers(tmp_path):
  """With what the balance of the experts counts for."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  animal = zoo.make(tmp_path, ("granitemoe",))["granitemoe"]
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    animal.path, attn_implementation="eager", router_aux_loss_coef=0.5
  )
  tokens = torch.tensor(animal.tokens_BT)
  expected = peer(tokens, labels=tokens)
  assert expected.aux_loss > 1.9  # top 2: no less than 2 if all were balanced
  expected.loss.backward()
  zoo.rewrite_config(animal.path, router_aux_loss_coef=0.5)
  config, params = load.load(animal.path)
  loss = step.make_loss(config, Train(), small.one_device(), None)
  batch = step.batch_of(animal.tokens_BT)
  count = batch["weights_BT"].sum()
  gradient = jax.jit(
    jax.value_and_grad(lambda p: loss(p, None, None, batch, count)[0])
  )
  value, found = gradient(params)
  assert float(value) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
  block = peer.model.layers[1].block_sparse_moe
  gate_up = block.experts.gate_up_proj.grad.numpy().swapaxes(1, 2)
  layer = found["layer_1"]
  wanted = {
    "router": block.router.weight.grad.numpy().T,
    "moe_gate": gate_up[:, :, :24],
    "moe_up": gate_up[:, :, 24:],
    "moe_down": block.experts.down_proj.grad.numpy().swapaxes(1, 2),
  }
  for name, want in wanted.items():
    assert np.abs(want).max() > 1e-3, name
    np.testing.assert_allclose(layer[name], want, rtol=1e-3, atol=1e-5)
