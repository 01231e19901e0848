"""SliceGPT: rotate the residual stream, cut its least important directions.

arXiv 2401.15024. Norm gains are folded into the matrices behind them; then the
residual stream may be rotated at every place, and the change of basis from
one place to the next becomes a shortcut matrix. At each place the basis is
that of the principal components of the stream of the model sliced so far, and
only the first ones are kept. Units are not touched, so GQA needs nothing.

The sliced share of the width is not the share of the parameters removed: the
shortcuts and an untied, full-width output matrix are added. Here the width is
solved for the parameter target.
"""

import bisect
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import exact_target
from adapt_pruner_jax.pruning.baselines import activations
from adapt_pruner_jax.pruning.task import Pruned, PruneTask, in_one_step

DAMPING = 0.01  # of the mean eigenvalue, added to all
# Places of the residual stream: 0 behind the embedding, 2 i + 1 behind the
# attention of layer i, 2 i + 2 behind its MLP.


def prune(task: PruneTask) -> Pruned:
  """Slices a model to the largest size not above `task.target` parameters.

  All places get one width d; as many places as still fit get the next one. An
  interrupted prune starts again.

  Raises:
    UserError: norms that cannot be folded, or a target out of reach.
  """
  exact_target.check_target(task)
  config, params = _fused(task)
  multiple = task.settings.slicegpt.multiple
  widths = solve_widths(config, task.target, multiple)
  return slice_to(task, config, params, widths)


def slice_to_width(task: PruneTask, width: int) -> Pruned:
  """Slices to one width everywhere, whatever size results."""
  config, params = _fused(task)
  widths = (width,) * (2 * config.num_layers) + (config.sizes()["E"],)
  return slice_to(task, config, params, widths)


def slice_to(
  task: PruneTask,
  config: ModelConfig,
  params: Params,
  widths: tuple[int, ...],
) -> Pruned:
  """Slices a fused model, place after place.

  Args:
    task: what is sliced; its samples are those of step 0.
    config, params: from `fuse`.
    widths: of each of the 2 L + 1 places.
  """
  tokens_NT, eigenvalues = task.samples(0), []
  for place, width in enumerate(widths):
    values, basis = principal(
      covariance(config, params, place, tokens_NT, task.batch, task.mesh)
    )
    config, params = project(config, params, place, basis[:, :width], task.mesh)
    eigenvalues.append(values)
  # Shares of the variance that is kept, to say where it hurt.
  explained = [
    float(v[:w].sum() / v.sum())
    for v, w in zip(eigenvalues, widths, strict=True)
  ]
  facts = {"residual": list(widths), "explained": explained}
  return in_one_step(task, config, params, task.kept, facts)


def _fused(task: PruneTask) -> tuple[ModelConfig, Params]:
  _check(task.config)
  subtract_mean = task.settings.slicegpt.subtract_mean
  return fuse(task.config, task.params, subtract_mean, task.mesh)


def solve_widths(
  config: ModelConfig, target: int, multiple: int = 1
) -> tuple[int, ...]:
  """Width of each of the 2 L + 1 places, multiples of `multiple`.

  The stream in front of the output matrix stays full, as published.

  Raises:
    UserError: even the smallest width is above the target.
  """
  now = place_widths(config)

  def cap(widths):
    return (*map(min, widths, now[:-1]), now[-1])

  def size(widths):
    return model_config.count_params(with_place_widths(config, cap(widths)))

  places = 2 * config.num_layers
  candidates = range(multiple, max(now) + multiple, multiple)
  low = size((multiple,) * places)
  if low > target:
    raise UserError(
      f"slicegpt cannot reach {target:,} parameters: with a residual width of "
      f"{multiple} {low:,} remain; the output matrix stays {now[-1]} wide"
    )
  fits = bisect.bisect_right(
    candidates, target, key=lambda d: size((d,) * places)
  )
  widths = [candidates[fits - 1]] * places
  for place in range(places):
    widths[place] += multiple
    if size(widths) > target:
      widths[place] -= multiple
  return cap(widths)


def fuse(
  config: ModelConfig, params: Params, subtract_mean: bool, mesh: Mesh
) -> tuple[ModelConfig, Params]:
  """The same function without norm gains, untied, with identity shortcuts.

  Args:
    subtract_mean: take each embedding row's mean away, as published. Right
      for LayerNorm only: a model with RMSNorm is changed by it.
  """
  D, offset = config.hidden_size, config.norm_offset
  if config.residual:
    return config, params
  gain = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm"}
  gain |= {"gate": "mlp_norm", "up": "mlp_norm"}
  fused = {"embedding": params["embedding"]}
  if subtract_mean:
    mean_V1 = jnp.mean(fused["embedding"], axis=1, keepdims=True)
    fused["embedding"] -= mean_V1
  head = params["embedding"].T if config.tied else params["lm_head"]
  fused["lm_head"] = _scaled(head, params["final_norm"], offset)
  fused["final_norm"] = _unit_norm(params["final_norm"], D, offset)
  for i in range(config.num_layers):
    layer = dict(params[axes.layer_name(i)])
    for name, norm in gain.items():
      if name in layer:
        layer[name] = _scaled(layer[name], layer[norm], offset)
    for norm in {*gain.values()} & {*layer}:
      layer[norm] = _unit_norm(layer[norm], D, offset)
    eye = np.eye(D, dtype=params["embedding"].dtype)
    for name in ("attn_shortcut", "mlp_shortcut"):
      layer[name] = jax.device_put(
        eye, sharding.param_sharding(name, (D, D), mesh)
      )
    fused[axes.layer_name(i)] = layer
  config = dataclasses.replace(
    config, tied=False, residual=((D, D, D),) * config.num_layers
  )
  return config, fused


