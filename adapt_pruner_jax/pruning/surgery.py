"""Which units a model has left, and its arrays cut to them.

`Kept` numbers units as the original model does. Pruning itself works in dense
stacked coordinates, where removed units are only masked: `expand` goes there,
`compact` comes back, `gather` cuts any tree that has parameters in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig

# {"K": one int array a layer, "F": ...}: units left, in the original numbering.
# Of channels in experts there is a row an expert, [X, f].
Kept = dict[str, tuple[np.ndarray, ...]]
# {"K": bool [L, K], "F": bool [L, F], or [L, X, F] as many in each expert}
Masks = dict[str, np.ndarray]


# ---- Sizes and numberings ----------------------------------------------------


def count(full: ModelConfig, masks: Masks) -> int:
  """Parameters of the model that the masks leave."""
  return count_widths(full, widths(masks))


def count_widths(full: ModelConfig, width: Mapping[str, np.ndarray]) -> int:
  """Parameters of the model with these sizes, {"K": [L], "F": [L]}."""
  return model_config.count_params(with_widths(full, width))


def widths(masks: Masks) -> dict[str, np.ndarray]:
  """Units that are left in each module, {"K": int [L], "F": int [L]}."""
  return {
    u: m.sum(axis=-1) if m.ndim == 2 else m[:, 0].sum(axis=-1)
    for u, m in masks.items()
  }


def with_widths(
  config: ModelConfig, width: Mapping[str, np.ndarray]
) -> ModelConfig:
  """The config with these sizes, {"K": [L], "F": [L]}."""
  units = {u: tuple(int(n) for n in width[u]) for u in UNITS}
  return config.with_units(units)


def with_units(config: ModelConfig, keep: Kept) -> ModelConfig:
  """The config of a model that has just these units."""
  width = {u: np.array([x.shape[-1] for x in keep[u]]) for u in UNITS}
  return with_widths(config, width)


def everything(config: ModelConfig) -> Kept:
  """All units of a model."""
  return to_kept(
    {
      u: [np.ones(mask_shape(config, u, n), bool) for n in w]
      for u, w in config.units().items()
    }
  )


def mask_shape(config: ModelConfig, unit: str, width: int) -> tuple[int, ...]:
  """Of a mask of one module."""
  return (config.experts, width) if unit == "F" and config.experts else (width,)


def to_masks(kept: Kept, full: ModelConfig) -> Masks:
  """Kept units as masks over all units of the original model."""
  masks = {
    u: np.zeros((full.num_layers, *mask_shape(full, u, max(w))), bool)
    for u, w in full.units().items()
  }
  for u in UNITS:
    for mask, units in zip(masks[u], kept[u], strict=True):
      np.put_along_axis(mask, units, True, axis=-1)
  return masks


def to_kept(masks: Masks) -> Kept:
  """Inverse of `to_masks`."""

  def units(mask: np.ndarray) -> np.ndarray:
    return np.nonzero(mask)[-1].reshape(*mask.shape[:-1], -1)

  return {u: tuple(map(units, m)) for u, m in masks.items()}


def to_hex(masks: Masks) -> dict[str, list[str]]:
  """Masks as text, a row a layer: eight bits a byte, the first is the highest,
  filled up with zeros."""
  return {
    u: [row.tobytes().hex() for row in np.packbits(m.reshape(len(m), -1), 1)]
    for u, m in masks.items()
  }


def from_hex(rows: Mapping[str, Sequence[str]], full: ModelConfig) -> Masks:
  """Inverse of `to_hex`, of a model with all of its units.

  Raises:
    ValueError: units that the model does not have.
  """
  masks = to_masks(everything(full), full)
  for u, m in masks.items():
    bits = np.zeros((len(m), -(-m[0].size // 8) * 8), np.uint8)
    for i, row in enumerate(rows[u]):
      bits[i] = np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8))
    found = bits[:, : m[0].size].reshape(m.shape).astype(bool)
    if bits.sum() > (found & m).sum() or len(rows[u]) != len(m):
      raise ValueError(f"units {u} that it does not have")
    masks[u] = found
  return masks


def relative_to(kept: Kept, left: Kept) -> Kept:
  """`left` in the numbering of a model that has just the units `kept`."""

  def places(have: np.ndarray, units: np.ndarray) -> np.ndarray:
    if have.ndim == 1:
      return np.searchsorted(have, units)
    each = [np.searchsorted(*pair) for pair in zip(have, units, strict=True)]
    return np.array(each, int)

  return {u: tuple(map(places, kept[u], left[u])) for u in UNITS}


# ---- Arrays ------------------------------------------------------------------


def dense(full: ModelConfig) -> ModelConfig:
  """The config of the stacked coordinates: all layers as wide as the widest.

  Of two kinds of layer, each as the widest of its kind.
  """
  widest = [full.most_groups(full.is_second(i)) for i in range(full.num_layers)]
  F = np.full(full.num_layers, max(full.ffn_widths))
  return with_widths(full, {"K": np.array(widest), "F": F})


def gather(
  config: ModelConfig, tree: Any, keep: Kept, mesh: Mesh
) -> tuple[ModelConfig, Any]:
  """Keeps units of params, or of any tree with params inside (Adam's moments).

  Args:
    config: of the model as it is now.
    tree: its params, or what has them inside.
    keep: units, in the numbering of `config`.
    mesh: where the arrays lie.

  Returns:
    The config of the smaller model, and the smaller tree.
  """
  new = with_units(config, keep)
  # A half without units has no parameters at all, not even its norms.
  names = [set(model_config.layer_names(new, i)) for i in range(new.num_layers)]

  def cut(tree):
    def one(name, layer, leaf):
      if name is None or layer is None:
        return leaf
      return axes.take(name, leaf, {u: keep[u][layer] for u in UNITS})

    return axes.map_named(one, _without(tree, names))

  return new, transform(cut, tree, mesh)


def expand(
  config: ModelConfig,
  params: Params,
  kept: Kept,
  full: ModelConfig,
  mesh: Mesh,
  streamed: bool = False,
) -> Params:
  """Params in dense stacked coordinates: {"layers": {name: [L, ...]}, outer}.

  Inverse of `compact`: removed units are zeros, norms of absent halves ones.
  Of two kinds of layer, each has the parameters of both.

  Args:
    config, params: the model as it is now.
    kept: its units in the numbering of the original.
    full: sizes of the original.
    mesh: where the arrays lie.
    streamed: layers stay in the host's memory, from which programs fetch them
      one by one.
  """
  wide = dense(full)

  def stack(params):
    like = params["embedding"]
    library = np if _on_host(like) else jnp

    def one(name):
      parts = []
      for i in range(config.num_layers):
        at = {u: kept[u][i] for u in UNITS}
        layer = params[axes.layer_name(i)]
        parts.append(_widened(name, layer, at, wide.sizes(0), like))
      return library.stack(parts)

    outer = {n: params[n] for n in model_config.outer_names(config)}
    # One after the other: all parts of all of them would be another model.
    return outer | {
      "layers": {n: one(n) for n in model_config.layer_names(wide)}
    }

  return transform(stack, params, mesh, streamed)


def widen(
  layer: Params,
  at: Mapping[str, np.ndarray],
  wide: ModelConfig,
  like: Any,
  index: int = 0,
) -> Params:
  """One layer in dense coordinates, zero where it has no units.

  Norms of an absent half are ones.

  Args:
    layer: its parameters.
    at: where its units go, {"K": int [k], "F": int [f] or [X, f]}.
    wide: from `dense`.
    like: any array of the same model, for its dtype and its library.
    index: which layer it is.
  """
  return {
    n: _widened(n, layer, at, wide.sizes(index), like)
    for n in model_config.layer_names(wide, index)
  }


def _widened(name, layer, at, sizes, like):
  """A parameter of a layer in dense coordinates, as `widen`."""
  if name in layer:
    return axes.put(name, layer[name], at, sizes)
  fill = 1 if "norm" in name and not name.endswith("bias") else 0
  library = np if _on_host(like) else jnp
  return library.full(axes.shape(name, sizes), fill, like.dtype)


def compact(
  stacked: Params, kept: Kept, full: ModelConfig, mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """The model that dense stacked params and kept units stand for.

  Args:
    stacked: from `expand`.
    kept: units that are left, in the numbering of the original.
    full: sizes of the original.
    mesh: where the arrays lie.
  """
  new = with_units(full, kept)

  def split(stacked):
    params = {n: stacked[n] for n in model_config.outer_names(new)}
    for i in range(new.num_layers):
      at = {u: kept[u][i] for u in UNITS}
      params[axes.layer_name(i)] = {
        n: axes.take(n, stacked["layers"][n][i], at)
        for n in model_config.layer_names(new, i)
      }
    return params

  return new, transform(split, stacked, mesh)


def _without(tree: Any, names: list[set[str]]) -> Any:
  """A tree without the parameters that a smaller model does not have."""

  def one(node: Any) -> Any:
    if not isinstance(node, dict):
      return node
    found = {}
    for key, value in node.items():
      if str(key).startswith("layer_"):
        have = names[int(key.removeprefix("layer_"))]
        found[key] = {n: v for n, v in value.items() if n in have}
      else:
        found[key] = one(value)
    return found

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, dict))


def _on_host(array: Any) -> bool:
  return isinstance(array, np.ndarray)


def transform(
  fn: Callable, tree: Any, mesh: Mesh, streamed: bool = False
) -> Any:
  """`fn` of a tree of arrays, the result where it belongs on the mesh.

  On a CPU in one process numpy does it, which compiles nothing, as it does with
  arrays in the host's memory, where stacked layers stay if `streamed`.
  Elsewhere the gather comes first and the sharding second: a gather with an
  output sharding aborts XLA in jax 0.11.2.
  """
  by_numpy = sharding.with_numpy(mesh) or any(
    _on_host(x) or _streamed(x) for x in jax.tree.leaves(tree)
  )
  if by_numpy:
    made = fn(jax.device_get(tree))
    where = jax.tree.leaves(_shardings(made, mesh, streamed))
    leaves, structure = jax.tree.flatten(made)
    del made  # what is made goes leaf by leaf, as its copy comes
    for number, one in enumerate(where):
      leaves[number] = jax.device_put(leaves[number], one)
    return jax.tree.unflatten(structure, leaves)
  made = jax.jit(fn)(tree)
  return jax.jit(lambda x: x, out_shardings=_shardings(made, mesh))(made)


def _streamed(array: Any) -> bool:
  where = getattr(array, "sharding", None)
  return where is not None and where.memory_kind == placement.HOST


def _shardings(tree: Any, mesh: Mesh, streamed: bool = False) -> Any:
  if not (isinstance(tree, dict) and "layers" in tree):
    return sharding.param_shardings(tree, mesh)
  outer = {n: v for n, v in tree.items() if n != "layers"}
  layers = {
    n: sharding.param_sharding(n, v.shape, mesh, stacked=True)
    for n, v in tree["layers"].items()
  }
  if streamed:
    rank = {n: v.ndim for n, v in tree["layers"].items()}
    layers = {n: placement.streamed(p, rank[n]) for n, p in layers.items()}
  return sharding.param_shardings(outer, mesh) | {"layers": layers}
