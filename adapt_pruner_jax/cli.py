"""Commands and flags; nothing else parses a command line."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from absl import flags, logging

# XLA calls OpenBLAS from its threads. With OpenBLAS's own beside them, Cholesky
# of 512 columns takes twice the CPU time, and a hundred times that on a busy
# machine. JAX is not imported yet.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from adapt_pruner_jax.config import recipe_flags
from adapt_pruner_jax.distributed import joining, mesh_flags, virtual_devices
from adapt_pruner_jax.errors import (
  EXIT_ERROR,
  EXIT_INTERRUPTED,
  EXIT_STOPPED,
  StoppedError,
  UserError,
  first_line,
  nearest,
)
from adapt_pruner_jax.storage import places

USAGE = """\
adapt-pruner COMMAND [--flags]; adapt-pruner COMMAND --help lists the flags

  run       prune a model, with or without recovery training
  plan      what a run would do and cost, before any of it
  compare   several methods at equal budgets, in one table
  evaluate  perplexity, tasks, latency of a model
  profile   a latency table of this device, for a budget in milliseconds
  generate  text from a model
  convert   to hf, hf_uniform, gguf, orbax, or --verify
  report    report.html of a work directory
  tokenize  fill the cache of tokens before a run needs them
"""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits; docs/faults.md lists the exit codes."""
  argv = list(sys.argv[1:] if argv is None else argv)
  flags.FLAGS.mark_as_parsed()  # absl warns of each line of a log before that
  logging.set_verbosity(logging.WARNING)
  logging.use_absl_handler()
  virtual_devices.give_threads()
  for stream in (sys.stdout, sys.stderr):  # names of tokens are any text
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="replace")
  try:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
      print(USAGE)
      sys.exit(0)
    if command not in COMMANDS:
      raise UserError(
        f"no command {command!r}{nearest(command, COMMANDS)}; there are "
        f"{', '.join(COMMANDS)}"
      )
    sys.exit(COMMANDS[command](command, rest))
  except StoppedError as stopped:
    _tell(str(stopped))
    sys.exit(EXIT_STOPPED)
  except KeyboardInterrupt:
    _tell("interrupted")
    _leave_others(EXIT_INTERRUPTED)
    sys.exit(EXIT_INTERRUPTED)
  except UserError as error:
    _tell(f"error: {error}")
    _fail(error)
    sys.exit(EXIT_ERROR)
  except Exception as error:
    _fail(error)
    raise


# ---- Commands ----------------------------------------------------------------


def run(command: str, argv: list[str]) -> int:
  """Prunes a model, with or without recovery training."""
  begun = time.monotonic()
  values = flags.FlagValues()
  recipe_flags.define(values, argv)
  flags.DEFINE_string(
    "workdir", None, "where all of the run goes", flag_values=values
  )
  text = _definers(values)[0]
  text("profile_steps", "", "train steps to trace: 10:13 = 10, 11 and 12")
  _define_overwrite(values)
  joining.define_flags(values)
  _parse(command, argv, values, ["workdir"])
  path = places.to_path(values.workdir)
  _start_jax(values)
  from adapt_pruner_jax.runs import run as run_

  recipe = recipe_flags.recipe(values)
  recipe.log.profile_steps = values.profile_steps or recipe.log.profile_steps
  if recipe.train.hours:
    from adapt_pruner_jax.planning import hours

    recipe = hours.of_run(recipe, path, values.overwrite, begun)
  run_.run(recipe, path, values.overwrite, begun)
  return 0


def plan(command: str, argv: list[str]) -> int:
  """Says what a run would do and cost."""
  from adapt_pruner_jax.planning import plan as plan_

  values = flags.FlagValues()
  recipe_flags.define(values, argv)
  plan_.define_flags(values)
  _parse(command, argv, values)
  plan_.plan(recipe_flags.recipe(values), **plan_.flag_values(values))
  return 0


def compare(command: str, argv: list[str]) -> int:
  """Several methods at equal budgets, in one table."""
  from adapt_pruner_jax.runs import compare as compare_

  values = flags.FlagValues()
  recipe_flags.define(values, argv)
  text, numbers, switch = _definers(values)
  text("workdir", None, "where the table goes")
  text("methods", "all", "comma separated, or all")
  text("ratios", "0.2,0.4,0.6", "shares to remove")
  numbers("recover_tokens", 0, "train each result on so many")
  switch(
    "from_scratch",
    False,
    "also train the shapes that adapt leaves from scratch",
  )
  _define_overwrite(values)
  joining.define_flags(values)
  _parse(command, argv, values, ["workdir"])
  path = places.to_path(values.workdir)
  _start_jax(values)
  compare_.compare(
    recipe_flags.recipe(values),
    path,
    values.methods,
    values.ratios,
    recover_tokens=values.recover_tokens,
    from_scratch=values.from_scratch,
    overwrite=values.overwrite,
  )
  return 0


