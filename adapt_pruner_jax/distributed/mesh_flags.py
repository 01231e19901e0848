"""How the devices are used, as flags of commands without a recipe.

Apart from `sharding`, so that a wrong flag does not wait for JAX's import.
"""

from typing import Any

from absl import flags

from adapt_pruner_jax.config import Mesh

NAMES = ("data", "fsdp", "tensor", "expert")


def define_flags(values: flags.FlagValues) -> None:
  """Adds --mesh.data, .fsdp, .tensor and .expert."""
  told = "devices along it; -1 = what is left, for one of them"
  for name in NAMES:
    size = getattr(Mesh(), name)
    flags.DEFINE_integer(f"mesh.{name}", size, told, flag_values=values)


def mesh_of(values: flags.FlagValues) -> Any:
  """The mesh that they ask for, of all devices.

  Raises:
    UserError: as `sharding.make_mesh`.
  """
  from adapt_pruner_jax.distributed import sharding

  sizes = {name: values[f"mesh.{name}"].value for name in NAMES}
  return sharding.make_mesh(**sizes)
