"""How the devices are used, as flags of commands without a recipe.

Apart from `sharding`, so that a wrong flag does not wait for JAX's import.
"""

from typing import Any

from absl import flags

SIZES = {"data": 0, "fsdp": -1, "tensor": 1, "expert": 1}  # as `config.Mesh`'s


def define_flags(values: flags.FlagValues) -> None:
  """Adds --mesh.data, .fsdp, .tensor and .expert."""
  told = "devices along it; -1 = what is left, for one of them"
  for name, size in SIZES.items():
    flags.DEFINE_integer(f"mesh.{name}", size, told, flag_values=values)


def mesh_of(values: flags.FlagValues) -> Any:
  """The mesh that they ask for, of all devices.

  Raises:
    UserError: as `sharding.make_mesh`.
  """
  from adapt_pruner_jax.distributed import sharding

  sizes = {name: values[f"mesh.{name}"].value for name in SIZES}
  return sharding.make_mesh(**sizes)
