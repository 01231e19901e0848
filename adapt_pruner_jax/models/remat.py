"""What the backward pass computes once more, in place of keeping it (remat).

none           nothing
dots           all but products with weights: norms, rotations, attention (and
               these products too of experts and gated delta nets)
attention+mlp  each half of a layer; the streams in front of both are kept
full           each layer; the stream in front of it is kept
offload        each layer; the stream in front of it is kept by the host

In this order less is kept, and more is computed twice or sent.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from adapt_pruner_jax.models.arithmetic import LowRank, project

# Names of what a layer computes: products with the weights that read the
# stream, and the stream in front of the layer and between its halves.
PRODUCT, FRONT, BETWEEN = "product", "in front", "between the halves"

_only = jax.checkpoint_policies.save_only_these_names
_KEPT = {
  "dots": _only(PRODUCT, BETWEEN),
  "attention+mlp": _only(BETWEEN),
  "full": jax.checkpoint_policies.nothing_saveable,
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[FRONT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}
NAMES = ("none", *_KEPT)
ON_DEVICE = NAMES[:-1]  # what `auto` chooses from


def read_by(
  equation: str, h_BTD: jax.Array, weight: jax.Array | LowRank
) -> jax.Array:
  """`project` of what reads the stream, by the name that `dots` keeps."""
  return checkpoint_name(project(equation, h_BTD, weight), PRODUCT)


def options(name: str) -> dict[str, Any]:
  """Arguments of `jax.checkpoint` and `flax.linen.remat`; not of "none"."""
  return {"policy": _KEPT[name]}


def layer(fn: Callable, name: str, scanned: bool = False) -> Callable:
  """A function of one layer whose backward pass recomputes by `name`.

  Args:
    fn: of arrays.
    name: one of `NAMES`.
    scanned: within `jax.lax.scan`, which by itself keeps XLA from merging the
      two computations.
  """
  if name == "none":
    return fn
  return jax.checkpoint(fn, prevent_cse=not scanned, **options(name))