def evaluate(command: str, argv: list[str]) -> int:
  """Perplexity, tasks and latency of a model, as JSON."""
  from adapt_pruner_jax.evaluation import flags as flags_

  values = flags.FlagValues()
  flags_.define_flags(values)
  _define_ignore_fields(values)
  mesh_flags.define_flags(values)
  joining.define_flags(values)
  _parse(command, argv, values, ["model"])
  _start_jax(values)
  from adapt_pruner_jax.distributed import agreement
  from adapt_pruner_jax.evaluation import evaluate as evaluate_
  from adapt_pruner_jax.reporting.log import Log
  from adapt_pruner_jax.runs import fingerprints
  from adapt_pruner_jax.storage import json_files, publish

  fingerprints.require_same_evaluation(**joining.common(values))
  out = values.out and places.to_path(values.out)
  if out:  # asked before hours of work
    agreement.on_writer(lambda: publish.require_free(out, overwrite=True))
  given = {field: values[field].value for field in evaluate_.FIELDS}
  found = evaluate_.evaluate(
    values.model,
    [t for t in values.tasks.split(",") if t],
    baseline=values.baseline,
    dtype=values.dtype,
    ignore_fields=values.ignore_fields,
    bos=values.bos,
    mesh=mesh_flags.mesh_of(values),
    phase=Log(None, stderr=True).phase,  # stdout is for the result
    **given,
  )
  if agreement.is_writer():
    print(json.dumps(json_files.plain(found), indent=2))
    if out:
      json_files.write_json(out, found)
  return 0


def profile(command: str, argv: list[str]) -> int:
  """Times attention and MLPs of some widths on this device."""
  values = flags.FlagValues()
  text, numbers, _ = _definers(values)
  text("model", None, "a directory or hub id")
  text("out", "", "the table, a JSON file")
  text("engine", "jax", "jax or transformers")
  text("dtype", "float32", "of the weights")
  text("phase", "decode", "or prefill")
  numbers("batch", 1, "rows")
  numbers("context", 2048, "tokens of a row")
  numbers("repeats", 7, "pairs of calls a width")
  _define_ignore_fields(values)
  _parse(command, argv, values, ["model", "out"])
  out = places.to_path(values.out)
  if places.in_bucket(out):
    raise UserError(f"--out={out}: a table of times is a file on a disk")
  _start_jax(None)
  from adapt_pruner_jax.evaluation import profile as profile_

  profile_.write(
    values.model,
    out,
    profile_.Case(values.phase, values.batch, values.context),
    values.engine,
    values.dtype,
    values.repeats,
    values.ignore_fields,
  )
  return 0


def generate(command: str, argv: list[str]) -> int:
  """Continues a prompt."""
  values = flags.FlagValues()
  text, numbers, _ = _definers(values)
  text("model", None, "a directory or hub id")
  text("prompt", "", "text to continue")
  text("dtype", "float32", "of the arithmetic")
  _define_ignore_fields(values)
  numbers("max_new_tokens", 128, "stop after so many")
  numbers("top_k", 0, "sample among the best k; 0 = all")
  numbers("seed", 0, "of sampling")
  flags.DEFINE_float("top_p", 1.0, "nucleus", flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "0 = greedy", flag_values=values)
  mesh_flags.define_flags(values)
  _parse(command, argv, values, ["model"])
  _start_jax(None)
  from adapt_pruner_jax.evaluation import continuation
  from adapt_pruner_jax.evaluation.generate import Sampling

  print(
    continuation.of(
      values.model,
      values.prompt,
      values.max_new_tokens,
      Sampling(values.temperature, values.top_k, values.top_p),
      values.seed,
      dtype=values.dtype,
      ignore_fields=values.ignore_fields,
      mesh=mesh_flags.mesh_of(values),
    )
  )
  return 0


