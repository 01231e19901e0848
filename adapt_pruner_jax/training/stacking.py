"""Which layers train as one stacked run, and trees there and back.

Between two checkpoints the train step works on stacked layers
(`models.layer_runs`); everywhere else, and in every file, each layer has arrays
of its own, of its own size.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import axes, devices, layer_runs, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import lora

FEW_LAYERS = 4  # so many are unrolled
MOST_RUNS = 8
# What MLP widths of a run are padded to multiples of, where matrices are
# multiplied in tiles.
TILES = {"tpu": 128, "gpu": 64}
# For weighing compilation against arithmetic: what one more run takes to
# compile, and which share of a device's peak a train step reaches.
COMPILE_SECONDS = 30.0
UTILISATION = 0.4
UNKNOWN_FLOPS = 1e11  # a CPU's peak, about


class Run(NamedTuple):
  """Consecutive layers that are padded to one size and scanned over."""

  first: int
  end: int
  kv_groups: int  # of its layers of the first kind
  ffn_width: int
  second_groups: int = 0  # of its layers of the second kind

  @property
  def name(self) -> str:
    """Its key in a tree of stacked layers."""
    return layer_runs.run_name(self.first, self.end)

  def sizes(self) -> dict[str, int]:
    """What the dims of units are padded to."""
    groups = {"K": self.kv_groups, "Z": self.second_groups}
    return groups | {"F": self.ffn_width}


Runs = tuple[Run, ...]  # (): layers are not stacked


# ---- Which layers ------------------------------------------------------------


def choose(
  config: ModelConfig, settings: Train, mesh: Mesh, tokens: int = 0
) -> Runs:
  """The runs that take the least time: compilation and padded arithmetic.

  Args:
    config: of the model.
    settings: `scan_layers` says whether at all. `auto`: not on a CPU, where
      unrolled layers are faster, and not with few layers.
    mesh: the devices.
    tokens: that will be trained on with them.

  Returns:
    The runs; () where layers stay unrolled.
  """
  device = mesh.devices.flat[0]
  few = config.num_layers <= FEW_LAYERS or device.platform == "cpu"
  if settings.scan_layers == "off" or (settings.scan_layers == "auto" and few):
    return ()
  if config.residual or not config.num_layers:  # SliceGPT: unequal streams
    return ()
  peak = devices.peak_flops(device) or UNKNOWN_FLOPS
  # A parameter costs two FLOPs a token forward, four backward.
  seconds = 6 * tokens / (UTILISATION * peak * mesh.size)
  tile = math.lcm(TILES.get(device.platform, 1), mesh.shape["tensor"])
  return cheapest(config, COMPILE_SECONDS, seconds, tile)


def cheapest(
  config: ModelConfig, compile_cost: float, param_cost: float, tile: int = 1
) -> Runs:
  """Cuts the layers into runs of the lowest cost, by dynamic programming.

  Args:
    config: of the model.
    compile_cost: of each run.
    param_cost: of each parameter of the padded layers.
    tile: MLP widths become multiples of it.

  Returns:
    The runs. Halves that are absent are only padded in where nothing is normed
    behind them.
  """
  layers = config.num_layers
  costs = [model_config.unit_cost(config, i) for i in range(layers)]
  mixes = config.norm_order == "pre"

  def run(first: int, end: int) -> Run | None:
    groups, widths = (n[first:end] for n in config.units().values())
    halves = {(k > 0, f > 0) for k, f in zip(groups, widths, strict=True)}
    if len(halves) > 1 and not mixes:
      return None
    most = config.with_layers(range(first, end)).most_groups
    width = -(-max(widths) // tile) * tile
    return Run(first, end, most(0), width, most(1))

  def price(run: Run) -> float:
    params = 0
    for i in range(run.first, run.end):
      groups = run.second_groups if config.is_second(i) else run.kv_groups
      params += costs[i]["K"] * groups + costs[i]["F"] * run.ffn_width
    return compile_cost + param_cost * params

  priced = {
    (first, end): (price(made), made)
    for first, end in itertools.combinations(range(layers + 1), 2)
    if (made := run(first, end)) is not None
  }
  # The price of the first `end` layers in so many runs, and these.
  best: dict[int, tuple[float, Runs]] = {0: (0.0, ())}
  whole = []
  while len(whole) < MOST_RUNS and best:
    longer = {}
    for (first, end), (more, made) in priced.items():
      if first in best:
        price_before, runs = best[first]
        new = price_before + more, (*runs, made)
        longer[end] = min(longer.get(end, new), new, key=lambda pair: pair[0])
    best = longer
    whole += [best[layers]] if layers in best else []
  return min(whole, key=lambda pair: pair[0])[1]


# ---- There and back ----------------------------------------------------------


def stack(runs: Runs, tree: Any, mesh: Mesh, donate: bool = False) -> Any:
  """Stacks and pads the layers of params, adapters, or what has them inside.

  Args:
    runs: which layers; () = `tree` is given back as it is.
    tree: params, adapters, or an optimizer's state of them.
    mesh: where the arrays lie.
    donate: delete each layer's arrays as soon as they are stacked.
  """

  def convert(node: Any) -> Any:
    rest = {n: x for n, x in node.items() if not n.startswith("layer_")}
    for run in runs:
      names = map(axes.layer_name, range(run.first, run.end))
      layers = tuple(node[name] for name in names)
      rest[run.name] = _moved(partial(_stacked, run), layers, mesh, donate)
    return rest

  return _map_dicts(convert, tree) if runs else tree


def unstack(
  runs: Runs, config: ModelConfig, tree: Any, mesh: Mesh, donate: bool = False
) -> Any:
  """Inverse of `stack`.

  Args:
    runs, mesh: as `stack`'s.
    config: of the model, with the true size of each layer.
    tree: what `stack` has made.
    donate: delete a run's arrays as soon as they are taken apart.
  """

  def convert(node: Any) -> Any:
    names = [run.name for run in runs]
    found = {n: x for n, x in node.items() if n not in names}
    for run in runs:
      apart = partial(_unstacked, run, config)
      found |= _moved(apart, node[run.name], mesh, donate)
    return found

  return _map_dicts(convert, tree) if runs else tree


def abstract(runs: Runs, tree: Any, mesh: Mesh) -> Any:
  """What `stack` makes of a tree, as shapes with shardings.

  Args:
    runs, mesh: as `stack`'s.
    tree: of `jax.ShapeDtypeStruct`s, with shardings outside the layers.
  """

  def convert(node: Any) -> Any:
    rest = {n: x for n, x in node.items() if not n.startswith("layer_")}
    for run in runs:
      names = map(axes.layer_name, range(run.first, run.end))
      layers = tuple(node[name] for name in names)
      made = jax.eval_shape(partial(_stacked, run), layers)
      rest[run.name] = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        made,
        _shardings(made, mesh),
      )
    return rest

  return _map_dicts(convert, tree) if runs else tree


def teacher(
  pair: tuple[ModelConfig, Params], settings: Train, mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """A teacher with its layers stacked, in the type of the arithmetic.

  Args:
    pair: stacked or not.
    settings: of the training.
    mesh: where the arrays lie.
  """
  config, params = pair
  runs = choose(config, settings, mesh)
  if not runs or layer_runs.bounds(params):
    return pair
  dtype = jnp.dtype(settings.dtype)
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  return config, stack(runs, params, mesh)


def abstract_teacher(
  pair: tuple[ModelConfig, Params], settings: Train, mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """What `teacher` makes of a pair, as shapes with shardings.

  Args:
    pair: not stacked, of `jax.ShapeDtypeStruct`s with shardings.
    settings, mesh: as `teacher`'s.
  """
  config, params = pair
  runs = choose(config, settings, mesh)
  if not runs:
    return pair
  cast = lambda x: jax.ShapeDtypeStruct(
    x.shape, jnp.dtype(settings.dtype), sharding=x.sharding
  )
  return config, abstract(runs, jax.tree.map(cast, params), mesh)


def _map_dicts(fn: Callable[[dict], dict], tree: Any) -> Any:
  """`fn` of each dict of layers inside a tree."""

  def one(node: Any) -> Any:
    return fn(node) if isinstance(node, dict) else node

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, dict))


def _stacked(run: Run, layers: tuple[Params, ...]) -> Params:
  """The layers of a run as one, padded with zeros."""
  flat = [flatten_dict(weights) for weights in layers]
  sizes = run.sizes()
  made = {}
  for path in dict.fromkeys(itertools.chain.from_iterable(flat)):
    like = next(weights[path] for weights in flat if path in weights)
    letters = zip(_letters(path), like.shape, strict=True)
    shape = tuple(sizes.get(letter, n) for letter, n in letters)

    library = np if isinstance(like, np.ndarray) else jnp
    absent = library.zeros(shape, like.dtype)

    def widen(x, shape=shape, library=library):
      pads = [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]
      return library.pad(x, pads)

    made[path] = library.stack(
      [widen(w[path]) if path in w else absent for w in flat]
    )
  return unflatten_dict(made)


def _unstacked(run: Run, config: ModelConfig, stacked: Params) -> Params:
  """The layers of a run, each of its own size: {"layer_0": {...}, ...}."""
  layers = {}
  for i in range(run.first, run.end):
    names, sizes = set(model_config.layer_names(config, i)), config.sizes(i)
    layers[axes.layer_name(i)] = unflatten_dict(
      {
        path: x[i - run.first][_first(_letters(path), sizes)]
        for path, x in flatten_dict(stacked).items()
        if path[0] in names
      }
    )
  return layers


def _first(letters: str, sizes: dict[str, int]) -> tuple[slice, ...]:
  """The units that a layer really has."""
  return tuple(slice(sizes[x] if x in axes.LETTERS else None) for x in letters)


def _letters(path: tuple[str, ...]) -> str:
  """The dims of a parameter, or of a part of it or of its adapter."""
  if len(path) == 1:
    return axes.AXES[path[0]]
  return lora.part_letters(path[0])[path[1]]


def _shardings(tree: Any, mesh: Mesh) -> Any:
  """Where the arrays of layers, stacked or not, are cut."""

  def one(path: tuple, x: Any) -> NamedSharding:
    keys = tuple(p.key for p in path if not p.key.startswith("layer_"))
    letters = _letters(keys)
    letters = "L" * (len(x.shape) - len(letters)) + letters
    return NamedSharding(mesh, sharding.spec(letters, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def _moved(fn: Callable, tree: Any, mesh: Mesh, donate: bool) -> Any:
  """`fn` of a tree, the result where it belongs on the mesh.

  Run by run, and without what it was made of, at most one run is there twice.
  On a CPU in one process numpy does it, which compiles nothing.
  """
  where = _shardings(jax.eval_shape(fn, tree), mesh)
  if sharding.with_numpy(mesh):
    made = jax.tree.map(np.array, fn(jax.device_get(tree)))
    made = jax.device_put(made, where)
  else:
    made = jax.jit(fn, out_shardings=where)(tree)
  if donate:
    jax.block_until_ready(made)
    jax.tree.map(lambda x: x.delete(), tree)
  return made
