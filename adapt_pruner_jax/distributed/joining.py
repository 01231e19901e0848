"""The flags by which a command becomes one of several processes.

Apart from `processes`, so that a wrong flag does not wait for JAX's import.
"""

from typing import Any

from absl import flags

from adapt_pruner_jax.errors import UserError


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
  """`processes.connect`, as the flags say, before any device is used.

  Raises:
    UserError: flags that say nothing, or no process; or as `processes.connect`.
  """
  _check(values)
  if values.distributed or values.coordinator:
    from adapt_pruner_jax.distributed import processes

    processes.connect(
      values.coordinator,
      values.num_processes,
      values.process_id,
      values.connect_seconds,
    )


def _check(values: flags.FlagValues) -> None:
  number, me = values.num_processes, values.process_id
  given = f"--num_processes={number} --process_id={me}"
  if values.connect_seconds < 1:
    raise UserError(
      f"--connect_seconds={values.connect_seconds} must be at least 1"
    )
  if not values.coordinator and (number, me) != (0, -1):
    raise UserError(
      f"{given} go with --coordinator=HOST:PORT of process 0; --distributed "
      "finds all three by itself on a TPU pod or under Slurm"
    )
  if values.coordinator and not 0 <= me < number:
    raise UserError(
      f"{given}: with --coordinator={values.coordinator} give how many there "
      "are and which this is, from 0 on"
    )
