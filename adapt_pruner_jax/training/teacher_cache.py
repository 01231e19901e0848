"""A teacher's likeliest tokens of training rows, on disk once for all stages.

Before a stage trains, the teacher answers the rows that the file lacks, and is
then given up: it takes no memory while the stage trains, and is not even loaded
for rows that were seen before, in an earlier stage, epoch or part of the run. A
record has the digest of its row, so the file serves any order of rows, and one
that a kill has cut is as good as never written.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Train
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import publish
from adapt_pruner_jax.training import forward, loop, losses, output_loss, step

READ = ("tokens_BT", "segments_BT", "positions_BT")  # what an answer depends on


class TeacherCache:
  """The file, and where in it each row is."""

  def __init__(self, path: str | os.PathLike, length: int, number: int):
    """Opens the file, or begins one.

    Args:
      path: of the file; another teacher has another one.
      length: tokens of a row.
      number: of likeliest tokens, C.
    """
    self.path, self.dtype = Path(path), record(length, number)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.touch()
    whole = self.path.stat().st_size // self.dtype.itemsize
    os.truncate(self.path, whole * self.dtype.itemsize)
    self.at: dict[bytes, int] = {}
    if whole:
      found = np.memmap(self.path, self.dtype, mode="r")["digest"]
      self.at = {digest.tobytes(): i for i, digest in enumerate(found)}

  def lacks(self, batch: step.Batch) -> bool:
    """Whether a row of the batch is not in the file."""
    return any(digest not in self.at for digest in digests(batch))

  def add(self, batch: step.Batch, taught: losses.Likeliest) -> None:
    """Writes what the teacher finds of the rows that are not in the file.

    Raises:
      UserError: it cannot be written, as where a disk is full.
    """
    ids_BTC, log_probs_BTC = map(np.asarray, jax.device_get(taught))
    records = []
    for row, digest in enumerate(digests(batch)):
      if digest not in self.at:
        self.at[digest] = len(self.at)
        one = np.zeros((), self.dtype)
        one["digest"] = np.frombuffer(digest, np.uint8)
        one["ids"], one["log_probs"] = ids_BTC[row], log_probs_BTC[row]
        records.append(one)
    try:
      with open(self.path, "ab") as file:
        file.write(np.array(records, self.dtype).tobytes())
    except OSError as error:
      raise publish.unwritable(self.path, error) from error

  def with_taught(self, batches: Iterable[step.Batch]) -> Iterator[step.Batch]:
    """The batches, all of whose rows are in the file, with what it has."""
    file = np.memmap(self.path, self.dtype, mode="r")
    for batch in batches:
      found = file[[self.at[digest] for digest in digests(batch)]]
      taught = found["ids"].astype(np.int32), found["log_probs"]
      yield {**batch, **dict(zip(step.TAUGHT, taught, strict=True))}


def record(length: int, number: int) -> np.dtype:
  """What the file has of a row of so many tokens."""
  shape = length, number
  return np.dtype(
    [
      ("digest", np.uint8, 16),
      ("ids", np.uint32, shape),
      ("log_probs", np.float16, shape),
    ]
  )


def digests(batch: step.Batch) -> list[bytes]:
  """Of each row of a batch."""
  made = []
  for row in zip(*(np.asarray(batch[name]) for name in READ), strict=True):
    digest = hashlib.blake2b(digest_size=16)
    for array in row:
      digest.update(np.ascontiguousarray(array, np.int32))
    made.append(digest.digest())
  return made


def fill(
  cache: TeacherCache,
  batches: Iterable[step.Batch],
  teacher: Callable[[], tuple[ModelConfig, Params]],
  settings: Train,
  mesh: Mesh,
) -> Iterator[int]:
  """Lets the teacher answer what the cache lacks.

  Args:
    cache: that is filled.
    batches: those that will be trained on.
    teacher: gives the pair; called once, if any row is lacking.
    settings: of the training: the dtype, and how many tokens are kept.
    mesh: the devices.

  Yields:
    How many batches the cache now has.
  """
  likeliest, params = None, None
  for number, batch in enumerate(batches, 1):
    if cache.lacks(batch):
      if likeliest is None:
        config, params = teacher()
        answer = partial(_answer, config, settings, mesh)
        likeliest = jax.jit(answer, out_shardings=sharding.replicated(mesh))
      cache.add(batch, likeliest(params, loop.place(batch, mesh)))
    yield number


def _answer(config, settings, mesh, params, batch) -> losses.Likeliest:
  x_BTD, matrix = forward.frozen_ends(config, settings, params, batch, mesh)
  number = step.likeliest(settings, config)
  return output_loss.likeliest(
    config, mesh, matrix, x_BTD, number, settings.distill_temperature
  )
