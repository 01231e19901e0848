"""How fast a run was, and what of memory it took, as HTML."""

from collections.abc import Sequence
from statistics import median

from adapt_pruner_jax.reporting.html import pieces
from adapt_pruner_jax.reporting.progress import duration, show


def section(phases: Sequence[dict], train: Sequence[dict]) -> str:
  """A table of the phases, and train steps in words; empty without phases.

  Args:
    phases, train: rows of metrics.jsonl of these kinds.
  """
  if not phases:
    return ""
  rows = []
  for row in phases:
    rate, memory, mfu = (row[n] for n in ("per_second", "memory_peak", "mfu"))
    rows.append(
      (
        *(row["title"], duration(row["seconds"])),
        "-" if rate is None else f"{show(rate)} {row['unit']}/s",
        "-" if mfu is None else f"{mfu:.1%}",
        "-" if memory is None else f"{memory / 1e9:.2f} GB",
      )
    )
  columns = ("phase", "time", "rate", "MFU", "memory at most")
  return pieces.section(
    "Speed and memory",
    f"{_steps(train)}Memory is of the fullest device of process 0, of CPUs "
    "of the process, at most until the phase ended.",
    pieces.table(columns, rows),
  )


def _steps(train: Sequence[dict]) -> str:
  """What a train step took, in words; empty if none was timed."""
  timed = [row for row in train if "step_seconds" in row]
  if not timed:
    return ""
  middle = lambda name: median(row[name] for row in timed)
  said = (
    f"A train step took {middle('step_seconds'):.3g} s, "
    f"{show(middle('tokens_per_second_per_chip'))} tokens a second and device"
  )
  if "mfu" in timed[0]:
    said += f", {middle('mfu'):.1%} of the device's peak"
  return f"{said} (medians). "