def convert(command: str, argv: list[str]) -> int:
  """Writes a model in another format, or checks a directory."""
  values = flags.FlagValues()
  text, _, switch = _definers(values)
  text("model", None, "a directory or hub id")
  text("out", "", "directory or file to write")
  text("format", "hf", "hf, hf_uniform, gguf or orbax")
  text("dtype", "", "default as stored; gguf: f32, f16, bf16, q8_0, q4_0")
  _define_ignore_fields(values)
  switch("overwrite", False, "replace --out")
  switch("verify", False, "check --model's SHA256SUMS")
  mesh_flags.define_flags(values)  # of what is not read file by file
  _parse(command, argv, values, ["model"])
  _start_jax(None)
  from adapt_pruner_jax.formats import convert as convert_
  from adapt_pruner_jax.formats import orbax

  if values.verify and values.out:
    raise UserError("--verify writes nothing: leave out --out, or --verify")
  if values.verify:
    orbax.verify(values.model)
    return 0
  if not values.out:
    raise UserError("adapt-pruner convert needs --out=... (or --verify)")
  convert_.convert(
    values.model,
    places.to_path(values.out),
    values.format,
    dtype=values.dtype,
    overwrite=values.overwrite,
    ignore_fields=values.ignore_fields,
    mesh=mesh_flags.mesh_of(values),
  )
  return 0


def report(command: str, argv: list[str]) -> int:
  """Writes report.html of a work directory."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "of a run", flag_values=values)
  _parse(command, argv, values, ["workdir"])
  from adapt_pruner_jax.reporting.html import report as report_
  from adapt_pruner_jax.runs import tiny_model

  tiny = tiny_model.config_of(tiny_model.Recipe())
  print(report_.write(places.to_path(values.workdir), tiny))
  return 0


def tokenize(command: str, argv: list[str]) -> int:
  """Fills the cache of tokens before a run needs them."""
  values = flags.FlagValues()
  text, numbers, _ = _definers(values)
  text("source", None, "as data.source, docs/data.md")
  text("model", None, "a directory or hub id")
  text("bos", "auto", "as data.bos: auto or none")
  numbers("tokens", 0, "enough; 0 = all there are")
  _parse(command, argv, values, ["source", "model"])
  os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerator to others
  from adapt_pruner_jax.runs.tokenize import tokenize

  tokenize(values.source, values.model, values.tokens, values.bos)
  return 0


COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
  "run": run,
  "plan": plan,
  "compare": compare,
  "evaluate": evaluate,
  "profile": profile,
  "generate": generate,
  "convert": convert,
  "report": report,
  "tokenize": tokenize,
}


# ---- Flags -------------------------------------------------------------------


def _definers(values: flags.FlagValues) -> list[Callable[..., Any]]:
  """What defines texts, whole numbers and switches in `values`."""
  kinds = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
  return [partial(define, flag_values=values) for define in kinds]


def _define_overwrite(values: flags.FlagValues) -> None:
  flags.DEFINE_bool(
    "overwrite",
    False,
    "remove another recipe's run from --workdir, or a finished one, and start "
    "anew; an unfinished run of this recipe is continued",
    flag_values=values,
  )


def _define_ignore_fields(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "ignore_fields", "", "of config.json, comma separated", flag_values=values
  )


def _parse(
  command: str,
  argv: list[str],
  values: flags.FlagValues,
  required: Sequence[str] = (),
) -> None:
  if "--help" in argv or "-h" in argv:
    print(f"adapt-pruner {command}\n{values.get_help()}")
    if "config" in values:
      from adapt_pruner_jax.config import Config, field_names, get

      print("\nconfig fields and their defaults; a recipe may set others:")
      config = Config()
      for name in field_names(config):
        print(f"  --config.{name}={get(config, name)}")
    sys.exit(0)
  try:
    rest = values([command, *argv])[1:]
  except (
    flags.Error,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
  ) as error:
    raise UserError(first_line(error)) from error
  if rest:
    raise UserError(f"unexpected {' '.join(rest)}: flags are --name=value")
  for name in required:
    if not values[name].value:
      raise UserError(f"adapt-pruner {command} needs --{name}=...")


def _tell(text: str) -> None:
  with contextlib.suppress(BrokenPipeError):  # nobody listens any more
    print(text, file=sys.stderr)


def _leave_others(code: int) -> None:
  """Ends this process at once if there are others, which shall notice."""
  if "jax" in sys.modules:
    from adapt_pruner_jax.distributed import processes

    if processes.client() is not None:
      processes.end(code)


def _fail(error: Exception) -> None:
  if "jax" in sys.modules:  # else this process has not joined others
    from adapt_pruner_jax.distributed import processes

    processes.fail(error)


def _start_jax(values: flags.FlagValues | None) -> None:
  """Several processes if they are asked for, and the compilation cache."""
  if values is not None:
    joining.connect_if_asked(values)
  from adapt_pruner_jax.storage import cache

  cache.keep_compiled_programs()
