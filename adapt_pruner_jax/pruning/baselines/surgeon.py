"""LLM Surgeon: Kronecker-factored curvature, weights updated (2312.17244).

The Hessian of the loss with respect to a matrix is taken as A (x) G: A the mean
of a a^T of its inputs, G that of g g^T, g the gradient of the tokens'
log-likelihood at its output. A unit costs what its inputs of `o` or `down` cost
when what is left of that matrix makes up for them, given the units that went
before it (`kronecker`). All units compete, by cost per parameter. They go in
`prune.surgeon.shots` shots of equally many parameters; behind each the weights
of what is left are updated, and both factors are measured anew.

The published code removes rows and columns of all matrices one by one and
compares them as they are; here they go with their unit, which has a size. What
a unit says passes through one matrix, `o` or `down`, so that its rows and its
columns would make up for the same thing twice, which is worse (docs/method.md):
only these two pay and are updated. With `prune.surgeon.matrices=all` so are the
matrices that read the stream, of which a unit is outputs.

The scores alone, `prune.group_importance=surgeon`, go with any allotment.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.layer import (
  HALVES,
  NAMES,
  WRITERS,
  norm,
  stream,
  times_mask,
)
from adapt_pruner_jax.pruning import (
  allotment,
  backward,
  exact_target,
  float32_product,
  linear_algebra,
  passes,
  targets,
)
from adapt_pruner_jax.pruning.baselines import kronecker
from adapt_pruner_jax.pruning.surgery import Masks
from adapt_pruner_jax.pruning.task import (
  Allotted,
  Masked,
  Measured,
  PruneTask,
)

LEFT = "_left"  # behind a unit letter: masks of after the removal


class Kind(NamedTuple):
  """What the factors of a half are for.

  Attributes:
    damp_a, damp_g: added to their diagonals, in units of their means.
    readers: of the matrices that read the stream too.
    update: new weights, not scores, are kept.
  """

  damp_a: float
  damp_g: float
  readers: bool
  update: bool


def check(settings: Prune) -> None:
  """Raises a UserError for a refit that does not go with it."""
  if settings.refit.isdigit():
    raise UserError(
      f"--config.prune.refit={settings.refit}: the surgeon updates the weights "
      "behind each shot itself; give none, or final"
    )


def prepare(task: PruneTask) -> PruneTask:
  """The task as it is.

  Raises:
    UserError: a target out of reach.
  """
  exact_target.check_reachable(task, task.settings.rounding())
  return task


def measure(masked: Masked, tokens_NT: np.ndarray) -> Measured:
  """Rises of the loss with each unit, nats a token, in the order they go."""
  found = _walk(masked, tokens_NT, masked.masks, update=False)
  scores = {
    u: _rising(ranked, masked.masks[u]) for u, ranked in found["scores"].items()
  }
  return Measured(scores, found["loss_M"])


def allot(masked: Masked, measured: Measured) -> Allotted:
  """The units that cost least per parameter, down to the shot's target.

  Raises:
    UserError: there is no target.
  """
  task, settings = masked.task, masked.task.settings
  goal = allotment.step_goal(masked, settings.surgeon.shots)
  return Allotted(
    allotment.choose(
      task.full,
      measured.scores,
      masked.masks,
      targets.prunable_modules(task.full, settings),
      goal,
      goal,
      settings=settings,
    )
  )


def update(
  masked: Masked, masks: Masks, tokens_NT: np.ndarray
) -> tuple[Params, list[dict]]:
  """The weights that make up for what a shot removes.

  Args:
    masked: the model before the shot.
    masks: units that are left behind it.
    tokens_NT: calibration tokens of the shot.

  Returns:
    The new stacked params; and no records.
  """
  left = {u + LEFT: masks[u] for u in UNITS}
  found = _walk(masked, tokens_NT, masked.masks | left, update=True)["scores"]
  old = masked.stacked["layers"]
  new = found["K"] | found["F"]
  placed = {n: jax.device_put(x, old[n].sharding) for n, x in new.items()}
  return masked.stacked | {"layers": old | placed}, []


def _rising(ranked: kronecker.Ranked, mask_LU: np.ndarray) -> np.ndarray:
  """Scores that put units in the order they go, [L, U].

  A unit may cost less once others are gone: then it costs as much as they.
  """
  scores = np.zeros(mask_LU.shape)
  for score_U, place_U, rise_U, mask_U in zip(
    scores, ranked.place_U, ranked.rise_U, mask_LU, strict=True
  ):
    units = np.flatnonzero(mask_U)
    units = units[np.argsort(place_U[units])]
    highest = 0.0
    for unit in units:
      highest = max(float(rise_U[unit]), np.nextafter(highest, np.inf))
      score_U[unit] = highest
  return scores


# ---- On the devices ----------------------------------------------------------


def kind_of(settings: Prune) -> Kind:
  """What the settings ask for, to score."""
  own = settings.surgeon
  return Kind(own.damp_a, own.damp_g, own.matrices == "all", update=False)


def _walk(
  masked: Masked, tokens_NT: np.ndarray, masks: Masks, update: bool
) -> dict:
  kind = kind_of(masked.task.settings)._replace(update=update)
  return passes.run(PROGRAMS, masked, tokens_NT, masks, kind=kind)


def _factors(T: int, mesh: Mesh, kind: Kind) -> backward.Visitor:
  """Measures the factors of a masked model, half by half.

  Kept is a `kronecker.Ranked` of each unit, or of an update, whose masks say
  with {"K_left", "F_left"} what stays, the new matrices and biases by name.

  Args:
    T: tokens of a row.
    mesh: where factors are inverted.
    kind: what they are for.
  """

  def start(half):
    return jax.tree.map(
      lambda size: jnp.zeros((size, size), jnp.float32), _sizes(half, kind)
    )

  def add(half, total, x_BTD, dy_BTD, valid_B, rows):
    del rows
    seen, dx_BTD = _seen(half, kind, x_BTD, dy_BTD)
    grams = {}
    for name, y in seen.items():
      y_BTC = y.reshape(*y.shape[:2], -1).astype(jnp.float32)
      y_BTC *= valid_B[:, None, None]
      grams[name] = float32_product.product("btc,bte->ce", y_BTC, y_BTC)
    return jax.tree.map(jnp.add, total, grams), dx_BTD

  def finish(half, sums, seen):
    tokens = seen.rows * T
    grams = {n: s / tokens for n, s in sharding.whole(sums, mesh).items()}
    # The walk's loss is a sum over rows of means over their predictions.
    matrices = _matrices(half, kind, grams, (T - 1) ** 2)
    if kind.update:
      return _updated(half, matrices, mesh)
    return kronecker.rank(matrices, half.masks[half.unit], mesh)

  return backward.Visitor(start, add, finish)


PROGRAMS = passes.scored(_factors, "kind")


def _readers(half: backward.Half, kind: Kind) -> tuple[str, ...]:
  readers = HALVES[WRITERS[half.unit]] if kind.readers else ()
  return tuple(name for name in readers if name in half.weights)


def _biased(half: backward.Half) -> bool:
  """Whether the matrices that read the stream have biases."""
  config = half.config
  return config.qkv_bias if half.unit == "K" else config.gate_up_bias


def _sizes(half: backward.Half, kind: Kind) -> dict[str, int]:
  """Of the factors: the streams, and what is on the units' side of matrices."""
  writer = WRITERS[half.unit]
  channels, width = linear_algebra.as_matrix(writer, half.weights[writer]).shape
  sizes = {"out": width, writer: channels}
  for name in (readers := _readers(half, kind)):
    sizes[name] = linear_algebra.as_matrix(name, half.weights[name]).shape[1]
  return sizes | ({"in": width + _biased(half)} if readers else {})


