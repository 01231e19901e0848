"""The same function with layers of one size, by zeros.

Heads and channels are added behind those of each layer. An added channel gives
silu(0) * 0 = 0; an added head averages zero values. Stock classes open it, at
the cost of the largest layer everywhere.
"""

import dataclasses
import math

import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import layers
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.tensors import Key, places
from adapt_pruner_jax.formats.hf.weights import Get, getter
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig, count_params

# PyTorch's products of all experts at once want rows of 16 bytes.
EXPERT_WIDTHS = 8


def pad_config(config: ModelConfig) -> ModelConfig:
  """The smallest config of equal layers that the family's class can hold.

  Raises:
    UserError: there is none; says which format can.
  """
  family = FAMILIES[config.family]
  K, Z = config.most_groups(0), config.most_groups(1)
  F, by_kind = max(config.ffn_widths), layers.groups_by_kind(config)
  if config.experts:
    F = -(-F // EXPERT_WIDTHS) * EXPERT_WIDTHS
  if config.qk_norm == "all" and len({*config.kv_groups}) > 1:
    raise UserError(
      f"{config.family} norms all heads of a layer together, so that added "
      "heads would change the others: write it with --format=hf"
    )
  if not all(map(any, (*by_kind, config.ffn_widths))):
    raise UserError(
      "no layer has attention, or none has an MLP, which stock classes cannot "
      "express: write it with --format=hf"
    )
  G, D = config.queries_per_group, config.hidden_size
  if not layers.heads_are_legal(config, K):
    legal = [k for k in range(K, D + 1) if layers.heads_are_legal(config, k)]
    if not legal:
      raise UserError(
        f"{config.family} wants a number of heads that divides the hidden size "
        f"{D}; {K * G} heads in groups of {G} cannot be padded to one: write "
        "it with --format=hf"
      )
    K = legal[0]
  if config.wide_heads:
    K, Z = _as_many_heads(config, K, Z)
  known = {*family.fields}
  padded = dataclasses.replace(
    config,
    kv_groups=tuple(
      Z if config.is_second(i) else K for i in range(config.num_layers)
    ),
    ffn_widths=(F,) * config.num_layers,
    # A class may have all biases where the model has some; others are zero.
    qkv_bias=config.qkv_bias
    or (
      config.o_bias
      and "attention_out_bias" not in known
      and bool({"attention_bias", "use_bias"} & known)
    ),
    gate_up_bias=config.gate_up_bias
    or (config.down_bias and bool({"mlp_bias", "use_bias"} & known)),
  )
  if extra := layers.extra_biases(padded):
    raise UserError(
      f"{config.family} has no bias in {', '.join(extra)}, but this model has: "
      "write it with --format=hf"
    )
  return padded


def _as_many_heads(config: ModelConfig, *groups: int) -> tuple[int, ...]:
  """KV groups of each kind, padded to the same number of query heads."""
  queries = config.queries_per_group, config.wide_heads.queries_per_group
  step = math.lcm(*queries)
  most = max(n * q for n, q in zip(groups, queries, strict=True))
  heads = -(-most // step) * step
  return tuple(heads // q for q in queries)


def pad(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
  """The model padded to `pad_config`, as numpy arrays."""
  padded = pad_config(config)
  get = padded_getter(config, padded, getter(params))
  tree: Params = {}
  for layer, name in places(padded):
    branch = tree
    if layer is not None:
      branch = tree.setdefault(axes.layer_name(layer), {})
    branch[name] = get((layer, name))
  return padded, tree


def padded_getter(config: ModelConfig, padded: ModelConfig, get: Get) -> Get:
  """Gives the parameters of `padded`, made from those of `config`."""

  def padded_get(key: Key) -> np.ndarray:
    layer, name = key
    array = get(key)
    shape = axes.shape(name, padded.sizes(layer))
    if array is None:  # any norm will do where nothing follows
      is_norm = "norm" in name and not name.endswith("bias")
      fill = 1 - config.norm_offset if is_norm else 0
      return np.full(shape, fill, np.float32)
    more = [(0, new - old) for new, old in zip(shape, array.shape, strict=True)]
    return np.pad(array, more)

  return padded_get


def cost(
  config: ModelConfig, padded: ModelConfig, before: int | None
) -> list[str]:
  """What the padding costs, in words.

  Args:
    before: parameters that the model had before it was pruned, if known.
  """
  params, new = count_params(config), count_params(padded)
  kept, of_all = (sum(layers.groups_by_kind(c)[0]) for c in (config, padded))
  cache = of_all / max(1, kept)
  heads = padded.most_groups(0) * padded.queries_per_group
  notes = [
    f"padded to {heads} heads and MLP width {padded.ffn_widths[0]} in all "
    f"{padded.num_layers} layers: {new:,} parameters, {new / params:.2f} times "
    f"those of the pruned model; KV cache {cache:.2f} times"
  ]
  if before and new >= before:
    notes.append(
      "nothing is gained by hf_uniform: the padded model is as large as the "
      "one before pruning"
    )
  return notes
