"""Whether devices have room for what a run must hold.

Only what stays there is counted, no program: what does not fit by this does not
run. What may fit `adapt-pruner plan` says.
"""

import jax.numpy as jnp
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import devices, model_config
from adapt_pruner_jax.models.model_config import ModelConfig


def check(
  recipe: Config, full: ModelConfig, target: int | None, mesh: Mesh
) -> None:
  """Refuses what accelerators cannot hold; a CPU has other memory too.

  Args:
    recipe: of the run.
    full: the model to prune.
    target: of `prune`; None = there is none.
    mesh: the devices.

  Raises:
    UserError: weights, or weights and moments, are larger than a device.
  """
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return
  memory, parts = devices.memory_of(device), _parts(mesh)
  for what, whole, instead in _held(recipe, full, target):
    if whole / parts > memory:
      raise UserError(
        f"{what} take {whole / parts / 1e9:.1f} GB of each {device.device_kind}"
        f", which has {memory / 1e9:.1f}: use more devices, cut the model over "
        f"all of them (--config.mesh.data=1 --config.mesh.fsdp=-1), or give "
        f"{instead}; adapt-pruner plan, with the same flags, says what fits"
      )


def _parts(mesh: Mesh) -> int:
  """In how many a matrix is cut at most."""
  shape = mesh.shape
  return shape["fsdp"] * shape["tensor"] * shape["expert"]


def _held(
  recipe: Config, full: ModelConfig, target: int | None
) -> list[tuple[str, float, str]]:
  """Of each phase: what it holds, its bytes, and what would hold less."""
  prune, train, found = recipe.prune, recipe.train, []
  size = jnp.dtype(recipe.weight_dtype()).itemsize
  if not prune.stream_layers:
    whole = size * model_config.count_params(full)
    found.append(
      ("the model's weights", whole, "--config.prune.stream_layers=True")
    )
  trained = train.tokens and not train.lora_rank
  if trained and target and prune.budget == "params":
    each = 4 + 2 * jnp.dtype(train.moments).itemsize
    what = "weights and moments of the training"
    found.append((what, each * target, "--config.train.lora_rank=16"))
  return found