def covariance(
  config: ModelConfig,
  params: Params,
  place: int,
  tokens_NT: np.ndarray,
  batch: int,
  mesh: Mesh,
) -> np.ndarray:
  """Sum of x x^T over all tokens of the stream at `place`, float64 [D, D].

  Each place runs the model from its start again: keeping the stream of all
  samples from place to place would take memory that grows with them.

  Args:
    config, params: a fused model, sliced at the places before.
    place: from 0 to 2 L.
    tokens_NT: calibration tokens.
    batch: sequences at a time.
    mesh: devices that these are cut over.
  """
  total = 0.0
  for tokens_BT, valid_B in activations.batches(tokens_NT, batch, mesh):
    x_BTD = activations.embed(config, params, tokens_BT, mesh)
    for i in range(place):
      x_BTD, _ = activations.half(
        config, params, i // 2, "KF"[i % 2], x_BTD, mesh
      )
    total += _gram(x_BTD, valid_B, mesh=mesh).astype(np.float64)
  return total


def principal(covariance_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues, falling and damped, and eigenvectors in columns."""
  damping = DAMPING * np.mean(np.diag(covariance_DD))
  values, vectors = np.linalg.eigh(covariance_DD)
  return values[::-1] + damping, vectors[:, ::-1]


def project(
  config: ModelConfig,
  params: Params,
  place: int,
  basis_DE: np.ndarray,
  mesh: Mesh,
) -> tuple[ModelConfig, Params]:
  """The model whose stream at `place` is written and read in another basis.

  With x' = x @ basis, whatever writes x is multiplied by the basis and
  whatever reads it by its transpose: in both, the axis of x is contracted.

  Args:
    config, params: a fused model.
    place: from 0 to 2 L.
    basis_DE: orthonormal columns, fewer than rows where the stream is sliced.
    mesh: where the new arrays lie.
  """
  # The letter of x in the layers (None: outside) that write and read it.
  layer, inside = divmod(place, 2)
  if inside:
    letters = {layer: "M"}
  elif place == 0:
    letters = {None: "D", 0: "D"}
  elif layer == config.num_layers:
    letters = {layer - 1: "E", None: "E"}
  else:
    letters = {layer - 1: "E", layer: "D"}

  def one(name, index, array):
    letter = letters.get(index)
    if letter is None or letter not in axes.AXES[name]:
      return array
    axis = axes.AXES[name].index(letter)
    shape = list(array.shape)
    shape[axis] = basis_DE.shape[1]
    if "norm" in name:
      return _unit_norm(array, shape[0], config.norm_offset)
    where = sharding.param_sharding(name, shape, mesh)
    return _contract(array, basis_DE.astype(np.float32), axis, where)

  widths = list(place_widths(config))
  widths[place] = basis_DE.shape[1]
  return with_place_widths(config, widths), axes.map_named(one, params)


def place_widths(config: ModelConfig) -> tuple[int, ...]:
  """Width of the residual stream at each of the 2 L + 1 places."""
  inside = [w for widths in config.residual for w in widths[:2]]
  return (*inside, config.residual[-1][2])


def with_place_widths(config: ModelConfig, widths) -> ModelConfig:
  """Inverse of `place_widths`: the config with these widths."""
  residual = tuple(
    tuple(widths[2 * i : 2 * i + 3]) for i in range(config.num_layers)
  )
  return dataclasses.replace(config, residual=residual)


def _check(config: ModelConfig) -> None:
  if config.norm_order != "pre":
    raise UserError(
      f"slicegpt cannot prune {config.family}: it has norms behind its "
      "attention and MLP, whose gains cannot be folded into a matrix; use "
      "another --config.prune.method"
    )


@activations.reduced
def _gram(x_BTD, valid_B):
  x_BTD = x_BTD.astype(jnp.float32) * valid_B[:, None, None]
  return jnp.einsum("btd,bte->de", x_BTD, x_BTD, precision="highest")


@partial(jax.jit, static_argnames=("axis", "where"))
def _contract(
  array: jax.Array, basis_DE: jax.Array, axis: int, where: NamedSharding
) -> jax.Array:
  wide = jnp.moveaxis(array.astype(jnp.float32), axis, -1)
  made = jnp.moveaxis(jnp.matmul(wide, basis_DE, precision="highest"), -1, axis)
  return jax.lax.with_sharding_constraint(made.astype(array.dtype), where)


@jax.jit
def _scaled(array: jax.Array, gain_D: jax.Array, offset: float) -> jax.Array:
  """Multiplies the rows of a matrix by the gain of the norm in front of it."""
  gain = (offset + gain_D.astype(jnp.float32)).reshape(
    -1, *[1] * (array.ndim - 1)
  )
  return (array.astype(jnp.float32) * gain).astype(array.dtype)


def _unit_norm(norm: jax.Array, width: int, offset: float) -> jax.Array:
  """The parameter of a norm that does not scale."""
  return jnp.full(width, 1 - offset, norm.dtype)