def _seen(
  half: backward.Half, kind: Kind, x_BTD: jax.Array, dy_BTD: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
  """What the factors are sums of, and the gradient in front of the half.

  "in" and "out" are the readers' input and the gradient at the writer's output;
  a reader's name is the gradient at its output, the writer's is its input.
  """
  unit, readers = half.unit, _readers(half, kind)
  # A bias for each token, whose gradient is that at the matrix's output.
  given = {}
  for name in readers:
    shape = half.weights[name].shape[1:]
    bias = half.weights.get(f"{name}_bias", jnp.zeros(shape, x_BTD.dtype))
    given[f"{name}_bias"] = jnp.broadcast_to(bias, x_BTD.shape[:2] + shape)
  if readers:
    has = {"K": "qkv_bias", "F": "gate_up_bias"}[unit]
    config = dataclasses.replace(half.config, **{has: True})
    half, plain = dataclasses.replace(half, config=config), half
  else:
    plain = half

  def run(x_BTD, biases):
    y_BTD, tap = half.run(x_BTD, biases)
    fed = tap.fed[unit]
    return y_BTD, times_mask(fed, half.masks[unit])

  _, vjp, fed = jax.vjp(run, x_BTD, given, has_aux=True)
  dx_BTD, gradients = vjp(dy_BTD)
  out_BTD = stream(half.config, dy_BTD) * half.config.residual_scale
  seen = {WRITERS[unit]: fed, "out": out_BTD}
  if readers:
    in_BTD = norm(half.config, half.weights, f"{NAMES[unit]}_norm", x_BTD)
    if _biased(plain):
      ones = jnp.ones_like(in_BTD[..., :1])
      in_BTD = jnp.concatenate([in_BTD, ones], axis=-1)
    seen["in"] = in_BTD
    seen |= {n: gradients[f"{n}_bias"] for n in readers}
  return seen, dx_BTD


def _matrices(
  half: backward.Half, kind: Kind, grams: dict[str, jax.Array], scale: int
) -> dict[str, kronecker.Matrix]:
  """The matrices of a half, each with the rows of its units.

  Args:
    grams: means over tokens.
    scale: from the walk's squared gradients to those of the tokens' losses.
  """
  writer, mask_U = WRITERS[half.unit], half.masks[half.unit]

  def there(weight_CE):
    mask_C = jnp.repeat(mask_U, len(weight_CE) // len(mask_U))
    return weight_CE.astype(jnp.float32) * mask_C[:, None]

  weight_CD = linear_algebra.as_matrix(writer, half.weights[writer])
  found = {}
  for name in _readers(half, kind):
    weight_CE = linear_algebra.as_matrix(name, half.weights[name]).T
    if _biased(half):
      bias_C1 = half.weights[f"{name}_bias"].reshape(-1, 1)
      weight_CE = jnp.concatenate([weight_CE, bias_C1], axis=1)
    found[name] = kronecker.Matrix(
      there(weight_CE), grams[name] * scale, grams["in"], kind.damp_g
    )
  found[writer] = kronecker.Matrix(
    there(weight_CD), grams[writer], grams["out"] * scale, kind.damp_a
  )
  return found


def _updated(
  half: backward.Half, matrices: dict[str, kronecker.Matrix], mesh: Mesh
) -> Params:
  """The weights that change, by name."""
  keep_U, found = half.masks[half.unit + LEFT], {}

  def plus(name, change):
    old = half.weights[name]
    new = old.astype(jnp.float32) + change.reshape(old.shape)
    found[name] = new.astype(old.dtype)

  for name, matrix in matrices.items():
    change_CE = kronecker.change(matrix, keep_U, mesh)
    if name in WRITERS.values():
      plus(name, change_CE)
      continue
    if _biased(half):
      plus(f"{name}_bias", change_CE[:, -1])
      change_CE = change_CE[:, :-1]
    plus(name, change_CE.T)
  return found
