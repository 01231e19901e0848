"""The arithmetic that the decoder's layers share."""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  eps: float,
  offset: float = 0.0,
  width: int | None = None,
) -> jax.Array:
  """Root mean square norm (Zhang & Sennrich, arXiv 1910.07467).

  x / sqrt(sum x^2 / width + eps) * (offset + scale), over the last axis.

  Args:
    x: [..., size].
    scale: [size].
    eps: added to the mean square.
    offset: 1 for Gemma, which then also scales in float32.
    width: what the sum of squares is divided by; default the axis's own size.

  Returns:
    The normed array, in the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  width = x.shape[-1] if width is None else width
  square = jnp.sum(x32 * x32, axis=-1, keepdims=True) / width
  normal = x32 * jax.lax.rsqrt(square + eps)
  if offset:
    return (normal * (offset + scale.astype(jnp.float32))).astype(x.dtype)
  return scale * normal.astype(x.dtype)


def layer_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  eps: float,
  offset: float = 0.0,
) -> jax.Array:
  """Layer norm (Ba et al., arXiv 1607.06450), over the last axis.

  Args:
    x: [..., size].
    scale, bias: [size]; None = without a bias.
    eps: added to the variance.
    offset: added to `scale`; 1 for Nemotron.

  Returns:
    The normed array, in the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  x32 -= jnp.mean(x32, axis=-1, keepdims=True)
  variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normal = x32 * jax.lax.rsqrt(variance + eps)
  normal *= offset + scale.astype(jnp.float32)
  if bias is not None:
    normal += bias.astype(jnp.float32)
  return normal.astype(x.dtype)


class Int8(NamedTuple):
  """A frozen matrix in eight bits, int8 * scale, which is never made whole.

  Attributes:
    int8: [in..., out...].
    scale: [out...], one of each output.
  """

  int8: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the matrix."""
    return self.int8.shape


class LowRank(NamedTuple):
  """A matrix with another of low rank added, w + a b, which is never made.

  Attributes:
    w: the matrix, which may be `Int8`.
    a: [in..., rank], the dims of `w` that are summed over.
    b: [rank, out...].
  """

  w: jax.Array | Int8
  a: jax.Array
  b: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the sum."""
    return self.w.shape


