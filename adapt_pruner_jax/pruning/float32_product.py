"""Products of float32 matrices at full precision, on TPUs too.

A TPU multiplies bfloat16. XLA's own float32 product (`Precision.HIGHEST`) is
six of these for each tile, which takes its compiler 15 to 35 s of a CPU for
each shape. Here the six are one bfloat16 product, six times as long in what it
sums over: the same terms, and compiled like any other.
"""

from functools import partial

import jax
import jax.numpy as jnp

# Parts of x and of y that are multiplied: 0 the largest. What is left out is
# below 2^-24 of the product.
PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum of two arrays to float32.

  Args:
    equation: as "btc,bte->ce"; no letter is summed that only one of them has.
    x, y: float32, or bfloat16, which is multiplied as it is.
  """
  whole = partial(
    jnp.einsum,
    equation,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  split = partial(in_parts, equation)
  return jax.lax.platform_dependent(x, y, tpu=split, default=whole)


def in_parts(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`product` as one product of bfloat16."""
  x_letters, y_letters, out = equation.replace("->", ",").split(",")
  summed = [n for n in x_letters if n in y_letters and n not in out]
  # The innermost, which is not cut over devices where rows are.
  letter = summed[-1]
  x_parts, y_parts = parts(x), parts(y)
  pairs = [(i, j) for i, j in PAIRS if i < len(x_parts) and j < len(y_parts)]
  join = lambda found, which, letters: jnp.concatenate(
    [found[pair[which]] for pair in pairs], axis=letters.index(letter)
  )
  return jnp.einsum(
    equation,
    join(x_parts, 0, x_letters),
    join(y_parts, 1, y_letters),
    preferred_element_type=jnp.float32,
  )


def parts(x: jax.Array) -> list[jax.Array]:
  """Three bfloat16 arrays whose sum is a float32 one; a bfloat16 one itself."""
  if x.dtype == jnp.bfloat16:
    return [x]
  found, left = [], x.astype(jnp.float32)
  for _ in range(3):
    # A mere cast and back XLA may take for nothing.
    part = jax.lax.reduce_precision(left, exponent_bits=8, mantissa_bits=7)
    found.append(part.astype(jnp.bfloat16))
    left = left - part
  return found
