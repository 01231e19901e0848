"""The flags by which a command becomes one of several processes.

Apart from `processes`, so that a wrong flag does not wait for JAX's import.
"""

from typing import Any

from absl import flags


def define_flags(values: flags.FlagValues) -> None:
  """Adds --distributed and what says where the others are."""
  number, text = flags.DEFINE_integer, flags.DEFINE_string
  flags.DEFINE_bool(
    "distributed",
    False,
    "one of several processes (TPU pod, Slurm, or the three flags below)",
    flag_values=values,
  )
  text("coordinator", "", "HOST:PORT of process 0", flag_values=values)
  number("num_processes", 0, "in all", flag_values=values)
  number("process_id", -1, "of this one", flag_values=values)
  number(
    "connect_seconds", 300, "wait for the others so long", flag_values=values
  )


def common(values: flags.FlagValues) -> dict[str, Any]:
  """The flags that all processes have alike, by name: not who each of them is
  and where it finds the others."""
  own = flags.FlagValues()
  define_flags(own)
  return {name: values[name].value for name in values if name not in own}


def connect_if_asked(values: flags.FlagValues) -> None:
  """`processes.connect`, as the flags say, before any device is used."""
  if values.distributed or values.coordinator:
    from adapt_pruner_jax.distributed import processes

    processes.connect(
      values.coordinator,
      values.num_processes,
      values.process_id,
      values.connect_seconds,
    )
