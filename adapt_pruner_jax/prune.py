"""Adapt-Pruner: scores and a schedule decide which units stay (2502.03460).

Within a stage units are only masked, in dense stacked coordinates, so that one
executable scores every step of every stage; at its end the kept units are
gathered into a smaller model. `Kept` numbers units as the original model does.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax import axes, importance, model, sharding, sparsity
from adapt_pruner_jax.axes import UNITS, Params
from adapt_pruner_jax.config import Prune, layer_range
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.model import ModelConfig
from adapt_pruner_jax.sparsity import Modules

# {"K": one int array a layer, "F": ...}: units left, in the original numbering.
Kept = dict[str, tuple[np.ndarray, ...]]
Masks = dict[str, np.ndarray]  # {"K": bool [L, K], "F": bool [L, F]}
Removal = tuple[str, int, int]  # unit letter, layer, how many units
# Calibration tokens of a pruning step (from 0), int32 [N, T].
Samples = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
  """A smaller model, and how it came about."""

  config: ModelConfig
  params: Params
  kept: Kept
  trace: list[dict]  # a JSON-able record a step, see `record`


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One pruning step; `masks`, `sparsity` and `number` are all it leaves."""

  number: int  # from 1
  masks: Masks
  sparsity: Modules
  params: int  # after it
  losses_M: np.ndarray | None = None
  importance_L: np.ndarray | None = None  # summed over minibatches
  relative: Modules | None = None
  scores: dict[str, np.ndarray] | None = None  # before the removal


# ---- A stage -----------------------------------------------------------------


def prune(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  *,
  target: int | None = None,
  batch: int = 32,
  mesh: Mesh | None = None,
  full: ModelConfig | None = None,
  kept: Kept | None = None,
  seed: int = 0,
  after: Step | None = None,
  log: Callable[[dict, Step], None] | None = None,
) -> Pruned:
  """Prunes a model to `target` parameters, or for `settings.max_steps` steps.

  Args:
    config, params: the model as it is now.
    settings: the recipe; the target in it is not read.
    samples: gives the calibration tokens of each step.
    target: parameters to keep; None = no target.
    batch: calibration sequences at a time.
    mesh: devices; default one.
    full: sizes of the original model, if this one has been pruned before.
    kept: which of its units are left.
    seed: of random scores.
    after: the last step that an interrupted call has done.
    log: called with `record(step)` and the step, after each.

  Raises:
    UserError: a bad layer range, a target out of reach, or a model whose
      values are not finite.
  """
  full, kept = full or config, kept or everything(config)
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  trace = []
  masks = to_masks(kept, full) if after is None else after.masks
  for step in steps(
    config,
    params,
    settings,
    samples,
    target,
    batch,
    mesh,
    full,
    kept,
    seed,
    after,
  ):
    trace.append(record(step))
    masks = step.masks
    if log is not None:
      log(trace[-1], step)
  left = to_kept(masks)
  config, params = gather(config, params, relative_to(kept, left), mesh)
  return Pruned(config, params, left, trace)


