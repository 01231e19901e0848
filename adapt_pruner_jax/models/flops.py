"""FLOPs of a model: matrices and attention, not the embedding's look-up."""

import math

from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig


def forward_flops(config: ModelConfig, seq_len: int) -> tuple[float, float]:
  """FLOPs of one token forward: (all layers, the output matrix).

  Args:
    seq_len: tokens of its row; attention counts all of them, as usual of MFU,
      also those behind it and outside of a window.
  """
  matrix = config.vocab_size * config.hidden_size
  looked_up = config.vocab_size * config.told * config.told_layers
  outside = matrix * (1 if config.tied else 2) + looked_up
  inside = model_config.count_params(config) - outside - _not_asked(config)
  mixing = sum(
    groups * of_group(config, layer, seq_len)
    for layer, groups in enumerate(config.kv_groups)
  )
  return 2.0 * inside + mixing, 2.0 * matrix


def of_group(config: ModelConfig, layer: int, seen: float) -> float:
  """FLOPs of a token in a KV group, beside those of its matrices.

  Args:
    layer: which one; of a gated delta net, memories are read twice and written.
    seen: tokens that an attention sees.
  """
  if config.is_delta(layer):
    net = config.delta_net
    return 6 * net.values_per_key * net.key_dim * net.value_dim
  return 4 * math.prod(config.group(layer)) * seen  # q k^T and a v


def _not_asked(config: ModelConfig) -> float:
  """Parameters of the experts that a token is not sent to."""
  if not config.experts:
    return 0
  share = 1 - config.experts_per_token / config.experts
  return (
    3 * config.hidden_size * config.experts * sum(config.ffn_widths) * share
  )


def training_flops(
  config: ModelConfig,
  seq_len: int,
  teacher: ModelConfig | None = None,
  frozen: bool = False,
) -> float:
  """FLOPs of training on one token: a backward is twice a forward.

  What rematerialisation repeats does not count, as in the definition of MFU.

  Args:
    teacher: a model that runs beside, forward; None = none does.
    frozen: adapters alone are trained: the weights get no gradients.
  """
  whole = (2 if frozen else 3) * sum(forward_flops(config, seq_len))
  return whole + (sum(forward_flops(teacher, seq_len)) if teacher else 0)
