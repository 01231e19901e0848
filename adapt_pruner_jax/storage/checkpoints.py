"""Checkpoints that survive kills, full disks and flipped bits (Orbax).

A step is a directory with two items: `meta`, JSON that says what the arrays
are, and `state`, the arrays. Orbax writes it under another name and renames it
when it is whole, so that a kill leaves nothing half-written. Two things it does
not do are done here. It deletes old steps in place, and a kill in the middle
would leave a listed step with parts missing: they are moved to a trash
directory, which process 0 empties. It does not checksum the arrays, and a
flipped bit would be garbage that nobody sees: `meta` has a fingerprint of each
array, and a digest of itself.

In a bucket, where nothing can be renamed, Orbax writes under the step's own
name and commits it by an object. An old step that a kill left half deleted is
listed there until the next save deletes it: it is older than `keep` others.
"""

import contextlib
import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import StoppedError, UserError, first_line
from adapt_pruner_jax.storage import digest, orbax_messages, publish
from adapt_pruner_jax.storage.fingerprint import fingerprints, named_leaves
from adapt_pruner_jax.storage.places import in_bucket

TRASH = "trash"
PATIENCE = 30  # seconds
COMMITTED = "commit_success.txt"  # by which Orbax commits a step in a bucket
_DISK_FULL = {
  errno.ENOSPC: "No space left on device",
  errno.EDQUOT: "Disk quota exceeded",
}


