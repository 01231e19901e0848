"""Documents as token ids, a group of them at a time, on one core or many.

Nothing here imports JAX: the processes that encode start in a moment.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from adapt_pruner_jax.data.rows import Document
from adapt_pruner_jax.data.sources import Place
from adapt_pruner_jax.data.tokenizer import Tokenizer, check_ids
from adapt_pruner_jax.errors import UserError

# Characters that are encoded at a time: a second of one core, little memory.
GROUP_CHARS = 1 << 20
# Groups that are encoded before other processes are worth their start.
AT_HOME = 2
AHEAD = 2  # groups that each process has, or has encoded


class Chunk(NamedTuple):
  """Holds whole documents, encoded, one after the other."""

  tokens: np.ndarray  # int32 [N]
  lengths: np.ndarray  # int64 [documents], without empty ones
  trained: np.ndarray  # bool [N]: what is to be learnt


NOTHING = Chunk(np.zeros(0, "<i4"), np.zeros(0, "<i8"), np.zeros(0, bool))


class Group(NamedTuple):
  """Holds documents that are encoded together."""

  documents: list[Document]
  place: Place  # behind the last of them
  chars: int


def groups(located: Iterable[tuple[Document, Place]]) -> Iterator[Group]:
  """Puts documents together, about GROUP_CHARS characters of them."""
  found, size, place = [], 0, Place()
  for document, place in located:
    content = document.content
    found.append(document)
    size += len(content if isinstance(content, str) else str(content))
    if size >= GROUP_CHARS:
      yield Group(found, place, size)
      found, size = [], 0
  if found:
    yield Group(found, place, size)


def encode(
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  loss: str,
  vocab_size: int,
) -> Chunk:
  """Encodes documents.

  Args:
    documents: at least one.
    tokenizer: the model's.
    loss: all, or assistant for what is learnt.
    vocab_size: of the model.

  Raises:
    UserError: an id outside the vocabulary, or a chat that cannot be laid out.
  """
  tokens, trained = [], []
  encoded = _encoded(documents, tokenizer, loss)
  for document, (ids, said) in zip(documents, encoded, strict=True):
    check_ids(ids, vocab_size, document.where, tokenizer)
    tokens.append(ids)
    trained.append(np.ones(len(ids), bool) if said is None else said)
  lengths = np.array([len(ids) for ids in tokens if len(ids)], "<i8")
  return Chunk(np.concatenate(tokens), lengths, np.concatenate(trained))


# ---- On many cores -----------------------------------------------------------


def encode_all(
  found: Iterable[Group], how: tuple[Tokenizer, str, int], processes: int
) -> Iterator[tuple[Group, Chunk]]:
  """Encodes groups in order, each as `encode` does.

  Args:
    how: tokenizer, loss and vocab_size of `encode`.
    processes: that encode, once it is clear that there is much to do; 1 = this
      one does it alone.

  Raises:
    UserError: as `encode`, or one of the processes was killed.
  """
  found = iter(found)
  alone = AT_HOME if processes > 1 else None
  for group in itertools.islice(found, alone):
    yield group, encode(group.documents, *how)
  first = next(found, None)
  if first is None:
    return
  waiting, most = collections.deque(), AHEAD * processes
  started = False  # the others: they import for half a second
  with _workers(how, processes) as workers:
    turns = itertools.cycle(workers)
    for group in itertools.chain([first], found):
      started = started or workers[0].has_answered()
      if started or len(waiting) < most:
        worker = next(turns)
        worker.send(group.documents)
        waiting.append((group, worker.receive))
      else:
        chunk = encode(group.documents, *how)
        waiting.append((group, lambda chunk=chunk: chunk))
      while started and len(waiting) > most:
        group, chunk_of = waiting.popleft()
        yield group, chunk_of()
    for group, chunk_of in waiting:
      yield group, chunk_of()


class Worker:
  """A process that encodes what it is sent, in order.

  Each has a pipe of its own, and no lock is shared: of `ProcessPoolExecutor`
  one that is killed while it answers leaves all others waiting for ever.
  """

  def __init__(self, how: tuple):
    """Starts it; `how` is as in `encode_all`."""
    # A copy of a process with JAX's threads in it may hang.
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=_work, args=(theirs, how), daemon=True
    )
    self._process.start()
    theirs.close()

  def send(self, documents: list[Document]) -> None:
    """Gives it documents; it takes them while it encodes others."""
    with _while_it_lives():
      self._pipe.send(documents)

  def has_answered(self) -> bool:
    """Whether an answer waits, or it has ended."""
    return self._pipe.poll()

  def receive(self) -> Chunk:
    """The next answer.

    Raises:
      UserError: as `encode`, or it has ended.
    """
    with _while_it_lives():
      chunk = self._pipe.recv()
    if isinstance(chunk, Exception):
      raise chunk
    return chunk

  def end(self) -> None:
    """Ends it, whatever it is at."""
    self._process.kill()
    self._process.join()
    self._pipe.close()


@contextlib.contextmanager
def _workers(how: tuple, number: int) -> Iterator[list[Worker]]:
  workers = []
  try:
    for _ in range(number):
      workers.append(Worker(how))
    yield workers
  finally:
    for worker in workers:
      worker.end()


@contextlib.contextmanager
def _while_it_lives() -> Iterator[None]:
  try:
    yield
  except (EOFError, OSError) as error:
    raise UserError(
      "a process that tokenises has ended, killed for its memory perhaps: "
      "give the machine more, or fewer cores (taskset); what was tokenised is "
      "kept, and the same command goes on"
    ) from error


def _work(pipe: Connection, how: tuple) -> None:
  """What a worker does until it is ended."""
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first one
  waiting = queue.SimpleQueue()
  threading.Thread(target=_take, args=(pipe, waiting), daemon=True).start()
  while True:
    try:
      answer = encode(waiting.get(), *how)
    except Exception as error:  # is raised where it was sent from
      answer = error
    pipe.send(answer)


def _take(pipe: Connection, waiting: queue.SimpleQueue) -> None:
  """Takes what is sent; whoever is killed with -9 ends its workers so."""
  with contextlib.suppress(EOFError, OSError):
    while True:
      waiting.put(pipe.recv())
  os._exit(1)


# ---- A group -----------------------------------------------------------------

Encoded = tuple[np.ndarray, np.ndarray | None]  # ids, and which are trained


def _encoded(
  group: Sequence[Document], tokenizer: Tokenizer, loss: str
) -> list[Encoded]:
  """Token ids of documents; with loss=assistant also which are to be learnt."""
  found: list[Encoded | None] = [_given(document, loss) for document in group]
  laid_out = {
    i: _laid_out(document, tokenizer, loss)
    for i, document in enumerate(group)
    if document.tokens is None
  }
  for chat in (False, True):
    mine = [i for i, text in laid_out.items() if text[2] == chat]
    texts = [laid_out[i][0] for i in mine]
    if loss == "assistant":
      spans = [laid_out[i][1] for i in mine]
      encoded = tokenizer.encode_batch_said(texts, spans, special=not chat)
    else:
      encoded = [
        (ids, None) for ids in tokenizer.encode_batch(texts, special=not chat)
      ]
    for i, (ids, said) in zip(mine, encoded, strict=True):
      found[i] = _framed(ids, said, tokenizer, closed=not chat)
  return found


def _given(document: Document, loss: str) -> Encoded | None:
  """The tokens of a document that brings its own."""
  if document.tokens is None:
    return None
  tokens = np.array(document.tokens, np.int64).clip(-1, 2**31 - 1).astype("<i4")
  said = np.arange(len(tokens)) >= document.prompt
  return tokens, said if loss == "assistant" else None


def _laid_out(
  document: Document, tokenizer: Tokenizer, loss: str
) -> tuple[str, list[tuple[int, int]], bool]:
  """A document's text, where in it what is learnt is, and whether a chat
  template made it."""
  content, prompt = document.content, document.prompt
  if document.plain is not None and tokenizer.chat_template is None:
    content, prompt = "".join(document.plain), len(document.plain[0])
  if isinstance(content, str):
    return content, [(prompt, len(content))], False
  try:
    if loss == "assistant":
      return *tokenizer.chat_spans(content, document.tools, prompt), True
    return tokenizer.render_chat(content, document.tools), [], True
  except UserError as error:
    raise UserError(f"{document.where}: {error}") from error


def _framed(
  ids: np.ndarray, said: np.ndarray | None, tokenizer: Tokenizer, closed: bool
) -> Encoded:
  """`ids` with the begin token and, if `closed`, the end token, each once."""
  begin, end = tokenizer.begin_id, tokenizer.eos_id
  before = [begin] if begin is not None and len(ids) and ids[0] != begin else []
  after = [end] if closed and end is not None and len(ids) else []
  if after and ids[-1] == end:  # the tokenizer's own
    ids, said = ids[:-1], None if said is None else said[:-1]
  ids = np.concatenate([before, ids, after], dtype="<i4", casting="unsafe")
  if said is not None:
    said = np.concatenate([[False] * len(before), said, [True] * len(after)])
    said = said.astype(bool)
  return ids, said
