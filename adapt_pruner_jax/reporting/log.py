"""What a run tells: the console, metrics.jsonl, TensorBoard, trackers.

Only process 0 speaks and writes. Durations come from a clock that never goes
backwards; the wall clock is only noted in the rows of metrics.jsonl.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.devices import peak_flops, peak_memory
from adapt_pruner_jax.reporting.progress import Phase, show
from adapt_pruner_jax.reporting.tensorboard import Events
from adapt_pruner_jax.reporting.trace import Profile
from adapt_pruner_jax.reporting.trackers import Trackers
from adapt_pruner_jax.storage import json_files
from adapt_pruner_jax.storage.outbox import Outbox

METRICS = "metrics.jsonl"
EVERY = 10.0  # seconds between the lines of a phase without a terminal


class _Console(Console):
  """A console whose reader may go away: the run goes on without."""

  def on_broken_pipe(self) -> None:
    with contextlib.suppress(SystemExit):
      super().on_broken_pipe()


class Log:
  """The voice of a run; also a context manager.

  Attributes:
    outbox: writes the files that change at every step.
    profile: traces train steps.
  """

  def __init__(
    self,
    workdir: Path | None,
    tensorboard: bool = True,
    trackers: str = "",
    profile_steps: str = "",
    stderr: bool = False,
  ):
    """Files are made, and trackers opened, when there is something to write.

    Args:
      workdir: gets metrics.jsonl and tensorboard/; None = console only.
      trackers: "wandb", "trackio", or both with a comma.
      profile_steps: train steps that `profile` traces.
      stderr: the console is stderr, where stdout is for a result.

    Raises:
      UserError: a tracker is unknown or not installed.
    """
    self._console = _Console(quiet=not agreement.is_writer(), stderr=stderr)
    self._workdir = workdir if agreement.is_writer() else None
    self._tensorboard = tensorboard
    self.outbox = Outbox()
    self._events: dict[str, Events] = {}  # of each kind
    self._restart: dict[str, int] = {}  # first step that is done again
    self._trackers = Trackers(trackers, self._workdir)
    self.profile = Profile(profile_steps, self._workdir, self.say)
    # Phases that ended before there was another row: the directory may still be
    # somebody else's.
    self._ended: list[dict[str, Any]] | None = []

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, kind: type | None, *_: Any) -> None:
    # What ended the run is what its user has to hear of.
    with contextlib.suppress(*[UserError] if kind else []):
      self.close()

  def say(self, text: str) -> None:
    """A line on the console."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """A row {"kind", "step", ..., "time"} of metrics.jsonl, and its scalars.

    Args:
      kind: what `step` counts, such as "train"; TensorBoard shows it as a run.
    """
    if self._workdir is None:
      return
    values = json_files.plain(values)  # what is not finite becomes a string
    row = {"kind": kind, "step": step, **values, "time": time.time()}
    self.outbox.append(self._workdir / METRICS, row)
    scalars = {n: v for n, v in values.items() if isinstance(v, int | float)}
    if self._tensorboard and scalars:
      self._events_of(kind).add(step, scalars)
    # Trackers want one step count that only rises; each kind has its own.
    named = {f"{kind}/{name}": value for name, value in scalars.items()}
    self._trackers.log({f"{kind}/step": step} | named)
    ended, self._ended = self._ended, None
    for values in ended or []:
      self._add_phase(values)

  def rewind(self, kind: str, step: int) -> None:
    """Forgets the rows of this kind from `step` on: a resumed run redoes them.

    Raises:
      UserError: metrics.jsonl is damaged.
    """
    if self._workdir is None:
      return
    path = self._workdir / METRICS
    rows = self.outbox.rows(path)
    kept = [r for r in rows if r["kind"] != kind or r["step"] < step]
    if len(kept) < len(rows):
      self.outbox.rewrite(path, kept)
    self._restart[kind] = step
    if kind in self._events:
      self._events.pop(kind).close()

  @contextlib.contextmanager
  def phase(
    self, title: str, total: float, unit: str, flops: float = 0.0
  ) -> Iterator[Phase]:
    """Shows how far something is: live on a terminal, else a line at times.

    Args:
      title: such as "stage 2 of 4: train".
      total: what `Phase.update` will end at, in `unit`s.
      unit: such as "tokens"; shown, and shown a second.
      flops: model FLOPs for each unit, all devices together; shows the MFU if
        the device's peak is known.
    """
    peak = peak_flops(jax.devices()[0])
    seconds = flops / (peak * jax.device_count()) if peak and flops else None
    if not self._console.is_terminal:
      phase = Phase(title, total, unit, seconds, _in_lines(self.say))
      phase.begin()
      yield phase
      self._end(phase)
      self.say(phase.line())
      return
    with Live(console=self._console) as live:
      phase = Phase(
        title, total, unit, seconds, lambda p: live.update(_view(p))
      )
      phase.begin()
      yield phase
      self._end(phase)
      live.update(_view(phase))

  def _end(self, phase: Phase) -> None:
    """Notes what a phase took, as a row of the kind "phase"."""
    phase.end(peak_memory())
    if self._workdir is None:
      return
    if self._ended is None:
      self._add_phase(phase.result())
    else:
      self._ended.append(phase.result())

  def _add_phase(self, values: dict[str, Any]) -> None:
    rows = self.outbox.rows(self._workdir / METRICS)
    number = sum(row["kind"] == "phase" for row in rows)
    self.metrics("phase", number, values)

  def table(
    self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
  ) -> None:
    """A table; numbers are right-aligned, and written with commas."""
    cells = [[show(value) for value in row] for row in rows]
    right = [
      all(isinstance(row[i], int | float | None) for row in rows)
      for i in range(len(columns))
    ]
    if self._console.is_terminal:
      table = Table(title=Text(title), title_justify="left")
      for name, number in zip(columns, right, strict=True):
        table.add_column(name, justify="right" if number else "left")
      for row in cells:
        table.add_row(*map(Text, row))
      self._console.print(table)
      return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    self.say(title)
    for line in lines:
      aligned = [
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(line, widths, right, strict=True)
      ]
      self.say("  ".join(aligned).rstrip())

  def close(self) -> None:
    """Writes out all that is still held."""
    self.outbox.merge()
    while self._events:
      self._events.popitem()[1].close()
    self._trackers.close()

  def _events_of(self, kind: str) -> Events:
    if kind not in self._events:
      directory = self._workdir / "tensorboard" / kind
      self._events[kind] = Events(directory, self._restart.pop(kind, None))
    return self._events[kind]


def _in_lines(say: Callable[[str], None]) -> Callable[[Phase], None]:
  """Shows a phase as a line, at once and then every EVERY seconds."""
  last = -math.inf

  def show_line(phase: Phase) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last >= EVERY:
      last = now
      say(phase.line())

  return show_line


def _view(phase: Phase) -> Group:
  """A phase on a terminal: its title with a bar, and the details below."""
  bar = ProgressBar(phase.total, phase.done, width=30)
  head = Table.grid(padding=(0, 1))
  head.add_row(Text(phase.title, style="bold"), bar)
  return Group(head, Text(phase.details()))
