"""What a target is counted in: parameters, FLOPs, bytes of a file, of a cache.

params    as everywhere; a tied output matrix once
flops     of one token behind `prune.budget_context` - 1 others, whose keys and
          values are in the cache; the embedding's look-up is none
bytes     of the weights in an export of `prune.budget_export`: safetensors in
          f32, f16 or bf16, or a gguf in q8_0
kv_bytes  of the keys and values of `prune.budget_batch` sequences of
          `prune.budget_context` tokens, two bytes a number

Each is a sum over units and what has none, so that a unit has a cost. In q8_0
rows come in blocks of 32 numbers: MLP widths then become multiples of 32
(`Prune.rounding`).
"""

import math
from collections.abc import Mapping

import jax
import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig

BYTES = {"f32": 4, "f16": 2, "bf16": 2}
BLOCK, BLOCK_BYTES = 32, 34  # of q8_0: 32 numbers and a scale
CACHED = 2  # bytes of a number in the cache
UNIT = {"params": "parameters", "flops": "FLOPs", "bytes": "bytes"}
UNIT["kv_bytes"] = "bytes of cache"


def count(config: ModelConfig, settings: Prune) -> int:
  """How much of the budget a model takes, in the budget's unit."""
  if settings.budget == "flops":
    seen_L = _seen(config, settings)
    heads_L = np.array(config.kv_groups) * config.queries_per_group
    scores = 4 * config.head_dim * int((heads_L * seen_L).sum())
    looked_up = 0 if config.tied else config.vocab_size * config.hidden_size
    return 2 * (model_config.count_params(config) - looked_up) + scores
  if settings.budget == "kv_bytes":
    numbers = 2 * config.head_dim * np.array(config.kv_groups)
    tokens = int((numbers * _seen(config, settings)).sum())
    return CACHED * settings.budget_batch * tokens
  if settings.budget == "bytes" and settings.budget_export == "q8_0":
    return _q8_bytes(config)
  size = model_config.count_params(config)
  return size * (
    BYTES[settings.budget_export] if settings.budget == "bytes" else 1
  )


def of_widths(
  full: ModelConfig, width: Mapping[str, np.ndarray], settings: Prune
) -> int:
  """`count` of the model with these sizes, {"K": [L], "F": [L]}."""
  units = {u: tuple(int(n) for n in width[u]) for u in UNITS}
  return count(full.with_units(units), settings)


def unit_cost(config: ModelConfig, settings: Prune) -> dict[str, np.ndarray]:
  """How much goes with a unit of each layer, {"K": int [L], "F": int [L]}."""
  if settings.budget == "params":
    cost = model_config.unit_cost(config)
    return {u: np.full(config.num_layers, cost[u]) for u in UNITS}
  found = {}
  for u in UNITS:
    step = BLOCK if u == "F" else 1  # whole blocks, where there are blocks
    one = _uniform(config, {u: 1 * step})
    two = _uniform(config, {u: 2 * step})
    found[u] = np.array(
      [
        (_only(two, i, settings) - _only(one, i, settings)) // step
        for i in range(config.num_layers)
      ]
    )
  return found


def _uniform(config: ModelConfig, width: Mapping[str, int]) -> ModelConfig:
  """The model with this many units in each layer, one block of the others."""
  width = {"K": 1, "F": BLOCK} | width
  return config.with_units({u: (width[u],) * config.num_layers for u in UNITS})


def _only(config: ModelConfig, layer: int, settings: Prune) -> int:
  """`count` of one layer."""
  return count(config.with_layers([layer]), settings)


def _seen(config: ModelConfig, settings: Prune) -> np.ndarray:
  """Tokens that a layer's attention sees at the context, int [L]."""
  context = settings.budget_context
  window = config.window or (0,) * config.num_layers
  return np.array([min(w or context, context) for w in window], np.int64)


def _q8_bytes(config: ModelConfig) -> int:
  """Bytes of the tensors of a gguf in q8_0.

  As our writer and llama.cpp's: vectors stay float32, and matrices whose rows
  are no multiple of 32 float16.
  """
  shapes = jax.tree.map(
    np.array,
    model_config.param_shapes(config),
    is_leaf=lambda shape: isinstance(shape, tuple),
  )
  return sum(jax.tree.leaves(axes.map_named(_q8_tensor, shapes)))


def _q8_tensor(name: str, _: int | None, shape: np.ndarray) -> int:
  size, letters = math.prod(shape.tolist()), axes.AXES[name]
  if "norm" in name or "bias" in name:
    return 4 * size
  # A row holds the inputs of a neuron, or the embedding of a token.
  inputs = {"o": "KGH", "embedding": "D"}.get(name, letters[0])
  row = math.prod(
    int(n) for x, n in zip(letters, shape, strict=True) if x in inputs
  )
  return 2 * size if row % BLOCK else size // BLOCK * BLOCK_BYTES