def steps(
  config: ModelConfig,
  params: Params,
  settings: Prune,
  samples: Samples,
  target: int | None,
  batch: int,
  mesh: Mesh,
  full: ModelConfig,
  kept: Kept,
  seed: int,
  after: Step | None = None,
) -> Iterator[Step]:
  """The steps of `prune`, one by one; the model itself does not change."""
  dense_config = dense(full)
  stacked = expand(config, params, kept, full, mesh)
  prunable = prunable_modules(full, settings)
  initial = widths(to_masks(kept, full))
  if after is None:
    zeros = {u: np.zeros(full.L) for u in UNITS}
    size = model.count_params(config)
    after = Step(0, to_masks(kept, full), zeros, size)
  last_change, patience = after.number, math.ceil(1 / settings.step_size) + 1
  while not _done(after, settings, target):
    number = after.number + 1
    tokens_MBT, valid_MB = minibatches(samples(number - 1), batch, mesh)
    found = importance.measure_step(
      dense_config,
      stacked,
      replicate(after.masks, mesh),
      tokens_MBT,
      valid_MB,
      kind=settings.group_importance,
      measure=settings.layer_importance,
      mesh=mesh,
    )
    found = jax.device_get(found)
    importance_L = np.asarray(found["importance_ML"], np.float64).sum(0)
    if not np.isfinite(importance_L).all():
      raise UserError(
        f"the model's values at pruning step {number} are not finite: try "
        "--config.model.dtype=float32"
      )
    relative = sparsity.relative_importance(importance_L, prunable)
    wanted = sparsity.next_sparsity(
      after.sparsity, relative, number, settings.step_size, settings.amplitude
    )
    wanted = {u: np.where(prunable[u], s, 0.0) for u, s in wanted.items()}
    scores = scores_of(found, after.masks, settings, seed, number)
    counts = _counts(
      full, settings, prunable, initial, after.masks, wanted, target
    )
    masks = remove(after.masks, ranking(scores, after.masks), counts)
    size = count(full, masks)
    if size < after.params:
      last_change = number
    after = Step(
      number,
      masks,
      wanted,
      size,
      found["loss_M"],
      importance_L,
      relative,
      scores,
    )
    yield after
    if number - last_change >= patience and target is not None:
      raise UserError(
        f"pruning stopped at {size:,} parameters, above the target {target:,}: "
        f"{patience} steps in a row removed nothing; lower "
        "--config.prune.amplitude or prune more layers"
      )


def record(step: Step) -> dict:
  """A line of trace.jsonl; what a method does not measure (NaN) is None."""

  def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

  width = widths(step.masks)
  return {
    "step": step.number,
    "loss": number(np.mean(step.losses_M)),
    "params": int(step.params),
    "layers": [
      {
        "kv_groups": int(width["K"][i]),
        "ffn": int(width["F"][i]),
        "importance": number(step.importance_L[i]),
        "attn_importance": number(step.relative["K"][i]),
        "mlp_importance": number(step.relative["F"][i]),
        "attn_sparsity": float(step.sparsity["K"][i]),
        "mlp_sparsity": float(step.sparsity["F"][i]),
      }
      for i in range(len(width["K"]))
    ],
  }


def _done(step: Step, settings: Prune, target: int | None) -> bool:
  if settings.max_steps and step.number >= settings.max_steps:
    return True
  if target is None:
    return False
  # The authors stop strictly below the target, and never trim.
  return step.params <= target if settings.trim else step.params < target


def scores_of(
  found: dict, masks: Masks, settings: Prune, seed: int, number: int
) -> dict[str, np.ndarray]:
  """Scores of the units at step `number`, from `importance.measure_step`."""
  kind = settings.group_importance
  if kind == "random":
    random = np.random.default_rng((seed % 2**32, number))
    return {u: random.random(mask.shape) for u, mask in masks.items()}
  return importance.group_scores(
    found["salience"], masks, kind, settings.gqa_fold
  )


def _counts(
  full: ModelConfig,
  settings: Prune,
  prunable: Masks,
  initial: dict[str, np.ndarray],
  masks: Masks,
  wanted: Modules,
  target: int | None,
) -> dict[str, np.ndarray]:
  """Units to remove from each module, {"K": int [L], "F": ...}."""
  group = {"K": full.H, "F": 1}
  round_to = {"K": 1, "F": settings.round_ffn_to}
  counts = {
    u: sparsity.removals(
      initial[u],
      widths(masks)[u],
      np.where(prunable[u], wanted[u], np.nan),
      group[u],
      round_to[u],
    )
    for u in UNITS
  }
  if target is None or not settings.trim:
    return counts
  return trim(full, masks, counts, prunable, target, round_to["F"])


# ---- Which units go ----------------------------------------------------------


def ranking(scores: Mapping[str, np.ndarray], masks: Masks) -> dict[str, list]:
  """Units left in each module, lowest score first (ties: lowest index)."""
  return {
    u: [
      np.flatnonzero(m)[np.argsort(s[m], kind="stable")]
      for s, m in zip(scores[u], masks[u], strict=True)
    ]
    for u in UNITS
  }


