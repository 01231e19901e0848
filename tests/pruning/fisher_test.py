"""The Fisher score against gradients of the whole masked model, row by row."""

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import attention_inputs, places, run_layer
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope
from adapt_pruner_jax.pruning import fisher, surgery
from tests import small

CONFIG = ModelConfig(
  family="llama",
  vocab_size=31,
  hidden_size=8,
  queries_per_group=2,
  head_dim=4,
  kv_groups=(3, 2),
  ffn_widths=(7, 5),
  norm_eps=1e-5,
  rope=Rope(),
  context=16,
  tied=True,
)


def row_loss(gates, params, layers, tokens_T):
  """The mean loss of one row; a gate multiplies what a unit feeds."""
  decoder = Decoder(CONFIG)
  outer = {n: params[n] for n in model_config.outer_names(CONFIG)}
  apply = lambda method, x: decoder.apply({"params": outer}, x, method=method)
  x_BTD = apply(Decoder.embed, tokens_T[None])
  inputs = attention_inputs(CONFIG, len(tokens_T))
  for i, weights in enumerate(layers):
    place = jax.tree.map(lambda a, i=i: a[i], places(CONFIG))
    masks = {u: gates[u][i] for u in gates}
    x_BTD, _ = run_layer(
      surgery.dense(CONFIG), weights, place, inputs, x_BTD, masks
    )
  logits_TV = apply(Decoder.head, x_BTD[:, :-1])[0]
  each_T = jax.nn.log_softmax(logits_TV)[
    jnp.arange(len(tokens_T) - 1), tokens_T[1:]
  ]
  return -jnp.mean(each_T)


def test_half_the_mean_square_of_each_rows_gradient():
  rng = np.random.default_rng(0)
  params = jax.tree.map(jnp.asarray, small.random_params(CONFIG))
  mesh, kept = sharding.one_device(), surgery.everything(CONFIG)
  stacked = surgery.expand(CONFIG, params, kept, CONFIG, mesh)
  masks = surgery.to_masks(kept, CONFIG)
  tokens_NT = rng.integers(0, 31, (3, 9), np.int32)
  padded = np.concatenate([tokens_NT, tokens_NT[:1]]).reshape(2, 2, 9)
  valid_MB = np.array([[True, True], [True, False]])
  args = surgery.dense(CONFIG), stacked, masks, padded, valid_MB
  found = fisher.measure_step(*args, mesh=mesh, halves=True)
  gates = {u: jnp.asarray(m, jnp.float32) for u, m in masks.items()}
  layers = [
    jax.tree.map(lambda a, i=i: a[i], stacked["layers"]) for i in range(2)
  ]
  slope = jax.jit(jax.grad(lambda g, t: row_loss(g, params, layers, t)))
  rows = [slope(gates, t) for t in tokens_NT]
  for u, mask in masks.items():
    expected = np.mean([np.square(r[u]) for r in rows], axis=0) / 2
    scores_LU, half_L = found["scores"][u]
    # A half has one gate, which multiplies all of its units.
    whole = np.mean([np.sum(r[u] * mask, 1) ** 2 for r in rows], axis=0) / 2
    np.testing.assert_allclose(half_L, whole, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(
      np.where(mask, scores_LU, 0),
      np.where(mask, expected, 0),
      rtol=1e-4,
      atol=1e-9,
    )