def project(
  equation: str,
  x: jax.Array,
  w: jax.Array | LowRank,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """Computes `jnp.einsum(equation, x, w)`, with gradients in the same order.

  JAX's own rule makes the gradient of `w` a product with the transposed
  cotangent, which XLA:CPU writes out once more: this is up to 1.7 times as
  fast.

  Args:
    equation: of two operands; no letter is summed that only one of them has.
    x, w: the operands. A float32 `w` is multiplied in the dtype of `x`.
    dtype: of the result; default that of `x`.

  Returns:
    The product; gradients are in the dtypes of `x` and of `w`.
  """
  if not isinstance(w, LowRank):
    return _project(equation, x, w, dtype)
  x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
  rows = "".join(n for n in x_letters if n not in w_letters) + "r"
  into = "".join(n for n in w_letters if n in x_letters) + "r"
  out = "r" + "".join(n for n in w_letters if n not in x_letters)
  x_R = _project(f"{x_letters},{into}->{rows}", x, w.a, dtype)
  added = _project(f"{rows},{out}->{y_letters}", x_R, w.b, dtype)
  if isinstance(w.w, Int8):
    return _project_int8(equation, x, w.w, dtype) + added
  return _project(equation, x, w.w, dtype) + added


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project(equation, x, w, dtype):
  w = as_multiplied(w, x)
  return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def as_multiplied(w: jax.Array, x: jax.Array) -> jax.Array:
  """A weight in no more digits than what it is multiplied by."""
  return w.astype(x.dtype) if w.dtype.itemsize > x.dtype.itemsize else w


def _project_forward(equation, x, w, dtype):
  return _project(equation, x, w, dtype), (x, w)


def _project_backward(equation, dtype, saved, dy):
  x, w = saved
  used = as_multiplied(w, x)
  # Of a wider weight the gradient is rounded nowhere before it is summed.
  wide = None if used is w else w.dtype
  dx, dw = project_gradients(equation, x, used, dy, wide)
  return dx, dw.astype(w.dtype)


_project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project_int8(equation, x, w, dtype):
  y = jnp.einsum(equation, x, w.int8.astype(x.dtype))
  return _scaled(equation, y, w.scale).astype(dtype or x.dtype)


def _project_int8_forward(equation, x, w, dtype):
  # The matrix is kept as it is: in the type of x it would be twice as large.
  return _project_int8(equation, x, w, dtype), (x, w)


def _project_int8_backward(equation, dtype, saved, dy):
  x, w = saved
  x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
  dy = _scaled(equation, dy.astype(x.dtype), w.scale)
  back = f"{y_letters},{w_letters}->{x_letters}"
  dx = jnp.einsum(back, dy, w.int8.astype(x.dtype))
  frozen = Int8(np.zeros(w.shape, jax.dtypes.float0), jnp.zeros_like(w.scale))
  return dx.astype(x.dtype), frozen


_project_int8.defvjp(_project_int8_forward, _project_int8_backward)


def _scaled(equation: str, y: jax.Array, scale: jax.Array) -> jax.Array:
  """A product with each output times its scale."""
  x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
  out = "".join(n for n in w_letters if n not in x_letters)
  scale = scale.astype(y.dtype)
  return jnp.einsum(f"{y_letters},{out}->{y_letters}", y, scale)


def project_gradients(
  equation: str,
  x: jax.Array,
  w: jax.Array,
  dy: jax.Array,
  dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The gradients of `project` by x, in its dtype, and by w.

  Args:
    equation, x, w: as of `project`.
    dy: the gradient of what that gives.
    dtype: of w's gradient; default that of the product.
  """
  x_letters, w_letters, y_letters = equation.replace("->", ",").split(",")
  dy = dy.astype(x.dtype)
  dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, w)
  equation = f"{x_letters},{y_letters}->{w_letters}"
  dw = jnp.einsum(equation, x, dy, preferred_element_type=dtype)
  return dx.astype(x.dtype), dw


def xielu(
  x: jax.Array,
  positive: jax.Array,
  negative: jax.Array,
  beta: jax.Array,
  eps: jax.Array,
) -> jax.Array:
  """xIELU (Huang & Schlag, arXiv 2411.13010), with two numbers to learn.

  Above 0 a x^2 + beta x with a = softplus(positive), else
  c (expm1(min(x, eps)) - x) + beta x with c = beta + softplus(negative); at 0
  it is 0, which leaves padding out.

  Args:
    x: any shape.
    positive, negative: [1], learned.
    beta, eps: [1], which are not.
  """
  beta, eps = jax.lax.stop_gradient((beta, eps))
  beta, eps = beta.astype(x.dtype), eps.astype(x.dtype)
  above = nn.softplus(positive).astype(x.dtype) * x * x
  below = beta + nn.softplus(negative).astype(x.dtype)
  below = below * (jnp.expm1(jnp.minimum(x, eps)) - x)
  return jnp.where(x > 0, above, jnp.where(x < 0, below, 0)) + beta * x


# The numbers that xIELU starts with.
XIELU = {
  "xielu_positive": math.log(math.expm1(0.8)),
  "xielu_negative": math.log(math.expm1(0.3)),
  "xielu_beta": 0.5,
  "xielu_eps": -1e-6,
}
ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": partial(nn.gelu, approximate=True),
  "gelu": partial(nn.gelu, approximate=False),
  "relu": nn.relu,
  "relu2": lambda x: jnp.square(nn.relu(x)),
  "xielu": lambda x: xielu(x, *map(jnp.float32, XIELU.values())),
}


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """Squeezes x smoothly into (-cap, cap), as Gemma 2 does.

  Args:
    x: any shape.
    cap: the bound; 0 leaves `x` as it is.
  """
  return cap * jnp.tanh(x / cap) if cap else x