def remove(
  masks: Masks, order: dict[str, list], counts: Mapping[str, np.ndarray]
) -> Masks:
  """Masks without the first `counts` units of each module's `order`."""
  masks = {u: m.copy() for u, m in masks.items()}
  for u in UNITS:
    for mask, units, n in zip(masks[u], order[u], counts[u], strict=True):
      mask[units[:n]] = False
  return masks


def trim(
  full: ModelConfig,
  masks: Masks,
  counts: Mapping[str, np.ndarray],
  prunable: Masks,
  target: int,
  round_to: int = 1,
) -> dict[str, np.ndarray]:
  """Fewer removals, so that the size ends at the target or just below it.

  Modules give up what they planned in proportion. The result is not above the
  target, and within one MLP channel (a block of `round_to`) of it as long as
  there are channels, else within one KV group: channels that were not planned
  go in place of a KV group too much. Counts that do not reach the target stay.

  Args:
    counts: units that the step would remove, {"K": int [L], "F": ...}.
    prunable: modules from which more may be taken, bool [L] each.
  """
  cost = model.unit_cost(full)
  width = widths(masks)["F"]
  need = count(full, masks) - target
  planned = _in_turn(counts, width, round_to)
  enough = _until(planned, need, cost)
  if need <= 0 or enough is None:
    return dict(counts)
  groups = [r for r in enough if r[0] == "K"]

  def with_groups(number: int) -> list[Removal] | None:
    channels = itertools.chain(
      (r for r in planned if r[0] == "F"),
      _more_channels(width - counts["F"], prunable["F"], round_to),
    )
    found = _until(channels, need - number * cost["K"], cost)
    return None if found is None else groups[:number] + found

  chosen = with_groups(len(groups))
  if len(groups) * cost["K"] - need >= round_to * cost["F"]:
    chosen = with_groups(len(groups) - 1) or chosen
  result = {u: np.zeros(full.L, np.int64) for u in UNITS}
  for unit, layer, units in chosen:
    result[unit][layer] += units
  return result


def _in_turn(
  counts: Mapping[str, np.ndarray], width_L: np.ndarray, round_to: int
) -> list[Removal]:
  """`counts` one by one, all modules in proportion to what they planned."""
  found = []  # (share of its module's removals, channels first, removal)
  for layer, total in enumerate(counts["K"]):
    for i in range(total):
      found.append(((i + 1) / total, 1, ("K", layer, 1)))
  for layer, total in enumerate(counts["F"]):
    done = 0
    while done < total:
      size = min(_block(width_L[layer] - done, round_to), total - done)
      done += size
      found.append((done / total, 0, ("F", layer, size)))
  return [removal for _, _, removal in sorted(found)]


def _more_channels(
  width_L: np.ndarray, prunable_L: np.ndarray, round_to: int
) -> Iterator[Removal]:
  """Channels in turn from the widest MLPs, as long as each keeps some."""
  width_L = np.where(prunable_L, width_L, 0)
  while True:
    layer = int(width_L.argmax())
    size = _block(width_L[layer], round_to)
    if width_L[layer] <= size:
      return
    width_L[layer] -= size
    yield "F", layer, size


def _block(width: int, round_to: int) -> int:
  """Channels that bring a width down to the next multiple of `round_to`."""
  return int(width % round_to or round_to)


def _until(
  removals: Iterable[Removal], need: int, cost: Mapping[str, int]
) -> list[Removal] | None:
  """The first removals worth `need` parameters; None if all are not."""
  found = []
  for unit, layer, units in removals:
    if need <= 0:
      break
    found.append((unit, layer, units))
    need -= units * cost[unit]
  return found if need <= 0 else None


# ---- Sizes and targets -------------------------------------------------------


def prunable_modules(config: ModelConfig, settings: Prune) -> Masks:
  """Which modules may be pruned, {"K": bool [L], "F": ...}."""
  ranges = {
    "K": ("prune.attention_layers", settings.attention_layers),
    "F": ("prune.mlp_layers", settings.mlp_layers),
  }
  return {
    u: np.isin(np.arange(config.L), layer_range(text, config.L, name))
    & (np.array(config.units()[u]) > 0)
    for u, (name, text) in ranges.items()
  }


