"""A profile of some train steps, for TensorBoard and XProf."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adapt_pruner_jax.storage import cache
from adapt_pruner_jax.storage.places import in_bucket

FOLDER = "profile"  # in the work directory


class Profile:
  """Traces the train steps that `log.profile_steps` names."""

  def __init__(
    self, steps: str, workdir: Path | None, say: Callable[[str], None]
  ):
    """Takes note of them.

    Args:
      steps: FIRST:END, such as "10:13" for steps 10, 11 and 12; "" = none.
      workdir: where the trace goes; in its place on this machine, if that is
        in a bucket; None = nothing is traced, as on other processes than 0.
      say: gets a line.
    """
    first, _, end = steps.partition(":")
    self._steps, self._say = range(0), say
    self._running, self._traced = False, False
    if steps and workdir is not None:
      self._steps = range(int(first), int(end))
      here = cache.beside(workdir) if in_bucket(workdir) else workdir
      self._folder = here / FOLDER

  def watch(self, batches: Iterator[Any], step: int) -> Iterator[Any]:
    """The batches from a step on, each of which is asked for just before its
    step is taken."""
    if self._steps and not self._traced and step >= self._steps.stop:
      self._say(f"log.profile_steps ends before step {step}: nothing is traced")
      self._steps = range(0)
    for batch in batches:
      self._at(step)
      step += 1
      yield batch

  def close(self) -> None:
    """Writes what is there, if it has begun and not ended."""
    if self._running:
      for device in jax.local_devices():  # behind all that it was given
        (jnp.zeros((), device=device) + 1).block_until_ready()
      jax.profiler.stop_trace()
      self._running = False
      self._traced = True
      self._say(f"the profile is in {self._folder}")

  def _at(self, step: int) -> None:
    if step not in self._steps:
      self.close()
    elif not self._running:
      options = jax.profiler.ProfileOptions()
      # Python's calls as well would set a hook in threads that may be ending,
      # of which CPython 3.11 once died (a null pointer in PyEval_SetProfile).
      options.python_tracer_level = 0
      jax.profiler.start_trace(str(self._folder), profiler_options=options)
      self._running = True
