"""Rows that score several continuations of one context.

A row has the context once, and behind it the continuations as branches. Each
token of a continuation is a query: the column that predicts it, and its id.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from adapt_pruner_jax.evaluation import generate

QUERIES = 32  # scored tokens a row whose logits exist at a time

Pairs = Sequence[tuple[list[int], list[int]]]  # (context, continuation)


@dataclasses.dataclass
class Row:
  """A context and the continuations that are scored behind it."""

  tokens: list[int]
  positions: list[int]
  branches: list[int]  # 0 = context, else the number of the continuation
  # of each scored token: (column that predicts it, its id, request)
  queries: list[tuple[int, int, int]]

  @property
  def number(self) -> int:
    """How many continuations it scores."""
    return len({owner for _, _, owner in self.queries})


def make_rows(pairs: Pairs, context: int, shared: bool = True) -> list[Row]:
  """Rows that score all continuations.

  Args:
    pairs: what is scored.
    context: tokens of a row at most.
    shared: pairs with one context share a row.

  An empty continuation is in none: nothing is left to predict. It is what a
  tokenizer leaves that merges the continuation into the context's last token.
  """
  rows: dict[tuple[int, ...], Row] = {}
  full = []
  for request, (prefix, said) in enumerate(pairs):
    if not said:
      continue
    prefix, said = fit(prefix, said, context)
    key = tuple(prefix) if shared else (request,)
    row = rows.get(key)
    if row is not None and len(row.tokens) + len(said) - 1 > context:
      full.append(rows.pop(key))
      row = None
    if row is None:
      n = len(prefix)
      row = rows[key] = Row(list(prefix), list(range(n)), [0] * n, [])
    _add_branch(row, len(prefix), said, request)
  return full + list(rows.values())


def fit(
  prefix: list[int], said: list[int], context: int
) -> tuple[list[int], list[int]]:
  """The end of a pair: `context` tokens to read and the last to predict.

  The prefix loses its beginning first, as in lm-eval's HF model. That model
  stops where the continuation alone is longer; here its end is scored, as
  lm-eval's ONNX model does.
  """
  tokens = (prefix + said)[-context - 1 :]
  number = min(len(said), context)
  return tokens[:-number], tokens[-number:]


def by_length(rows: Sequence[Row], least: int) -> list[tuple[int, list[Row]]]:
  """(padded length, its rows); less than `least` rows join longer ones, as each
  length is a compilation."""
  groups: dict[int, list[Row]] = {}
  for row in rows:
    T = generate.padded_length(len(row.tokens))
    groups.setdefault(T, []).append(row)
  found, carried, longest = [], [], max(groups, default=0)
  for T in sorted(groups):
    carried = carried + groups[T]
    if len(carried) >= least or longest == T:
      found.append((T, carried))
      carried = []
  return found


def _add_branch(row: Row, prefix: int, said: list[int], request: int) -> None:
  """Adds a continuation; its last token is only ever predicted."""
  start = len(row.tokens)
  branch = row.branches[-1] + 1
  row.tokens += said[:-1]
  row.positions += range(prefix, prefix + len(said) - 1)
  row.branches += [branch] * (len(said) - 1)
  columns = [prefix - 1, *range(start, start + len(said) - 1)]
  row.queries += [(c, t, request) for c, t in zip(columns, said, strict=True)]


def pack(rows: Sequence[Row], batch: int, T: int, Q: int) -> list[np.ndarray]:
  """Tokens, positions, branches [B, T], and columns, targets [B, Q] of queries.

  Padding is in branch -1, which no other sees.
  """
  tokens, positions, columns, targets = (
    np.zeros((batch, size), np.int32) for size in (T, T, Q, Q)
  )
  branches = np.full((batch, T), -1, np.int32)
  for b, row in enumerate(rows):
    n, q = len(row.tokens), len(row.queries)
    tokens[b, :n] = row.tokens
    positions[b, :n] = row.positions
    branches[b, :n] = row.branches
    columns[b, :q] = [column for column, _, _ in row.queries]
    targets[b, :q] = targets_of(row)
  return [tokens, positions, branches, columns, targets]


def whole_blocks(number: int) -> int:
  """The next multiple of `QUERIES`."""
  return -(-number // QUERIES) * QUERIES


def targets_of(row: Row) -> list[int]:
  """Ids of the row's scored tokens."""
  return [target for _, target, _ in row.queries]