class Checkpoints:
  """The newest checkpoints of a run, in a directory that all processes see.

  Every process makes the same calls. As a context manager it waits for the
  last save at the end; of several processes one that fails waits `PATIENCE`.
  """

  def __init__(
    self,
    directory: Path,
    keep: int = 2,
    say: Callable[[str], None] = logging.warning,
  ):
    """Opens or makes the directory, and removes what a kill left behind.

    Args:
      keep: how many checkpoints stay, the newest ones.
      say: called on process 0 with a line about each damaged checkpoint.

    Raises:
      UserError: the directory cannot be written to.
    """
    self.directory = directory.absolute()
    self._say = say
    orbax_messages.orbax()
    if in_bucket(directory):
      from adapt_pruner_jax.storage import orbax_s3

      orbax_s3.allow()
    agreement.on_writer(self._tidy)
    if not in_bucket(directory):  # which has no directory of its own
      publish.require_shared(self.directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        todelete_subdir=TRASH,
        lightweight_initialize=True,
        # One lists for all: a mount may show another one less.
        single_host_load_and_broadcast=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
    agreed = error is None or isinstance(error, StoppedError)
    if agreed or jax.process_count() == 1:
      self.close()
      return
    # If this process fails alone, the others wait for it, and a save for them.
    closing = threading.Thread(target=self._close_or_warn, daemon=True)
    closing.start()
    closing.join(PATIENCE)

  def steps(self) -> list[int]:
    """Steps that can be restored unless they are damaged, rising."""
    # Of several processes Orbax has broadcast them, as an array.
    return sorted(int(step) for step in self._manager.all_steps())

  def save(self, step: int, meta: dict, state: Any) -> None:
    """Starts to save; returns when `state` may be donated or deleted.

    Args:
      step: above all steps that are there.
      meta: what `restore` needs to rebuild the tree, and anything else that is
        JSON. Numbers come back exactly, tuples as lists.
      state: pytree of `jax.Array`s, on any mesh.

    Raises:
      UserError: not enough room, or the save before this one failed.
    """
    self.wait()
    steps = self.steps()
    if steps and step <= steps[-1]:
      raise ValueError(f"step {step} is not above {steps[-1]}, already saved")
    leaves = named_leaves(state)
    num_bytes = sum(leaf.nbytes for leaf in leaves.values())
    what = f"the checkpoint of step {step}"
    agreement.on_writer(
      lambda: publish.require_space(self.directory, num_bytes, what)
    )
    prints = fingerprints(leaves)
    content = {
      "step": step,
      "meta": meta,
      "leaves": {n: [*_layout(leaves[n]), prints[n]] for n in leaves},
    }
    record = {"sha256": digest.of_json(content), "content": content}
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(record),
          state=ocp.args.StandardSave(leaves),
        ),
        force=True,
      )

  def restore(
    self, abstract_of: Callable[[dict], Any]
  ) -> tuple[int, dict, Any] | None:
    """The newest checkpoint that is whole: (step, meta, state); None if none.

    A damaged one is renamed to damaged-STEP, and the one before it is tried.

    Args:
      abstract_of: from meta to the state's tree of `jax.ShapeDtypeStruct`s with
        shardings, of the mesh that it is wanted on.

    Raises:
      UserError: what was saved is another tree than `abstract_of` says.
    """
    self.wait()
    for step in reversed(self.steps()):
      found = self._restore_step(step, abstract_of)
      if found is not None:
        return found
    return None

  def wait(self) -> None:
    """Returns when what was saved is on disk.

    Raises:
      UserError: it could not be written; the checkpoints before it are intact.
    """
    with self._explained():
      self._manager.wait_until_finished()
    if agreement.is_writer() and not in_bucket(self.directory):
      shutil.rmtree(self.directory / TRASH, ignore_errors=True)

  def close(self) -> None:
    """Waits for the last save, and ends the threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _close_or_warn(self) -> None:
    try:
      self.close()
    except Exception as error:  # beside the one that is raised
      logging.warning("the last checkpoint: %s", first_line(error))

  def _tidy(self) -> None:
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for path in self.directory.iterdir():
        if self._is_left_behind(path):
          publish.remove(path)
    except OSError as error:
      raise publish.unwritable(self.directory, error) from error

  def _is_left_behind(self, path: Path) -> bool:
    """Whether it is of a save or a removal that a kill has cut off."""
    if in_bucket(path):
      return path.name.isdigit() and not (path / COMMITTED).exists()
    return path.name == TRASH or ".orbax-checkpoint-tmp" in path.name

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """A full disk becomes a UserError, and what a bucket refuses."""
    try:
      yield
    except Exception as error:
      reason = _disk_full(error) or _refused(error, self.directory)
      if reason is None:
        raise
      intact = self.steps()
      raise UserError(
        f"{reason} while saving a checkpoint in {self.directory}; "
        + (f"that of step {intact[-1]} is intact: " if intact else "")
        + "make room there and run the same command again to continue"
      ) from error

  def _restore_step(
    self, step: int, abstract_of: Callable[[dict], Any]
  ) -> tuple[int, dict, Any] | None:
    publish.require_shared(self.directory / str(step))
    # One says what the arrays are for all.
    content = agreement.same(self._attempt(step, lambda: self._read_meta(step)))
    if content is None:
      return None
    saved = content["leaves"]
    abstract = abstract_of(content["meta"])
    leaves = named_leaves(abstract)
    self._check_layout(step, leaves, saved)
    found = self._attempt(step, lambda: self._read_state(step, leaves))
    # Compared only now that all processes have read: it takes all of them.
    if found is None or not self._attempt(step, lambda: _compare(found, saved)):
      return None
    state = jax.tree.unflatten(
      jax.tree.structure(abstract), [found[name] for name in leaves]
    )
    return step, content["meta"], state

  def _attempt(self, step: int, read: Callable[[], Any]) -> Any:
    """What `read` returns; None, and the step is set aside, if it is damaged.

    All processes agree: damage may be in a part that only one of them reads.
    """
    found, damage = None, None
    try:
      found = read()
    except Exception as error:
      while error.__cause__ is not None:  # Orbax wraps what it was
        error = error.__cause__
      _raise_if_not_damage(error, self.directory / str(step))
      damage = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    if agreement.all_agree(damage is None):
      return found
    self._set_aside(step, damage or "another process could not read it")
    return None

  def _set_aside(self, step: int, damage: str) -> None:
    def rename() -> None:
      number = 1
      target = self.directory / f"damaged-{step}"
      while target.exists():
        number += 1
        target = self.directory / f"damaged-{step}-{number}"
      try:
        publish.move(self.directory / str(step), target)
      except OSError as error:
        raise UserError(
          f"the checkpoint {self.directory / str(step)} is damaged ({damage}) "
          f"and cannot be renamed: {error.strerror}; move it away"
        ) from error
      self._say(
        f"the checkpoint of step {step} is damaged and was set aside as "
        f"{target} ({damage}); the one before it is tried, if any"
      )

    agreement.on_writer(rename)
    self._manager.reload()

  def _read_meta(self, step: int) -> dict:
    path = self.directory / str(step) / "meta"
    record = ocp.JsonCheckpointHandler().restore(path, ocp.args.JsonRestore())
    content = record["content"]
    if record["sha256"] != digest.of_json(content) or content["step"] != step:
      raise ValueError("meta does not match its digest")
    return content

  def _read_state(self, step: int, abstract: dict) -> dict[str, jax.Array]:
    # The manager's own `restore` has a barrier at its end, where a process that
    # found no damage would wait for one that did.
    path = self.directory / str(step) / "state"
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(path, args=ocp.args.StandardRestore(abstract))

  def _check_layout(self, step: int, wanted: dict, saved: dict) -> None:
    wanted = {name: _layout(leaf) for name, leaf in wanted.items()}
    saved = {name: layout for name, (*layout, _) in saved.items()}
    for name in sorted(wanted | saved):
      if wanted.get(name) != saved.get(name):
        raise UserError(
          f"the checkpoint of step {step} in {self.directory} has "
          f"{saved.get(name, 'no')} for {name}, and this run needs "
          f"{wanted.get(name, 'none')}: it was saved by another version or "
          "recipe; continue with that one, or give another --workdir"
        )


def _compare(leaves: dict[str, jax.Array], saved: dict[str, list]) -> bool:
  for name, value in fingerprints(leaves).items():
    if value != saved[name][-1]:
      raise ValueError(f"the values of {name} are not those that were saved")
  return True


def _layout(leaf: Any) -> list:
  return [str(leaf.dtype), list(leaf.shape)]


def _disk_full(error: Exception) -> str | None:
  """The reason if `error` says that the disk is full; tensorstore uses text."""
  for number, text in _DISK_FULL.items():
    if getattr(error, "errno", None) == number or text in str(error):
      return text
  return None


def _refused(error: Exception, path: Path) -> str | None:
  """What a bucket complains of, if `path` is in one."""
  if not in_bucket(path):
    return None
  from adapt_pruner_jax.storage import bucket_path

  while not isinstance(error, UserError) and error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, UserError):
    return str(error)
  return bucket_path.explain(error, path)


def _raise_if_not_damage(error: Exception, path: Path) -> None:
  """Raises if the files may be fine and could not be read all the same."""
  if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
    raise error
  absent = isinstance(error, FileNotFoundError | NotADirectoryError)
  reason = None if absent else _refused(error, path)
  if reason:
    raise UserError(f"cannot read the checkpoint: {reason}") from error
  if isinstance(error, OSError) and not absent:
    raise UserError(
      f"cannot read the checkpoint {path}: {error.strerror}"
    ) from error
  if any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "PERMISSION")):
    raise UserError(f"cannot read the checkpoint {path}: {error}") from error