def smallest(config: ModelConfig, settings: Prune) -> int:
  """Parameters with one unit (or one block of channels) left in each module."""
  prunable = prunable_modules(config, settings)
  least = {"K": 1, "F": settings.round_ffn_to}
  units = {
    u: tuple(
      min(w, least[u]) if p else w
      for w, p in zip(config.units()[u], prunable[u], strict=True)
    )
    for u in UNITS
  }
  return model.count_params(dataclasses.replace(config, **units))


def resolve_target(config: ModelConfig, settings: Prune) -> int | None:
  """Parameters to keep, from `ratio` or `target_params`; None if neither.

  Raises:
    UserError: above the model's size, or below what can be reached.
  """
  size = model.count_params(config)
  if settings.ratio:
    target = math.floor(size * (1 - settings.ratio))
  elif settings.target_params:
    target = settings.target_params
  else:
    return None
  if target >= size:
    raise UserError(
      f"prune.target_params={target:,} is not below the model's {size:,} "
      "parameters: nothing would be pruned"
    )
  low = smallest(config, settings)
  if target < low:
    raise UserError(
      f"a target of {target:,} parameters cannot be reached: with one KV group "
      f"and {settings.round_ffn_to} MLP channel(s) left in each layer that may "
      f"be pruned, {low:,} of {size:,} remain (prune.ratio="
      f"{1 - low / size:.4f})"
    )
  return target


def count(full: ModelConfig, masks: Masks) -> int:
  """Parameters of the model that the masks leave."""
  return model.count_params(with_widths(full, widths(masks)))


def widths(masks: Masks) -> dict[str, np.ndarray]:
  return {u: m.sum(axis=1) for u, m in masks.items()}


def with_widths(
  config: ModelConfig, width: Mapping[str, np.ndarray]
) -> ModelConfig:
  units = {u: tuple(int(n) for n in width[u]) for u in UNITS}
  return dataclasses.replace(config, **units)


# ---- Numberings --------------------------------------------------------------


def everything(config: ModelConfig) -> Kept:
  """All units of a model."""
  return {u: tuple(map(np.arange, w)) for u, w in config.units().items()}


def to_masks(kept: Kept, full: ModelConfig) -> Masks:
  masks = {u: np.zeros((full.L, max(w)), bool) for u, w in full.units().items()}
  for u in UNITS:
    for mask, units in zip(masks[u], kept[u], strict=True):
      mask[units] = True
  return masks


def to_kept(masks: Masks) -> Kept:
  return {u: tuple(map(np.flatnonzero, m)) for u, m in masks.items()}


def relative_to(kept: Kept, left: Kept) -> Kept:
  """`left` in the numbering of a model that has just the units `kept`."""
  return {u: tuple(map(np.searchsorted, kept[u], left[u])) for u in UNITS}


# ---- Arrays ------------------------------------------------------------------


def dense(full: ModelConfig) -> ModelConfig:
  """The config of the stacked coordinates: all layers as wide as the widest."""
  width = {u: np.full(full.L, max(w)) for u, w in full.units().items()}
  return with_widths(full, width)


def gather(
  config: ModelConfig, tree: Any, keep: Kept, mesh: Mesh
) -> tuple[ModelConfig, Any]:
  """Keeps units of params, or of any tree with params inside (Adam's moments).

  Args:
    keep: in the numbering of `config`.
  """
  new = with_widths(
    config, {u: np.array([len(k) for k in keep[u]]) for u in UNITS}
  )
  # A half without units has no parameters at all, not even its norms.
  names = [set(model.layer_names(new, i)) for i in range(new.L)]

  def cut(tree):
    def one(name, layer, leaf):
      if name is None or layer is None:
        return leaf
      return axes.take(name, leaf, {u: keep[u][layer] for u in UNITS})

    return axes.map_named(one, _without(tree, names))

  return new, transform(cut, tree, mesh)


