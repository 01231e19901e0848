"""The other processes of a run: joined at the start, missed when they die.

A process that fails alone ends without waiting for the others, as they would
wait for it. They end within `HEARTBEAT`: a thread here says in one line who is
gone and ends the process with `EXIT_PEER`; where JAX is faster, it aborts the
process (SIGABRT, a dump of C++), and nothing of ours runs in that.

A process that is stuck in C, where no thread of Python goes on, would be waited
for by all: after `STUCK` it says where it is and ends.

The one place that uses a private name of JAX: its client, which has barriers
that wait as long as they are told to.
"""

import atexit
import collections
import faulthandler
import itertools
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import distributed

from adapt_pruner_jax.errors import EXIT_ERROR, EXIT_PEER, UserError, first_line

# A process that is silent so long (seconds) is dead, and ends the others.
HEARTBEAT = 30
# A process in which Python has not run for so long (seconds) never will.
STUCK = 300
YEARS = 10**12  # milliseconds
_meetings = itertools.count()
_leaving, _left = threading.Event(), threading.Event()
_threads: list[threading.Thread] = []


def connect(
  coordinator: str, num_processes: int, process_id: int, seconds: int
) -> None:
  """Makes this process one of several, before any device is used.

  Where another one does not come in time, this process ends with `EXIT_PEER`:
  JAX would abort it, and was once seen to wait on for ten minutes.

  Args:
    coordinator: HOST:PORT of process 0; empty = found out from the TPU pod or
      from Slurm, with the two numbers.
    seconds: how long to wait for the others.

  Raises:
    UserError: the coordinator cannot be reached in time, or the processes have
      different numbers of devices.
  """
  given = {}
  if coordinator:
    given = {
      "coordinator_address": coordinator,
      "num_processes": num_processes,
      "process_id": process_id,
    }
  # `stopping` agrees on a stop. This would not hear of the signals, which
  # Python handles, and Orbax would tell it other numbers than our moments'.
  jax.config.update("jax_enable_preemption_service", False)
  if coordinator and process_id > 0:
    _wait_for(coordinator, seconds)
  joined = threading.Event()
  _start(lambda: joined.wait(seconds) or _alone(coordinator, seconds))
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=seconds + HEARTBEAT,  # `_alone` comes before
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    reason = first_line(error)
    raise UserError(_cannot_join(coordinator, reason)) from error
  finally:
    joined.set()
  _start(_watch)
  _start(_show_life)
  atexit.register(_leave)
  require_alike(jax.devices())


def require_alike(devices: Sequence[Any]) -> None:
  """Raises unless each process has as many devices: collectives need that.

  Args:
    devices: of all processes.

  Raises:
    UserError: one has more than another.
  """
  number = collections.Counter(device.process_index for device in devices)
  usual = collections.Counter(number.values()).most_common(1)[0][0]
  other = [f"process {p} has {n}" for p, n in number.items() if n != usual]
  if other:
    raise UserError(
      f"{', '.join(sorted(other))} device(s), the others {usual} each: all "
      "need as many, of GPUs by CUDA_VISIBLE_DEVICES"
    )


def client() -> Any:
  """What speaks to the process that coordinates; None = there are no others."""
  return distributed.global_state.client


def in_background(action: Callable[[], bool]) -> None:
  """Calls `action`, which waits a little each time, until it is True or the
  end, in a thread."""

  def loop() -> None:
    while not _left.wait(0.02):
      try:
        if action():
          return
      except (jax.errors.JaxRuntimeError, AttributeError):
        continue  # in vain for now; or the others are gone, or all leave

  _start(loop)


def _start(target: Callable[[], None]) -> None:
  thread = threading.Thread(target=target, daemon=True)
  thread.start()
  _threads.append(thread)


def meet() -> None:
  """Waits for all processes, however long one of them takes.

  A collective on the devices may give up; on CPUs it does after 30 s.
  """
  if client() is not None:
    client().wait_at_barrier(f"meet/{next(_meetings)}", YEARS)


def fail(error: Exception) -> None:
  """Returns if all processes have failed; one that failed alone ends here.

  JAX would wait for the others at its end, and they wait for this one.
  """
  state = distributed.global_state
  if state.client is None:
    return
  try:
    state.client.wait_at_barrier("failed", 10_000)
  except jax.errors.JaxRuntimeError:
    if not isinstance(error, UserError):
      # It may be due to a process that is gone: `_watch` then ends this one.
      time.sleep(HEARTBEAT + 10)
      traceback.print_exception(error)
    end(EXIT_ERROR)


def _leave() -> None:
  """The regular end, of all processes at once.

  The threads end before Python does: one that came back from C++ later would
  abort the process.
  """
  _leaving.set()
  jax.distributed.shutdown()
  _left.set()
  for thread in _threads:
    thread.join(10)


def _watch() -> None:
  """Waits until another process dies."""
  state = distributed.global_state
  address = state.coordinator_address
  try:
    # Nobody else comes to this barrier: it fails when one of them is gone.
    state.client.wait_at_barrier(f"watch/{state.process_id}", YEARS)
  except jax.errors.JaxRuntimeError as error:
    if found := re.search(r"Task (\d+) heartbeat timeout", str(error)):
      _gone(f"process {found[1]}")
    elif not _leaving.is_set():
      _gone("another process" if _answers(address) else "process 0")


def _show_life() -> None:
  """Puts off, while Python runs, that the process ends itself."""
  while not _left.wait(STUCK / 30):
    faulthandler.dump_traceback_later(STUCK, exit=True, file=2)
  faulthandler.cancel_dump_traceback_later()


def _wait_for(address: str, seconds: int) -> None:
  """Until process 0 is there: JAX, waiting for it in vain, would abort."""
  end = time.monotonic() + seconds
  while not _answers(address):
    if time.monotonic() > end:
      raise UserError(_cannot_join(address, f"no answer in {seconds} s"))
    time.sleep(0.2)


def _cannot_join(address: str, reason: str) -> str:
  return (
    f"cannot join the processes at {address or 'the coordinator'}: {reason}; "
    "is the address right, and are process 0 and all the others running?"
  )


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), 5) as found:
      return bool(found.recv(1))  # a gRPC server speaks first; not when frozen
  except (OSError, ValueError):  # no such address
    return False


def _alone(address: str, seconds: int) -> None:
  _end_saying(
    f"not all processes came to {address or 'the coordinator'} within "
    f"{seconds} s (--connect_seconds): the output of the others says why"
  )


def _gone(who: str) -> None:
  _end_saying(
    f"{who} is gone: it stopped, or could not be reached for {HEARTBEAT} s; "
    "its own output says why"
  )


def _end_saying(why: str) -> None:
  # JAX's C++ says more at the same time: this shall be the last line.
  stderr = os.dup(2)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  again = "Start all processes again: the same command continues"
  os.write(stderr, f"error: {why}. {again}\n".encode())
  end(EXIT_PEER)


def end(code: int) -> None:
  """Ends this process, whatever the others do."""
  # In a thread: a pipe that nobody reads would hold up the end for ever.
  flush = threading.Thread(target=_flush, daemon=True)
  flush.start()
  flush.join(10)
  os._exit(code)  # the regular end waits for processes that never come


def _flush() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
