"""The decoder as Flax modules, which own the parameters.

A model is always the pair `(ModelConfig, params)`. Layers may differ in their
number of KV groups K and MLP width F; everything else is shared. Parameters are
a plain dict: {"embedding", "layer_0": {...}, ..., "final_norm", "lm_head"},
with the dims given by `axes.AXES`. Arithmetic is done in the dtype of the
parameters, norms, rotary angles, softmax and logits in float32.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from adapt_pruner_jax.models import axes, experts, layer, remat, told
from adapt_pruner_jax.models.arithmetic import XIELU, project, soft_cap
from adapt_pruner_jax.models.attention import AttentionInputs
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.kernels import AUTO, Kernel
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  outer_names,
)


def init_params(
  config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> Params:
  """Random parameters: matrices N(0, 0.02), norms one, biases zero.

  Args:
    config: of the model.
    key: what is drawn depends on it and on the names of parameters.
    dtype: of the parameters; they are drawn in float32.

  Returns:
    The tree of `model_config.param_shapes`.
  """
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(Decoder(config).init)
  params = init(key, tokens)["params"]
  return jax.tree.map(lambda x: x.astype(dtype), params)


class Block(nn.Module):
  """The parameters of one decoder layer; `layer.run_layer` runs it.

  Attributes:
    config: of the model.
    index: which of its layers.
  """

  config: ModelConfig
  index: int

  def setup(self) -> None:
    c = self.config
    sizes = c.sizes(self.index)
    self.weight = {
      name: self.param(name, _initializer(name, c), axes.shape(name, sizes))
      for name in layer_names(c, self.index)
    }

  def __call__(
    self,
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    counts_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, experts.Load | None]:
    """The residual stream behind this layer, and how its experts are loaded.

    Args:
      x_BTD: the stream in front of it.
      inputs: who sees whom.
      counts_BT: tokens that count for the load; None = it is not asked for.
    """
    x_BTD, tap = self.step(x_BTD, inputs)
    return x_BTD, experts.load(tap.fed["F"], counts_BT)

  def step(
    self,
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    cache: layer.Cache | None = None,
  ) -> tuple[jax.Array, layer.Tap]:
    """As `layer.run_layer`, of this layer."""
    c, place = self.config, layer.place(self.config, self.index)
    args = dict(self.weight), place, inputs, x_BTD
    return layer.run_layer(c, *args, cache=cache)


class Decoder(nn.Module):
  """The whole model; `layer_0` ... `layer_{L-1}` may differ in K and F."""

  config: ModelConfig
  recomputed: str = "none"  # in the backward pass; as of `remat`
  kernel: Kernel = AUTO  # of attention, in a call of the whole model

  def setup(self) -> None:
    c = self.config
    self.weight = {
      name: self.param(name, _initializer(name, c), axes.shape(name, c.sizes()))
      for name in outer_names(c)
    }
    block = Block
    if self.recomputed != "none":
      block = nn.remat(Block, **remat.options(self.recomputed))
    self.layer = [block(c, i) for i in range(c.num_layers)]

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream in front of the first layer, [B, T, D].

    Args:
      tokens_BT: int token ids.
    """
    x_BTD = self.weight["embedding"][tokens_BT]
    scale = self.config.embed_scale
    if scale != 1:
      x_BTD *= jnp.asarray(scale, x_BTD.dtype)
    rows_BTR = self.weight["told"][tokens_BT] if self.config.told else None
    return told.in_front(self.config, self.weight, rows_BTR, x_BTD)

  def normed(self, x_BTD: jax.Array) -> jax.Array:
    """The stream behind the final norm, which `head_matrix` multiplies.

    Args:
      x_BTD: the residual stream behind the last layer.
    """
    x_BTD = layer.stream(self.config, x_BTD)
    x_BTD = layer.norm(self.config, self.weight, "final_norm", x_BTD)
    if self.config.head_bias:
      one_BTC = jnp.ones((*x_BTD.shape[:-1], 1), x_BTD.dtype)
      x_BTD = jnp.concatenate([x_BTD, one_BTC], axis=-1)
    return x_BTD

  def head(self, x_BTD: jax.Array) -> jax.Array:
    """Logits, float32 [B, T, V].

    Args:
      x_BTD: the residual stream behind the last layer.
    """
    c = self.config
    matrix = head_matrix(c, self.weight)
    return finish(c, product(c, matrix, self.normed(x_BTD)))

  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Logits, and the residual stream around each layer.

    Args:
      tokens_BT: int token ids.
      segments_BT: document numbers of packed rows; None = one document a row.
      positions_BT: position of each token in its document; default 0, 1, ....

    Returns:
      Logits, float32 [B, T, V]; and L + 1 arrays [B, T, D].
    """
    inputs = self._inputs(tokens_BT.shape[1], segments_BT, positions_BT)
    stream = [self.embed(tokens_BT)]
    for block in self.layer:
      stream.append(block(stream[-1], inputs)[0])
    return self.head(stream[-1]), stream

  def hidden(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
  ) -> jax.Array:
    """The stream behind the final norm, [B, T, D].

    Args:
      x_BTD: the residual stream in front of the first layer.
      segments_BT, positions_BT: as in a call of the whole model.
    """
    return self.loaded(x_BTD, segments_BT, positions_BT)[0]

  def loaded(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    counts_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, experts.Load | None]:
    """`hidden`, and how all experts are loaded.

    Args:
      x_BTD, segments_BT, positions_BT: as of `hidden`.
      counts_BT: tokens that count for the load; None = it is not asked for.
    """
    inputs = self._inputs(x_BTD.shape[1], segments_BT, positions_BT)
    load = None
    for block in self.layer:
      x_BTD, more = block(x_BTD, inputs, counts_BT)
      load = experts.add(load, more)
    return self.normed(x_BTD), load

  def _inputs(self, length, segments_BT, positions_BT) -> AttentionInputs:
    if positions_BT is None:
      positions_BT = length
    return layer.attention_inputs(
      self.config, positions_BT, segments_BT, self.kernel
    )

  def residual(
    self,
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    caches: Sequence[layer.Cache | None] | None = None,
  ) -> tuple[jax.Array, list[layer.Cache | None]]:
    """The residual stream behind the last layer, and what a cache holds.

    Args:
      x_BTD: the residual stream in front of the first layer.
      inputs: who sees whom; with `caches`, `cached` and `column` are of these.
      caches: keys and values of each layer, which the new ones are written
        into; None = the tokens see each other only.

    Returns:
      [B, T, D]; and the keys and values [B, S, K, H] of each layer, None of one
      without attention.
    """
    found = []
    for i, block in enumerate(self.layer):
      x_BTD, tap = block.step(x_BTD, inputs, caches and caches[i])
      found.append(tap.cache)
    return x_BTD, found


def output_name(config: ModelConfig) -> str:
  """Which parameter is the output matrix."""
  return "embedding" if config.tied else "lm_head"


def head_matrix(config: ModelConfig, params: Params) -> jax.Array:
  """The output matrix: [V, D] tied, else [D, V].

  Its bias is one channel more of D, whose input `Decoder.normed` has beside
  the stream, so that losses need not know of it.

  Args:
    config: of the model.
    params: the whole tree, or what is outside the layers.
  """
  matrix = params[output_name(config)]
  if not config.head_bias:
    return matrix
  axis = 1 if config.tied else 0
  bias = jnp.expand_dims(params["lm_head_bias"], axis)
  return jnp.concatenate([matrix, bias.astype(matrix.dtype)], axis)


def output_equation(config: ModelConfig) -> str:
  """The product with it, as of `arithmetic.project`."""
  return "btd,vd->btv" if config.tied else "btd,dv->btv"


def product(
  config: ModelConfig, matrix: jax.Array, x_BTD: jax.Array
) -> jax.Array:
  """The stream behind the final norm times the output matrix, float32."""
  return project(output_equation(config), x_BTD, matrix, jnp.float32)


def finish(config: ModelConfig, raw_BTV: jax.Array) -> jax.Array:
  """Logits, scaled and capped, of `product`."""
  if config.logit_scale != 1:
    raw_BTV *= config.logit_scale
  return soft_cap(raw_BTV, config.final_softcap)


def _initializer(name: str, config: ModelConfig):
  if name.endswith("bias"):
    return nn.initializers.zeros
  if name == "delta_norm" or name.endswith("_scale"):
    return nn.initializers.ones
  if name in XIELU:
    return nn.initializers.constant(XIELU[name])
  if "norm" in name:
    return nn.initializers.constant(1.0 - config.norm_offset)
  return nn.initializers.normal(0.02)
