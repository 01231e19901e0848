"""Calibration windows: what pruning steps and refits look at.

Windows are drawn anywhere from token streams (`token_store.py`); `batch(step)`
of any step is the same whatever was drawn before. Or a file gives them.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapt_pruner_jax.config import Calibration, Prune
from adapt_pruner_jax.data import tuning_questions
from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.token_store import Stream, tokenise
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class WindowData:
  """Draws windows anywhere from token streams, fresh ones for each step.

  With a begin token, it takes the place of each window's first token.
  """

  streams: Sequence[Stream]
  counts: Sequence[int]  # windows a step from each stream
  seq_len: int
  seed: int
  begin_id: int | None = None

  def batch(self, step: int) -> np.ndarray:
    """Draws pruning step `step`'s (from 0), int32 [samples, seq_len]."""
    windows = []
    for i, (stream, count) in enumerate(
      zip(self.streams, self.counts, strict=True)
    ):
      random = np.random.default_rng((self.seed % 2**32, step, i))
      last = len(stream.tokens) - self.seq_len
      barred = self._barred(stream, last, count)
      start = random.choice(last + 1 - len(barred), size=count, replace=False)
      # The n-th start that is not barred, for each n drawn.
      gaps = barred - np.arange(len(barred))
      start = start + np.searchsorted(gaps, start, side="right")
      windows.append(stream.tokens[start[:, None] + np.arange(self.seq_len)])
    samples = np.concatenate(windows)[evenly(self.counts)]
    if self.begin_id is not None:
      samples[:, 0] = self.begin_id
    return samples

  def _barred(self, stream: Stream, last: int, count: int) -> np.ndarray:
    """Where no window may start: before a document, whose own begin token would
    come second. Sorted, int64 [number]."""
    if self.begin_id is None:
      return np.zeros(0, np.int64)
    before = stream.starts[1:] - 1
    before = before[before <= last]
    # Too short a stream to be choosy.
    return before if last + 1 - len(before) >= count else before[:0]


