"""A latency table: what attention and MLPs of some widths cost on a device.

`adapt-pruner profile` writes one; a table of another engine (llama.cpp, vLLM)
can be written by hand (docs/budgets.md says how). A JSON object:

  format     "adapt-pruner latency 1"
  device     the hardware's name
  engine     jax, transformers, or any other that was timed
  dtype      of the weights
  model      hidden_size, head_dim, queries_per_group, vocab_size
  multiples  {"kv_groups": 1, "ffn": 128}, widths at which time falls
  measured   a list; each has phase (decode: one token of all rows, prefill: all
             prompts), batch, context, rest_ms (all but the layers) and, of one
             layer, attention_ms and mlp_ms: [[width, milliseconds], ...] with
             rising widths, from 0 on. output_ms, where a vocabulary may be cut:
             the part of rest_ms that falls with it, by tokens, to vocab_size
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner_jax.errors import UserError

FORMAT = "adapt-pruner latency 1"
MODEL = ("hidden_size", "head_dim", "queries_per_group", "vocab_size")
CURVES = {"K": "attention_ms", "F": "mlp_ms"}
OUTPUT = "output_ms"
NANO = 10**6  # nanoseconds of a millisecond: whole numbers to count in


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
  """One measurement of a table, in whole nanoseconds.

  Attributes:
    rest: of all but the layers, with the vocabulary of the table's model.
    points: {"K": int [2, points], "F": ...}, widths and their times.
    multiples: what widths are best multiples of, by unit letter.
    output: tokens and their times, int [2, points]; None = not known.
  """

  rest: int
  points: dict[str, np.ndarray]
  multiples: dict[str, int]
  output: np.ndarray | None = None

  def outside(self, tokens: int) -> int:
    """Nanoseconds of all but the layers, with a vocabulary of so many."""
    if self.output is None:
      return self.rest
    saved = self.output[1][-1] - np.interp(tokens, *self.output)
    return max(self.rest - int(saved), 0)

  def half(self, unit: str, width: Any) -> np.ndarray:
    """Nanoseconds of a layer's attention (K) or MLP (F) of these widths.

    Between two points on the line between them, at whole multiples: the width
    in between costs as much as the next. No width costs less than a narrower.
    """
    step = self.multiples[unit]
    at = -(-np.asarray(width, np.int64) // step) * step
    widths, times = self.points[unit]
    inside = np.interp(at, widths, np.maximum.accumulate(times))
    return np.where(np.asarray(width) > 0, np.rint(inside), 0).astype(np.int64)


def costs(file: str, phase: str, batch: int, context: int) -> Costs:
  """The measurement of a table's file that was taken so.

  Raises:
    UserError: no such file, it is no table, or it has no such measurement.
  """
  table = read(file)
  found = {(m["phase"], m["batch"], m["context"]): m for m in table["measured"]}
  wanted = found.get((phase, batch, context))
  if wanted is None:
    have = "; ".join(f"{p} of batch {b} at {c}" for p, b, c in found)
    raise UserError(
      f"--config.prune.budget_table={file} has no {phase} of batch {batch} at "
      f"context {context}: it has {have}; set --config.prune.budget_phase, "
      ".budget_batch and .budget_context, or measure it: adapt-pruner profile"
    )
  nanoseconds = lambda ms: round(ms * NANO)
  curve = lambda name: (
    np.array([[w, nanoseconds(ms)] for w, ms in wanted[name]], np.int64).T
  )
  points = {u: curve(name) for u, name in CURVES.items()}
  steps = table["multiples"]
  multiples = {"K": steps["kv_groups"], "F": steps["ffn"]}
  output = curve(OUTPUT) if OUTPUT in wanted else None
  return Costs(nanoseconds(wanted["rest_ms"]), points, multiples, output)


def read(file: str) -> dict:
  """A table's content, checked.

  Raises:
    UserError: no such file, or it is no table.
  """
  path = Path(os.path.expanduser(file))
  try:
    return _read(str(path), path.stat().st_mtime_ns)
  except OSError as error:
    raise UserError(
      f"--config.prune.budget_table={file}: {error.strerror}; adapt-pruner "
      "profile --model=DIR --out=FILE writes one"
    ) from error


@functools.lru_cache
def _read(file: str, changed: int) -> dict:
  del changed  # a file that was written anew is read anew
  try:
    table = json.loads(Path(file).read_text("utf-8"))
  except ValueError as error:
    raise _bad(file, f"it is no JSON ({error})") from error
  if not isinstance(table, dict) or table.get("format") != FORMAT:
    raise _bad(file, f'it does not begin with "format": "{FORMAT}"')
  try:
    _check(table)
  except (KeyError, TypeError, ValueError) as error:
    what = f"lacks {error}" if isinstance(error, KeyError) else f"has {error}"
    raise _bad(file, f"it {what}") from error
  return table


def _check(table: dict) -> None:
  """Raises a KeyError or ValueError for what is missing or makes no sense."""
  for name in ("device", "engine", "dtype"):
    if not isinstance(table[name], str):
      raise ValueError(f"a {name} that is no text")
  wholes = [table["model"][name] for name in MODEL]
  wholes += [table["multiples"][name] for name in ("kv_groups", "ffn")]
  if not table["measured"]:
    raise ValueError("nothing measured")
  for m in table["measured"]:
    wholes += [m["batch"], m["context"]]
    if m["phase"] not in ("decode", "prefill"):
      raise ValueError(f"a phase {m['phase']}, not decode or prefill")
    numbers = [m["rest_ms"]]
    curves = [*CURVES.values(), *({OUTPUT} & m.keys())]
    for name in curves:
      widths = [w for w, _ in m[name]]
      numbers += [ms for _, ms in m[name]]
      if len(widths) < 2 or widths[0] or widths != sorted({*widths}):
        raise ValueError(f"{name} whose widths do not rise from 0")
    if OUTPUT in m and m[OUTPUT][-1][0] != table["model"]["vocab_size"]:
      raise ValueError(f"{OUTPUT} that does not end at the vocab_size")
    if not all(math.isfinite(ms) and ms >= 0 for ms in numbers):
      raise ValueError("a time that is negative or not finite")
  if not all(isinstance(n, int) and n > 0 for n in wholes):
    raise ValueError("a size that is no whole number above 0")


def _bad(file: str, why: str) -> UserError:
  return UserError(
    f"--config.prune.budget_table={file} is no latency table: {why}; "
    "docs/budgets.md has the format"
  )