def expand(
  config: ModelConfig, params: Params, kept: Kept, full: ModelConfig, mesh: Mesh
) -> Params:
  """Params in dense stacked coordinates: {"layers": {name: [L, ...]}, outer}.

  Inverse of `compact`: removed units are zeros, norms of absent halves ones.
  """
  wide = dense(full)

  def stack(params):
    like = params["embedding"]
    layers = []
    for i in range(config.L):
      at = {u: kept[u][i] for u in UNITS}
      layers.append(widen(params[axes.layer_name(i)], at, wide, like))
    library = np if _on_host(like) else jnp
    outer = {n: params[n] for n in model.outer_names(config)}
    together = jax.tree.map(lambda *parts: library.stack(parts), *layers)
    return outer | {"layers": together}

  return transform(stack, params, mesh)


def widen(
  layer: Params, at: Mapping[str, np.ndarray], wide: ModelConfig, like: Any
) -> Params:
  """One layer in dense coordinates: its units at `at`, zeros elsewhere.

  Norms of an absent half are ones. `like`: any array of the same model.
  """
  sizes = wide.sizes(0)
  library = np if _on_host(like) else jnp

  def absent(name):
    fill = 1 if "norm" in name else 0
    return library.full(axes.shape(name, sizes), fill, like.dtype)

  return {
    n: axes.put(n, layer[n], at, sizes) if n in layer else absent(n)
    for n in model.layer_names(wide)
  }


def compact(
  stacked: Params, kept: Kept, full: ModelConfig, mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """The model that dense stacked params and kept units stand for."""
  new = with_widths(
    full, {u: np.array([len(k) for k in kept[u]]) for u in UNITS}
  )

  def split(stacked):
    params = {n: stacked[n] for n in model.outer_names(new)}
    for i in range(new.L):
      at = {u: kept[u][i] for u in UNITS}
      params[axes.layer_name(i)] = {
        n: axes.take(n, stacked["layers"][n][i], at)
        for n in model.layer_names(new, i)
      }
    return params

  return new, transform(split, stacked, mesh)


def minibatches(
  tokens_NT: np.ndarray, batch: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Samples in order as [M, B, T] and which rows are real, bool [M, B].

  The last minibatch may be short, as the authors' is. Rows that only fill a
  minibatch, or the devices, are repeated samples marked False.
  """
  N, T = tokens_NT.shape
  batch = min(batch, N)
  M = -(-N // batch)
  shards = math.prod(mesh.shape[a] for a in sharding.BATCH)
  rows = -(-batch // shards) * shards
  index = np.full((M, rows), -1)
  for m in range(M):
    own = np.arange(m * batch, min((m + 1) * batch, N))
    index[m, : len(own)] = own
  valid_MB = index >= 0
  tokens_MBT = np.asarray(tokens_NT, np.int32)[np.where(valid_MB, index, 0)]
  return replicate(tokens_MBT, mesh), replicate(valid_MB, mesh)


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


def transform(fn: Callable, tree: Any, mesh: Mesh) -> Any:
  """`fn` of a tree of arrays, the result where it belongs on the mesh.

  On a CPU in one process numpy does it, which compiles nothing. Elsewhere the
  gather comes first and the sharding second: a gather with an output sharding
  aborts XLA in jax 0.11.2.
  """
  if _with_numpy(mesh):
    made = fn(jax.device_get(tree))
    return jax.device_put(made, _shardings(made, mesh))
  made = jax.jit(fn)(tree)
  return jax.jit(lambda x: x, out_shardings=_shardings(made, mesh))(made)


def _with_numpy(mesh: Mesh) -> bool:
  return jax.process_count() == 1 and mesh.devices.flat[0].platform == "cpu"


def _shardings(tree: Any, mesh: Mesh) -> Any:
  if not (isinstance(tree, dict) and "layers" in tree):
    return sharding.param_shardings(tree, mesh)
  outer = {n: v for n, v in tree.items() if n != "layers"}
  layers = {
    n: sharding.param_sharding(n, v.shape, mesh, stacked=True)
    for n, v in tree["layers"].items()
  }
  return sharding.param_shardings(outer, mesh) | {"layers": layers}


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Host arrays, the same in every process, on all devices."""
  where = sharding.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, where, lambda at: x[at]),
    tree,
  )