def evenly(counts: Sequence[int]) -> np.ndarray:
  """An order of the sources' windows in which each is spread over the whole.

  Minibatches, and the last windows, which refits hold out, are then of all.
  """
  place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
  return np.argsort(place, kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class GivenData:
  """Hands out the samples that a file lists step by step."""

  path: str
  samples: np.ndarray  # integer [steps, samples, tokens]

  def batch(self, step: int) -> np.ndarray:
    """Reads pruning step `step`'s (from 0), int32 [samples, tokens].

    Raises:
      UserError: the file has no samples for that step.
    """
    if step >= len(self.samples):
      raise UserError(
        f"npy:{self.path} has samples for {len(self.samples)} pruning steps, "
        f"and step {step + 1} is asked for; give more, lower "
        "--config.prune.max_steps or take larger steps; a refit at the end "
        "takes one more, and so does each of its passes behind the first"
      )
    return np.asarray(self.samples[step], np.int32)


def calibration_data(
  config: Calibration,
  tokenizer: Tokenizer | None,
  vocab_size: int,
  seed: int,
  cache_dir: str | os.PathLike | None = None,
  say: Callable[[str], None] | None = None,
  stop: Callable[[], None] | None = None,
  *,
  steps: int = 0,
) -> WindowData | GivenData:
  """Opens `config.source`; `batch(step)` then gives the samples of any step.

  No window is padded, and a step has no window twice. `npy:FILE` decides the
  number and length of the samples itself, is used as it is, and needs no
  tokenizer.

  Args:
    config: of the recipe.
    tokenizer: the model's; its `begin_id` starts every window.
    vocab_size: of the model; larger ids are an error.
    seed: of the drawing.
    cache_dir, say, stop: see `tokenise`.
    steps: that draw windows, about: much more text than they hold is not
      tokenised. 0 = all of it.

  Raises:
    UserError: the source is unreadable or too short, or has unknown ids.
  """
  sources = parse_sources(config.source, "calibration.source")
  if sources[0].kind == "npy":
    return _given(sources[0].name, vocab_size)
  shares = np.array([s.weight for s in sources])
  # Shares of the samples, rounded so that they add up.
  edges = np.round(np.cumsum(shares) / shares.sum() * config.samples)
  counts = np.diff(edges, prepend=0).astype(int).tolist()
  streams = []
  for source, count in zip(sources, counts, strict=True):
    need = config.seq_len + max(count, 1) - 1
    wanted = steps and max(need, steps * count * config.seq_len)
    stream = tokenise(
      source, tokenizer, vocab_size, cache_dir, say, wanted, stop
    )
    tokens = stream.tokens
    if len(tokens) < need:
      raise UserError(
        f"{source} is too short for calibration: it has {len(tokens)} tokens, "
        f"and {count} different windows of {config.seq_len} need {need}; give "
        "a longer text, or lower --config.calibration.seq_len, .samples or "
        ".refit_samples"
      )
    streams.append(stream)
  begin_id = tokenizer.begin_id
  return WindowData(streams, counts, config.seq_len, seed, begin_id)


class PruningData(NamedTuple):
  """The texts of a prune, each with windows of its own.

  Attributes:
    steps: what pruning steps read.
    refits: what refits read; `steps` where there are none.
    quality: what a loss or an accuracy to keep is measured on, if there is one.
    search: what a search tries its candidates on, if it has a text of its own.
  """

  steps: WindowData | GivenData
  refits: WindowData | GivenData
  quality: WindowData | tuning_questions.TuningQuestions | None
  search: WindowData | GivenData | None


def pruning_data(
  config: Calibration,
  settings: Prune,
  tokenizer: Tokenizer | None,
  vocab_size: int,
  seed: int,
  cache_dir: str | os.PathLike | None = None,
  say: Callable[[str], None] | None = None,
  stop: Callable[[], None] | None = None,
  *,
  steps: int = 0,
) -> PruningData:
  """Opens what a prune reads.

  Args:
    config: of the recipe.
    settings: say what there is beside the steps.
    tokenizer, vocab_size, seed, cache_dir, say, stop, steps: as
      `calibration_data`'s.

  Raises:
    UserError: as `calibration_data`.
  """

  def opened(more: int, steps: int = steps, **changes: Any):
    return calibration_data(
      dataclasses.replace(config, **changes),
      tokenizer,
      vocab_size,
      seed + more,
      cache_dir,
      say,
      stop,
      steps=steps,
    )

  first = refits = opened(0)
  if settings.refit != "none":
    refits = opened(1, samples=config.refit_samples)
  quality, search, tried = None, None, settings.search
  if settings.budget == "quality":
    if config.tuning.startswith(tuning_questions.PREFIX):
      quality = tuning_questions.read(config.tuning, tokenizer, vocab_size)
    else:
      quality = opened(2, steps=0, source=config.tuning or config.source)
  if tried.source:
    rows = -(-tried.tokens // config.seq_len)
    search = opened(2, source=tried.source, samples=rows)
  return PruningData(first, refits, quality, search)


def _given(path: str, vocab_size: int) -> GivenData:
  try:
    samples = np.load(path, mmap_mode="r", allow_pickle=False)
  except OSError as error:
    raise UserError(f"npy:{path}: {error.strerror or error}") from error
  except (ValueError, EOFError) as error:
    raise UserError(
      f"npy:{path} is not a plain .npy array: {error}; write it with np.save, "
      "int32 [steps, samples, tokens]"
    ) from error
  shape = getattr(samples, "shape", None)  # an .npz has none
  if shape is None or len(shape) != 3 or 0 in shape or shape[2] < 2:
    raise UserError(
      f"npy:{path} has shape {shape}; it must be [steps, samples, tokens], "
      "none empty, with at least 2 tokens"
    )
  if samples.dtype.kind not in "iu":
    raise UserError(
      f"npy:{path} has dtype {samples.dtype}; it must be an integer, as int32"
    )
  for step, ids in enumerate(samples):
    check_ids(ids, vocab_size, f"npy:{path} step {step}")
  return GivenData(path, samples)
