"""Sizes of the second kind of layer that a model may have."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeltaNet:
  """Sizes of gated delta nets, which they have in common."""

  values_per_key: int  # value heads on each key head
  key_dim: int  # channels of a key
  value_dim: int  # channels of a value
  taps: int  # of the convolutions


@dataclasses.dataclass(frozen=True)
class WideHeads:
  """Sizes of attention in layers whose heads have a size of their own."""

  queries_per_group: int
  head_dim: int
  has_v: bool = True  # else values are made as keys, and not rotated
