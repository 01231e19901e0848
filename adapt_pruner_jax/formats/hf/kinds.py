"""Two kinds of layer in config.json: attention, and gated delta nets.

`layer_types` names the kind of each layer. The sizes of delta nets are fields
of their own; key and value heads may differ from layer to layer.
"""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import (
  FULL,
  Raw,
  by_period,
  layer_kinds,
  require,
)
from adapt_pruner_jax.models.model_config import DeltaNet, ModelConfig

LINEAR = "linear_attention"
KEYS, VALUES = SIZES = ("linear_num_key_heads", "linear_num_value_heads")
# Fields of config.json, and what we call them.
DIMS = {
  "linear_key_head_dim": "key_dim",
  "linear_value_head_dim": "value_dim",
  "linear_conv_kernel_dim": "taps",
}
MOST = 2**31 - 1


def read(raw: Raw, family: Family, L: int, path: str) -> tuple[int, ...]:
  """1 for each layer with a gated delta net; () in a family without.

  Raises:
    UserError: other kinds of layer, or kinds of fewer layers than there are.
  """
  if not family.delta:
    return ()
  kinds = raw["layer_types"]
  if kinds is None:
    name = "full_attention_interval"
    linear = by_period(raw[name], name, L, path)
    kinds = [LINEAR if here else FULL for here in linear]
  kinds = layer_kinds(kinds, (FULL, LINEAR), L, path)
  return tuple(int(kind == LINEAR) for kind in kinds)


def read_net(raw: Raw, family: Family, path: str) -> DeltaNet | None:
  """The sizes that all delta nets have in common.

  Raises:
    UserError: a size that is impossible.
  """
  if not family.delta:
    return None
  for name in (*DIMS, *SIZES):
    require(raw[name], (int,), name, path)
    if not 1 <= raw[name] <= MOST:
      raise UserError(f"{path}: {name}={raw[name]} must be from 1 to {MOST:,}")
  keys, values = raw[KEYS], raw[VALUES]
  if values % keys:
    raise UserError(
      f"{path}: {values} value heads on {keys} key heads ({VALUES}, {KEYS}); "
      "each key head must serve the same number of value heads"
    )
  dims = {ours: raw[theirs] for theirs, ours in DIMS.items()}
  return DeltaNet(values_per_key=values // keys, **dims)


def check(
  layers: list[dict[str, int]],
  delta: tuple[int, ...],
  net: DeltaNet | None,
  path: str,
) -> None:
  """Raises a UserError unless all delta nets have as many values a key."""
  for i, here in enumerate(delta):
    keys, values = layers[i].get(KEYS, 0), layers[i].get(VALUES, 0)
    if here and values != keys * net.values_per_key:
      raise UserError(
        f"{path}: layer {i} has {values} value heads on {keys} key heads; each "
        f"key head must serve {net.values_per_key}, as in the whole model"
      )


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The family's fields of these, but for numbers of heads."""
  if not family.delta:
    return {}
  kinds = config.delta or (0,) * config.num_layers
  dims = {name: getattr(config.delta_net, own) for name, own in DIMS.items()}
  return dims | {"layer_types": [LINEAR if here else FULL for here in kinds]}


def sizes(config: ModelConfig, groups: int) -> dict[str, int]:
  """Heads of a delta net with so many key heads."""
  return {KEYS: groups, VALUES: groups * config.delta_net.values_per_key}
