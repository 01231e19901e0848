"""Losses over a large vocabulary, without logits of all tokens.

Behind the final norm, tokens come to the output matrix in chunks. Each chunk's
loss is taken together with its gradients, so that no logits outlive it: three
products in all, and none of them a second time. Over several devices the matrix
is cut along V, and what moves is tokens; a vocabulary that does not divide is
padded with tokens that nobody says.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import Mesh, PartitionSpec

from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import decoder
from adapt_pruner_jax.models.arithmetic import project_gradients
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import losses, output_matrix

CHUNK = 2**26  # numbers that a device has at a time
CPU_CHUNK = 2**24  # its caches are small, and so may its memory be


# The stream behind the final norm, [B, T, D], and the output matrix.
Ends = tuple[jax.Array, jax.Array | output_matrix.Placed]


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is summed over tokens.

  Attributes:
    config: of the model.
    mesh: its devices; None = wherever the arrays are.
    teacher: of the model to distil from; None = none, or what it finds
      likeliest is given.
    alpha: the share of distillation; the rest is cross entropy.
    temperature: as of `losses.distillation`.
  """

  config: ModelConfig
  mesh: Mesh | None = None
  teacher: ModelConfig | None = None
  alpha: float = 0.0
  temperature: float = 1.0


def loss(
  objective: Objective,
  matrix: jax.Array | output_matrix.Placed,
  x_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  taught: Ends | losses.Likeliest | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The objective and the cross entropy in nats, summed over tokens.

  The first can be differentiated by `matrix` and `x_BTD`, the second by
  nothing. Gradients of the matrix are summed in float32.

  Args:
    objective: what is summed.
    matrix: the output matrix of the model (`decoder.head_matrix`), or what
      `output_matrix.place` made of it. It is multiplied in the dtype of
      `x_BTD`.
    x_BTD: the stream behind the final norm.
    targets_BT, weights_BT: as of `losses.next_token`.
    taught: of the teacher: its stream behind the final norm, and its matrix; or
      the tokens that it finds likeliest; None = no distillation.
  """
  weights_BT = weights_BT.astype(jnp.float32)
  args = x_BTD, matrix, taught, targets_BT, weights_BT
  total, next_token = _sums(objective, *args)
  return total, jax.lax.stop_gradient(next_token)


def divergence(
  configs: tuple[ModelConfig, ModelConfig],
  mesh: Mesh | None,
  student: Ends,
  teacher: Ends,
  weights_BT: jax.Array,
) -> jax.Array:
  """KL(teacher || student) in nats, summed over tokens.

  Args:
    configs: of the student and of the teacher.
    mesh: their devices; None = wherever the arrays are.
    student, teacher: their streams behind the final norm, and their matrices.
    weights_BT: how much each token counts.
  """
  config, teacher_config = configs
  objective = Objective(config, mesh, teacher_config, 1.0, 1.0)
  (x_BTD, matrix), nobody_BT = student, jnp.zeros(weights_BT.shape, jnp.int32)
  return loss(objective, matrix, x_BTD, nobody_BT, weights_BT, teacher)[0]


def token_log_probs(
  config: ModelConfig,
  mesh: Mesh | None,
  matrix: jax.Array | output_matrix.Placed,
  x_BTD: jax.Array,
  targets_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target, in nats, and whether none is likelier.

  Args:
    config, mesh, matrix, x_BTD: as of `loss`.
    targets_BT: token ids.

  Returns:
    float32 [B, T], and bool [B, T].
  """
  matrix = output_matrix.used_with(config, matrix, x_BTD, mesh)

  def chunk(x_BTD, targets_BT):
    logits_BTV = output_matrix.logits(config, mesh, matrix, x_BTD)
    log_probs_BT, target_BT = losses.log_probs(logits_BTV, targets_BT)
    # As argmax == target, but for exact ties; on a CPU it is 20 times faster.
    return (), (log_probs_BT, target_BT >= logits_BTV.max(-1))

  return over_chunks(chunk, config.vocab_size, mesh, x_BTD, targets_BT)[1]


def likeliest(
  config: ModelConfig,
  mesh: Mesh | None,
  matrix: jax.Array | output_matrix.Placed,
  x_BTD: jax.Array,
  number: int,
  temperature: float,
) -> losses.Likeliest:
  """The tokens that a model finds likeliest, and their log-probabilities.

  Args:
    config, mesh, matrix, x_BTD: as of `loss`.
    number: of tokens, C.
    temperature: what the logits are divided by.
  """
  matrix = output_matrix.used_with(config, matrix, x_BTD, mesh)
  logits = lambda x: output_matrix.logits(config, mesh, matrix, x)
  chunk = lambda x: ((), losses.likeliest(logits(x), number, temperature))
  return over_chunks(chunk, config.vocab_size, mesh, x_BTD)[1]


def over_chunks(
  chunk: Callable[..., tuple[Any, Any]],
  vocab_size: int,
  mesh: Mesh | None,
  *arrays: jax.Array,
) -> tuple[Any, Any]:
  """Calls a function of some tokens at a time, few enough for their logits.

  Args:
    chunk: of parts of the arrays: what is summed over parts, and arrays
      [B, T, ...] of the tokens themselves.
    vocab_size: V, how many logits a token has.
    mesh: devices that these are cut over; None = one.
    *arrays: [B, T, ...]. What fills the last part is 0.

  Returns:
    The sums, and the arrays of all tokens.
  """
  B, T = arrays[0].shape[:2]
  # Of a token a device has its part of the logits, and all that is given.
  part = -(-vocab_size // (1 if mesh is None else mesh.size))
  given = max(math.prod(x.shape[2:]) for x in arrays)
  tokens = max(1, chunk_size(mesh) // max(part, given))
  number = min(T, -(-B * T // tokens))
  if number <= 1:
    return chunk(*arrays)
  length = -(-T // number)
  number = -(-T // length)

  def split(x):
    pad = ((0, 0), (0, number * length - T)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, pad).reshape(B, number, length, *x.shape[2:])

  parts = [jnp.moveaxis(split(x), 1, 0) for x in arrays]
  first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in parts]
  shapes = jax.eval_shape(chunk, *first)[0]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, part):
    found, each = chunk(*part)
    return jax.tree.map(jnp.add, total, found), each

  total, each = jax.lax.scan(add, zeros, parts)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]
  return total, jax.tree.map(join, each)


def chunk_size(mesh: Mesh | None) -> int:
  """Logits that a device has at a time; `mesh` None = wherever arrays are."""
  platform = jax.default_backend()
  if mesh is not None:
    platform = mesh.devices.flat[0].platform
  return min(CHUNK, CPU_CHUNK) if platform == "cpu" else CHUNK


# ---- The sums and their gradients --------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(objective, x_BTD, matrix, taught, targets_BT, weights_BT):
  primals = x_BTD, matrix, taught, targets_BT, weights_BT
  return _with_gradients(objective, primals, (False, False))[0]


def _forward(objective, *primals):
  is_primal = lambda p: isinstance(p, CustomVJPPrimal)
  of = lambda field: jax.tree.map(
    lambda p: getattr(p, field), primals, is_leaf=is_primal
  )
  x_BTD, matrix, *_ = of("perturbed")
  wanted = x_BTD, any(jax.tree.leaves(matrix))
  sums, gradients = _with_gradients(objective, of("value"), wanted)
  # An array of no size brings the dtype to the backward pass.
  like = jax.tree.map(lambda m: jnp.zeros(0, m.dtype), of("value")[1])
  return sums, (gradients, like)


def _backward(objective, saved, dsums):
  (dx_BTD, dmatrix), like = saved
  scale = lambda d, dtype: (dsums[0] * d.astype(jnp.float32)).astype(dtype)
  if dx_BTD is not None:
    dx_BTD = scale(dx_BTD, dx_BTD.dtype)
  if dmatrix is None:
    return dx_BTD, None, None, None, None
  dmatrix = scale(dmatrix, jax.tree.leaves(like)[0].dtype)
  if isinstance(like, output_matrix.Placed):
    dmatrix = output_matrix.Placed(dmatrix)
  else:
    dmatrix = output_matrix.taken_back(
      objective.config, dmatrix, objective.mesh
    )
  return dx_BTD, dmatrix, None, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_gradients(objective: Objective, primals: tuple, wanted: tuple):
  """The sums, and the gradients of the first by x_BTD and by the placed matrix,
  float32; None where they are not wanted."""
  x_BTD, matrix, taught, targets_BT, weights_BT = primals
  config, mesh = objective.config, objective.mesh
  used = output_matrix.used_with(config, matrix, x_BTD, mesh)
  arrays = [x_BTD, targets_BT, weights_BT]
  if objective.teacher is not None:
    taught_BTD, taught_matrix = taught
    taught_used = output_matrix.used_with(
      objective.teacher, taught_matrix, taught_BTD, mesh
    )
    arrays.append(taught_BTD)
  elif taught is not None:
    arrays += taught

  def chunk(x_BTD, *tokens):
    targets_BT, weights_BT, *taught = tokens
    if objective.teacher is not None:
      taught = [
        output_matrix.logits(objective.teacher, mesh, taught_used, *taught)
      ]
    elif taught:
      taught = [losses.Likeliest(*taught)]
    x_BTD = output_matrix.constrain(x_BTD, PartitionSpec(), mesh)
    raw_BTV = output_matrix.product(config, mesh, used, x_BTD)
    rest = targets_BT, weights_BT, *taught
    if not any(wanted):
      return (_of_products(raw_BTV, objective, *rest), None), None
    gradient = jax.value_and_grad(_of_products, has_aux=True)
    sums, g_BTV = gradient(raw_BTV, objective, *rest)
    equation = decoder.output_equation(config)
    dx_BTD, dmatrix = project_gradients(
      equation, x_BTD, used.matrix, g_BTV, jnp.float32
    )
    dx_BTD = output_matrix.constrain(
      dx_BTD, PartitionSpec(sharding.BATCH), mesh
    )
    dmatrix = output_matrix.cut(config, dmatrix, mesh)
    return (sums, dmatrix if wanted[1] else None), dx_BTD if wanted[0] else None

  found = over_chunks(chunk, config.vocab_size, mesh, *arrays)
  (sums, dmatrix), dx_BTD = found
  return sums, (dx_BTD, dmatrix)


def _of_products(
  raw_BTV, objective, targets_BT, weights_BT, taught=None
) -> tuple[jax.Array, jax.Array]:
  """The objective and the cross entropy of products with a placed matrix."""
  logits_BTV = output_matrix.finish(objective.config, raw_BTV)
  next_token = losses.next_token(logits_BTV, targets_BT, weights_BT)[0]
  if taught is None:
    return next_token, next_token
  distance = losses.distillation
  if isinstance(taught, losses.Likeliest):
    distance = losses.distillation_by_likeliest
  kl = distance(logits_BTV, taught, weights_BT, objective.temperature)[0]
  alpha = objective.alpha
  return (1 - alpha) * next_token + alpha * kl, next_token
