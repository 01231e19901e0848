"""Memory measured in a process of its own, for devices that are not here.

It has as many virtual CPU devices as are intended, or the TPU compiler.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from adapt_pruner_jax.config import Config, from_json
from adapt_pruner_jax.distributed import virtual_devices
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import compiling
from adapt_pruner_jax.planning.arrays import Bytes


def ask(
  config: Config,
  full: ModelConfig,
  student: ModelConfig,
  devices: int | str,
  size: float,
  kind: str,
  wanted: Sequence[str],
) -> dict[str, Bytes]:
  """`memory.measure` of the phases `wanted`, arguments as there."""
  if not wanted:
    return {}
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  if isinstance(devices, int):
    environment |= virtual_devices.environment(devices)
  else:
    environment = compiling.ENVIRONMENT | environment
  task = {
    "config": dataclasses.asdict(config),
    "full": model_config.to_json(full),
    "student": model_config.to_json(student),
    "devices": devices,
    "size": size,
    "kind": kind,
    "wanted": [*wanted],
  }
  done = subprocess.run(
    [sys.executable, "-m", "adapt_pruner_jax.planning.elsewhere"],
    input=json.dumps(task),
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode:
    raise RuntimeError(f"memory analysis failed:\n{done.stderr}")
  answer = json.loads(done.stdout.splitlines()[-1])
  if "error" in answer:
    raise UserError(answer["error"])
  return answer


def _answer(task: dict) -> dict:
  import jax

  from adapt_pruner_jax.planning import memory

  config = from_json(task["config"])
  models = [model_config.from_json(task[name]) for name in ("full", "student")]
  real = isinstance(task["devices"], str)
  try:
    devices = jax.devices()
    if real:  # what is compiled for them, nothing here could read again
      jax.config.update("jax_enable_compilation_cache", False)
      devices = compiling.devices_of(task["devices"])
    how = devices, task["size"], task["kind"], real, task["wanted"]
    return memory.measure_here(config, *models, *how)
  except UserError as error:
    return {"error": str(error)}


if __name__ == "__main__":
  print(json.dumps(_answer(json.load(sys.stdin))), flush=True)
  os._exit(0)  # the TPU compiler may still be at work
