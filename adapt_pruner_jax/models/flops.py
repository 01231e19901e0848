"""FLOPs of a model: matrices and attention, not the embedding's look-up."""

from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig


def forward_flops(config: ModelConfig, seq_len: int) -> tuple[float, float]:
  """FLOPs of one token forward: (all layers, the output matrix).

  Args:
    seq_len: tokens of its row; half of them are before it, on average.
  """
  matrix = config.vocab_size * config.hidden_size
  outside = matrix * (1 if config.tied else 2)
  inside = model_config.count_params(config) - outside - _not_asked(config)
  scores = (
    2
    * seq_len
    * config.head_dim
    * config.queries_per_group
    * sum(config.kv_groups)
  )  # q k^T and a v
  return 2.0 * (inside + scores), 2.0 * matrix


def _not_asked(config: ModelConfig) -> float:
  """Parameters of the experts that a token is not sent to."""
  if not config.experts:
    return 0
  share = 1 - config.experts_per_token / config.experts
  return (
    3 * config.hidden_size * config.experts * sum(config.ffn_widths) * share
  )


def training_flops(config: ModelConfig, seq_len: int) -> float:
  """FLOPs of training on one token: a backward is twice a forward."""
  return 3 * sum(forward_flops(config, seq_len))
