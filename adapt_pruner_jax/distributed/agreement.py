"""Of several processes one writes and decides, and all come to the same end."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.distributed import processes, stopping
from adapt_pruner_jax.errors import StoppedError, UserError


def is_writer() -> bool:
  """True on process 0, the only one that writes files and speaks."""
  return jax.process_index() == 0


def all_agree(ok: bool) -> bool:
  """True if `ok` is true on every process; all processes have to call it."""
  if jax.process_count() == 1:
    return ok
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def from_writer(tree: Any) -> Any:
  """Arrays and numbers as process 0 has them, bit for bit.

  All have to call it, with a tree of the same shapes; the others wait as long
  as it takes.
  """
  if jax.process_count() == 1:
    return tree
  from jax.experimental import multihost_utils

  processes.meet()
  leaves, structure = jax.tree.flatten(tree)
  arrays = [np.asarray(leaf) for leaf in leaves]
  data = np.frombuffer(b"".join(a.tobytes() for a in arrays), np.uint8)
  # As bytes: what has 64 bits would lose half of them.
  data = np.asarray(multihost_utils.broadcast_one_to_all(data))
  found, first = [], 0
  for leaf, array in zip(leaves, arrays, strict=True):
    part = data[first : first + array.nbytes].tobytes()
    part = np.frombuffer(part, array.dtype).reshape(array.shape).copy()
    found.append(part if isinstance(leaf, np.ndarray) else part.item())
    first += array.nbytes
  return jax.tree.unflatten(structure, found)


def same(value: Any) -> Any:
  """A value of JSON as process 0 has it; all have to call it.

  The others wait as long as it takes.
  """
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = from_writer(len(data))
  padded = np.zeros(1 << size.bit_length(), np.uint8)  # few shapes to compile
  if is_writer():
    padded[:size] = data
  return json.loads(from_writer(padded)[:size].tobytes())


def on_writer(action: Callable[[], Any]) -> Any:
  """What `action` returns on process 0, where alone it is called; else None.

  The others wait as long as it takes.

  Raises:
    UserError, StoppedError: `action` raised one; on all processes.
  """
  result, refusal = None, None
  if is_writer():
    try:
      with stopping.alone():
        result = action()
    except (UserError, StoppedError) as error:
      refusal = error
  words = same(refusal and [isinstance(refusal, StoppedError), str(refusal)])
  if words and refusal is None:
    stopped, text = words
    raise StoppedError(text) if stopped else UserError(f"process 0: {text}")
  if words:
    raise refusal
  return result


def decided(action: Callable[[], Any]) -> Any:
  """What `action` returns on process 0, where alone it is called: JSON.

  Raises:
    UserError, StoppedError: as `on_writer`.
  """
  return same(on_writer(action))


def require_same(facts: dict[str, Any], moment: str) -> None:
  """Compares what all processes should have alike; all have to call it.

  Args:
    facts: JSON, by what it is for people, such as "recipe": the same names on
      all of them.
    moment: when this is, for people.

  Raises:
    UserError: one has something else than process 0; on all processes.
  """
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  processes.meet()
  texts = [json.dumps(fact, sort_keys=True) for fact in facts.values()]
  mine = [hashlib.sha256(text.encode()).digest() for text in texts]
  mine_N32 = np.frombuffer(b"".join(mine), np.uint8).reshape(-1, 32)
  all_PN32 = np.asarray(multihost_utils.process_allgather(mine_N32))
  other_PN = (all_PN32 != all_PN32[0]).any(-1)
  if other_PN.any():
    who = ", ".join(str(p) for p in np.flatnonzero(other_PN.any(1)))
    what = [name for name, n in zip(facts, other_PN.any(0), strict=True) if n]
    raise UserError(
      f"{moment}, process {who} has another {', '.join(what)} than process "
      "0: give all processes the same command, code and files, and start all "
      "of them again; what is saved stays"
    )
