"""Mixture of experts: products by expert, the router, the balance of experts.

Whole families against Transformers: tests/formats/families_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.models import grouped
from adapt_pruner_jax.training import stacking, step
from adapt_pruner_jax.training.stacking import Run
from tests import small
from tests.formats import zoo
from tests.training.step_test import random_batch


@pytest.mark.slow
def test_products_by_group():
  """With their gradients, also of many at once, and as accelerators do it."""
  rng, sizes = np.random.default_rng(0), (3, 0, 40, 5)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x_PI, w_XIO = draw(sum(sizes), 6), draw(len(sizes), 6, 7)
  group_P = np.repeat(np.arange(len(sizes)), sizes)
  sizes_X = jnp.asarray(sizes, jnp.int32)
  square = lambda y: jnp.sum(y**2)
  plain = lambda x, w: jnp.einsum("pi,pio->po", x, w[group_P])
  want = plain(x_PI, w_XIO)
  got = grouped.product(x_PI, w_XIO, sizes_X)
  np.testing.assert_allclose(got, want, atol=1e-5)
  ours = lambda x, w: square(grouped.product(x, w, sizes_X))
  theirs = lambda x, w: square(plain(x, w))
  gradients = (jax.grad(f, (0, 1))(x_PI, w_XIO) for f in (ours, theirs))
  for one, two in zip(*gradients, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
  both = np.stack([x_PI, 2 * x_PI])
  many = jax.vmap(lambda x: grouped.product(x, w_XIO, sizes_X))(both)
  np.testing.assert_allclose(many[1], 2 * want, atol=1e-5)
  ragged = jax.lax.ragged_dot(x_PI, w_XIO, sizes_X)
  np.testing.assert_allclose(ragged, want, atol=1e-5)
  fewer_X = sizes_X.at[3].set(2)  # rows of no group
  args = True, x_PI, w_XIO.swapaxes(1, 2), fewer_X
  kernel = grouped._product_of_kernel(*args, interpret=True)
  np.testing.assert_allclose(kernel, want.at[-3:].set(0), atol=1e-5)
  args = jnp.asarray(x_PI), jnp.asarray(want), sizes_X
  outer = grouped._ragged_outer(*args)
  blocks = grouped._outer_of_blocks(*args)
  np.testing.assert_allclose(blocks, outer, atol=1e-4)
  kernel = grouped._outer_of_kernel(*args, interpret=True)
  np.testing.assert_allclose(kernel, outer, atol=1e-4)


def test_gradients_in_float32():
  """As of `arithmetic.project`: the product is that of the rows' dtype."""
  rng, sizes_X = np.random.default_rng(0), np.int32([5, 0, 7])
  x_PI = jnp.asarray(rng.normal(size=(12, 8)), jnp.bfloat16)
  w_XIO = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)

  def product(w_XIO):
    y_PO = grouped.product(x_PI, w_XIO, sizes_X)
    return jnp.sum(jnp.sin(y_PO.astype(jnp.float32))), y_PO

  made = jax.value_and_grad(product, has_aux=True)
  (_, y), exact = made(w_XIO)
  (_, y_half), rounded = made(w_XIO.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, y_half)
  assert exact.dtype == jnp.float32
  assert (exact != exact.astype(jnp.bfloat16)).any()
  np.testing.assert_allclose(rounded, exact, rtol=0.02, atol=0.02)


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


@pytest.mark.slow
def test_eight_devices_and_stacked_layers():
  """Each device sorts its own rows, has half of the experts and half of their
  channels; a layer has no MLP, and no say in the balance."""
  config = dataclasses.replace(
    small.option("experts"),
    ffn_widths=(24, 0, 16),
    experts=8,
    expert_bias=True,
    swiglu_limit=0.2,
    swiglu_alpha=1.5,
  )
  params, batch = small.random_params(config), random_batch(config, 8, 12)
  params["layer_0"]["router"][:, :2] *= 4  # most rows go to one half
  mesh, runs = sharding.make_mesh(1, 2, 2, expert=2), (Run(0, 3, 4, 24),)

  def gradient(mesh, runs):
    placed = stacking.stack(runs, jax.device_put(params), mesh)
    loss = step.make_loss(config, Train(), mesh, None)
    fn = jax.jit(
      jax.value_and_grad(lambda p: loss(p, None, None, batch, 96.0)[0])
    )
    value, grads = fn(placed)
    return value, stacking.unstack(runs, config, grads, mesh)

  value, want = gradient(small.one_device(), ())
  value_, got = gradient(mesh, runs)
  assert float(value_) == pytest.approx(float(value), rel=1e-6)
  close = lambda one, two: np.testing.assert_allclose(one, two, atol=2e-6)
  jax.tree.map(close, got, want)
  placed = stacking.stack(runs, jax.device_put(params), mesh)
  assert placed[runs[0].name]["moe_up"].sharding.spec[1] == "expert"
  assert np.abs(want["layer_0"]["router"]).max() > 1e-3


def test_experts_that_do_not_divide_are_refused():
  mesh = sharding.make_mesh(expert=4)
  config = small.option("experts")
  sharding.require_experts(dataclasses.replace(config, experts=8), mesh)
  with pytest.raises(UserError, match="llama has 5 experts: give a number"):
    sharding.require_experts(config, mesh)
  with pytest.raises(UserError, match="llama has no experts"):
    sharding.require_experts(small.CONFIG, mesh)
