"""Training rows and held-out tokens: documents packed into rows of one length.

All of it is arithmetic on token streams (`token_store.py`) with random access:
`batch(step)` of any step is the same whatever was read before, so the position
that a checkpoint has to save is the step, and it means the same on any number
of processes.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from adapt_pruner_jax.config import Data
from adapt_pruner_jax.data import order
from adapt_pruner_jax.data.sources import Source, parse_sources
from adapt_pruner_jax.data.token_store import Stream, tokenise
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import digest


class PackedRows:
  """Cuts a stream into fixed rows, by index.

  Row r has the targets [r*T + 1, (r+1)*T + 1) and, one before, the inputs, so
  that every token but the first of a document is predicted exactly once. A
  document that goes on in the next row starts there anew: nothing before it is
  seen.

  With a begin token, which starts each document of the stream, row r has the
  targets [r*T, (r+1)*T). The begin token stands before them, in the place of
  what it hides; a row whose first token starts a document has that document's
  own there, and one target less. It is predicted nowhere, and everything else
  exactly once.
  """

  def __init__(self, stream: Stream, seq_len: int, begin_id: int | None = None):
    """Cuts a stream into rows.

    Args:
      stream: the documents.
      seq_len: tokens a row, T.
      begin_id: of `Tokenizer.begin_id`; None = rows start with what comes.
    """
    self.stream, self.seq_len, self.begin_id = stream, seq_len, begin_id

  def __len__(self) -> int:
    predicted = len(self.stream.tokens) - (self.begin_id is None)
    return -(-predicted // self.seq_len)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    """Cuts one row of each array that `TrainData.batch` stacks, [T]."""
    T, stream = self.seq_len, self.stream
    first = row * T
    tokens = stream.tokens[first : first + T + 1]
    at = np.arange(first, first + len(tokens))
    document = np.searchsorted(stream.starts, at, side="right")
    start = np.maximum(stream.starts[document - 1], first)
    learnt = np.ones(len(tokens), bool)
    if stream.trained is not None:
      learnt = stream.trained[first : first + len(tokens)]
    if self.begin_id is not None and stream.starts[document[0] - 1] == first:
      learnt = np.append(learnt[:T], False)[: len(tokens)]  # by the next row
    elif self.begin_id is not None:
      tokens = np.append(self.begin_id, tokens[:T])
      at, start = (np.append(first - 1, x[:T]) for x in (at, start))
      start = np.where(start == first, first - 1, start)
      document = np.append(document[0], document[:T])
      learnt = np.append(False, learnt[:T])
    counts = (document[1:] == document[:-1]) & learnt[1:]
    padding = T + 1 - len(tokens)
    columns = {
      "tokens_BT": (tokens[:-1], np.int32),
      "targets_BT": (tokens[1:], np.int32),
      "segments_BT": ((document - document[0] + 1)[:-1], np.int32),
      "positions_BT": ((at - start)[:-1], np.int32),
      "weights_BT": (counts, np.float32),
    }
    return {
      name: np.pad(column, (0, padding)).astype(dtype)
      for name, (column, dtype) in columns.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class TrainData:
  """Hands out rows, shuffled and endlessly repeated.

  Each process builds the rows that its devices need: those of one `tensor`
  group need the same ones, also where it spans processes.
  """

  rows: Any  # index -> row, endlessly: a grain.MapDataset or `order.InRuns`
  size: int  # rows a step
  places: tuple[int, ...]  # of a step's rows, those that this process needs
  num_tokens: int  # of one epoch, over all sources
  fingerprint: str  # of all tokens; a run only continues on the same ones
  sources: tuple[tuple[float, int], ...]  # of each: share of the rows, tokens
  whole: bool  # all of the sources was tokenised; else what is needed
  streams: tuple[Stream, ...]

  def epochs(self, tokens: int) -> float:
    """How often the source that repeats most is read in `tokens` tokens."""
    return max(share * tokens / size for share, size in self.sources)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Stacks the rows of train step `step` (from 0).

    Returns:
      Arrays [B, T], 0 in rows that this process does not need: `tokens_BT`
      and the `targets_BT` that follow them, `segments_BT` (documents of the row
      from 1; 0 = padding) and `positions_BT` (from 0 in each of them), all
      int32, and `weights_BT`, float32, 1 where the target is to be learnt.
    """
    rows = {p: self.rows[step * self.size + p] for p in self.places}
    like = rows[self.places[0]]
    batch = {
      name: np.zeros((self.size, *x.shape), x.dtype) for name, x in like.items()
    }
    for place, row in rows.items():
      for name, column in row.items():
        batch[name][place] = column
    return batch

  def batches(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields `batch` of `first_step` and of all steps after it.

    The next one is made in a thread while this one is in use.
    """
    with ThreadPoolExecutor(1) as thread:
      ahead = thread.submit(self.batch, first_step)
      for step in itertools.count(first_step + 1):
        batch, ahead = ahead.result(), thread.submit(self.batch, step)
        yield batch


def train_data(
  config: Data,
  tokenizer: Tokenizer,
  vocab_size: int,
  seed: int,
  cache_dir: str | os.PathLike | None = None,
  say: Callable[[str], None] | None = None,
  stop: Callable[[], None] | None = None,
  *,
  tokens: int = 0,
  places: Sequence[int] | None = None,
) -> TrainData:
  """Opens `config.source`; `batch(step)` then gives the rows of any step.

  Rows are shuffled over the whole of each source, anew in every epoch; if one
  has `order.LONG` tokens, in blocks.

  Args:
    config: of the recipe.
    tokenizer: the model's; its `begin_id` starts every row.
    vocab_size: of the model; larger ids are an error.
    seed: of the order of the rows.
    cache_dir, say, stop: see `tokenise`.
    tokens: that will be trained on: no more of a source is tokenised. 0 = all.
    places: of a step's rows, those that this process needs; default all.

  Raises:
    UserError: the source is unreadable or empty.
  """
  sources = parse_sources(config.source, "data.source")
  if sources[0].kind == "npy":
    raise UserError(
      f"--config.data.source={config.source}: npy is for calibration only; "
      "give text:FILE, jsonl:FILE, parquet:FILE, hf:NAME, tfds:NAME or embedded"
    )
  weights = sum(s.weight for s in sources)

  def need(source: Source) -> int:
    if not tokens:
      return 0
    rows = -(-tokens // config.step_tokens) * config.batch
    return (int(rows * source.weight / weights) + 2) * config.seq_len

  streams = [
    tokenise(s, tokenizer, vocab_size, cache_dir, say, need(s), stop)
    for s in sources
  ]
  packed = [PackedRows(s, config.seq_len, tokenizer.begin_id) for s in streams]
  return TrainData(
    rows=_shuffled(packed, [s.weight for s in sources], seed, config.batch),
    size=config.batch,
    places=tuple(range(config.batch) if places is None else places),
    num_tokens=sum(len(s.tokens) for s in streams),
    fingerprint=digest.of_bytes(
      *[s.fingerprint.encode() for s in streams],
      # Whoever began with another order does not go on with this one.
      *([b"in runs"] if _is_long(packed) else []),
    ),
    whole=all(stream.whole for stream in streams),
    sources=tuple(
      (source.weight / weights, len(stream.tokens))
      for source, stream in zip(sources, streams, strict=True)
    ),
    streams=tuple(streams),
  )


def _shuffled(
  packed: Sequence[PackedRows],
  weights: Sequence[float],
  seed: int,
  batch: int,
) -> Any:
  """Rows of all sources in an endless order, by index."""
  if _is_long(packed):
    return order.InRuns(packed, weights, seed, batch)
  import grain  # takes a second to import

  parts = [
    grain.MapDataset.source(rows).seed((seed + i) % 2**32).shuffle().repeat()
    for i, rows in enumerate(packed)
  ]
  return order.mixed(parts, weights)


def _is_long(packed: Sequence[PackedRows]) -> bool:
  return any(len(rows.stream.tokens) >= order.LONG for rows in packed)


def heldout_tokens(
  text: str, tokenizer: Tokenizer, vocab_size: int, where: str = "eval.text"
) -> np.ndarray:
  """Encodes a whole text at once, for the perplexity: int32 [N].

  Raises:
    UserError: fewer than 2 tokens, or ids outside the vocabulary.
  """
  ids = np.array(tokenizer.encode(text), np.int64)
  if len(ids) < 2:
    raise UserError(
      f"{where} has {len(ids)} tokens; a perplexity needs at least 2"
    )
  check_ids(ids, vocab_size, where, tokenizer)
  return ids.astype(np.int32)
