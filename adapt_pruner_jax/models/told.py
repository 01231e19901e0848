"""What each layer is told of a token, which rides in front of the stream.

Gemma 4 E2B and E4B have an embedding with a part for each layer. Layers take
theirs from the front of what is carried, so that nothing else hands it on.
"""

import jax
import jax.numpy as jnp

from adapt_pruner_jax.models.arithmetic import project, rms_norm
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig


def in_front(
  config: ModelConfig, outer: Params, rows_BTR: jax.Array, x_BTD: jax.Array
) -> jax.Array:
  """The stream with what it carries in front, keys and values not yet.

  Args:
    config: of the model.
    outer: the parameters outside the layers.
    rows_BTR: the tokens' rows of `told`, in `outer`.
    x_BTD: the embedded tokens, scaled.

  Returns:
    [B, T, C + D], where C is the sum of `ModelConfig.carried`.
  """
  parts, dtype = [x_BTD], x_BTD.dtype
  told, *kept = config.carried()
  if told:
    split = lambda x: x.reshape(*x.shape[:2], config.told_layers, config.told)
    said_BTLI = split(project("btd,dr->btr", x_BTD, outer["told_proj"]))
    said_BTLI *= jnp.asarray(config.hidden_size**-0.5, dtype)
    eps, offset = config.norm_eps, config.norm_offset
    said_BTLI = rms_norm(said_BTLI, outer["told_norm"], eps, offset)
    rows_BTLI = split(rows_BTR) * jnp.asarray(config.told**0.5, dtype)
    both_BTLI = (said_BTLI + rows_BTLI) * jnp.asarray(0.5**0.5, dtype)
    parts = [both_BTLI.reshape(rows_BTR.shape), *parts]
  if sum(kept):
    zeros_BTC = jnp.zeros((*x_BTD.shape[:2], sum(kept)), dtype)
    parts.insert(-1, zeros_BTC)
  return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else x_BTD
