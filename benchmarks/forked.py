"""Processes of a run that begin with everything imported.

They are forked from a process that has done that and nothing else (no device,
no thread): several of them, killed again and again, cost what they do, and not
the imports.
"""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = [
  *("adapt_pruner_jax.cli", "adapt_pruner_jax.runs.run", "orbax.checkpoint"),
  *("adapt_pruner_jax.distributed.processes", "grain", "gcsfs", "s3fs"),
  "safetensors.numpy",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTS)


def start(
  arguments: Sequence[str], env: dict[str, str], output: Path
) -> BaseProcess:
  """Starts `adapt-pruner` with these arguments.

  Args:
    env: what JAX reads when it is imported has to be set before the first
      start, and is the same in all.
    output: a file that gets what it says, behind what is there.
  """
  process = _context.Process(target=_main, args=(arguments, env, str(output)))
  process.start()
  return process


def _main(arguments: Sequence[str], env: dict[str, str], output: str) -> None:
  file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.stdout.reconfigure(line_buffering=True)
  os.environ |= env
  os.chdir(ROOT)
  from adapt_pruner_jax import cli

  try:
    cli.main(arguments)
  finally:  # which processes of this kind leave out
    atexit._run_exitfuncs()
