"""Tokens to the rows that their experts read, and back, by gathers alone.

The gradient of a gather is a scatter to JAX, which does not know that each row
has one token and each token as many rows: there the way back is a gather too. A
scatter adds in no order that is kept on a GPU, and TPUs are slow at it.
"""

import jax
import jax.numpy as jnp


def inverse(order_P: jax.Array) -> jax.Array:
  """The place that each number has in an order of all numbers below P."""
  return jnp.zeros_like(order_P).at[order_P].set(jnp.arange(len(order_P)))


@jax.custom_vjp
def to_rows(x_TD: jax.Array, token_P: jax.Array, row_Tk: jax.Array):
  """What is each row's token, [P, D].

  Args:
    x_TD: of tokens.
    token_P: which token each row is of.
    row_Tk: which rows each token has.
  """
  del row_Tk
  return x_TD[token_P]


@jax.custom_vjp
def to_tokens(y_PD: jax.Array, token_P: jax.Array, row_Tk: jax.Array):
  """The sum of each token's rows, [T, D].

  Args:
    y_PD: of rows.
    token_P, row_Tk: as of `to_rows`.
  """
  del token_P
  return y_PD[row_Tk].sum(1)


def _with_way_back(there, back) -> None:
  def forward(x, token_P, row_Tk):
    return there(x, token_P, row_Tk), (token_P, row_Tk)

  there.defvjp(forward, lambda way, dy: (back(dy, *way), None, None))


_with_way_back(to_rows, to_tokens)
_with_way_back(to_tokens, to_rows)
