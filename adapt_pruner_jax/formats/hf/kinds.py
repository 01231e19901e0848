"""Two kinds of layer in config.json, which `layer_types` names.

One is attention, the other a gated delta net, or attention with heads of
another size. The sizes of delta nets are fields of their own; key and value
heads may differ from layer to layer.
"""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import (
  FULL,
  NONE,
  SLIDING,
  Raw,
  by_period,
  layer_kinds,
  require,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.second_kinds import DeltaNet

LINEAR = "linear_attention"
KEYS, VALUES = SIZES = ("linear_num_key_heads", "linear_num_value_heads")
# Fields of config.json, and what we call them.
DIMS = {
  "linear_key_head_dim": "key_dim",
  "linear_value_head_dim": "value_dim",
  "linear_conv_kernel_dim": "taps",
}
MOST = 2**31 - 1
BY_LAYER, HEAD_DIM = "per_layer_config", "head_dim"
GROUPS = "num_key_value_heads"
# Of layers with wide heads, in as far as they are not in `per_layer_config`.
WIDE_DIM, WIDE_GROUPS = "global_head_dim", "num_global_key_value_heads"
K_IS_V = "attention_k_eq_v"  # in those layers


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
  if family.wide:
    return {K_IS_V: not config.wide_heads.has_v}
  if not family.delta:
    return {}
  kinds = config.delta or (0,) * config.num_layers
  dims = {name: getattr(config.delta_net, own) for name, own in DIMS.items()}
  return dims | {"layer_types": [LINEAR if here else FULL for here in kinds]}


def sizes(config: ModelConfig, groups: int) -> dict[str, int]:
  """Heads of a delta net with so many key heads."""
  return {KEYS: groups, VALUES: groups * config.delta_net.values_per_key}


# ---- Heads of another size ---------------------------------------------------


def with_wide(raw: Raw, family: Family, path: str) -> Raw:
  """The fields with a kind for each layer, and their sizes in each.

  As `Gemma4TextConfig` does it: the last layer is of the wide kind whatever the
  file says, and `per_layer_config` wins over the fields of the whole model.

  Raises:
    UserError: `layer_types` names others, or fewer; or just one kind.
  """
  if not family.wide:
    return raw
  L, kinds = raw["num_hidden_layers"], raw["layer_types"]
  require(L, (int,), "num_hidden_layers", path)
  if kinds is None:
    kinds = [SLIDING if (i + 1) % family.period else FULL for i in range(L)]
  kinds = [*layer_kinds(kinds, (FULL, SLIDING), L, path)[:-1], FULL]
  if SLIDING not in kinds:
    raise UserError(
      f"{path}: all layers are of the kind {FULL}; {family.module} models are "
      f"supported with layers of the kind {SLIDING} among them"
    )
  raw = {**raw, "layer_types": kinds}
  if raw.get(BY_LAYER) is None:
    sizes = {HEAD_DIM: raw[WIDE_DIM]}
    require(raw[K_IS_V], (bool,), K_IS_V, path)
    require(raw[WIDE_GROUPS], (int, NONE), WIDE_GROUPS, path)
    if raw[K_IS_V] and raw[WIDE_GROUPS] is not None:
      sizes[GROUPS] = raw[WIDE_GROUPS]
    raw[BY_LAYER] = {i: sizes for i, kind in enumerate(kinds) if kind == FULL}
  return raw


def read_wide(
  raw: Raw, family: Family, layers: list[dict[str, int]], path: str
) -> tuple[int, ...]:
  """1 for each layer of the wide kind; () in a family without.

  Args:
    raw: from `with_wide`.
    layers: the sizes of each.

  Raises:
    UserError: layers of a kind have heads of several sizes.
  """
  if not family.wide:
    return ()
  wide = tuple(int(kind == FULL) for kind in raw["layer_types"])
  for i, layer in enumerate(layers):
    same = layers[wide.index(wide[i])][HEAD_DIM]
    if not layer[HEAD_DIM] == same >= 1:
      raise UserError(
        f"{path}: layer {i} has heads of {layer[HEAD_DIM]} channels, and the "
        f"first one of its kind, {raw['layer_types'][i]}, of {same}; they must "
        "be as large, and at least 1"
      )
  return wide


def write_wide(config: ModelConfig) -> dict[str, Any]:
  """Sizes of the wide layers of a model that is even, in both spellings."""
  if not config.wide_heads:
    return {}
  sizes = {
    HEAD_DIM: config.wide_heads.head_dim,
    GROUPS: config.most_groups(1),
  }
  return {
    WIDE_DIM: sizes[HEAD_DIM],
    WIDE_GROUPS: sizes[GROUPS],
    BY_LAYER: {str(i): sizes for i, here in enumerate(config.wide) if here},
  }
