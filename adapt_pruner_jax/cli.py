"""Commands and flags; nothing else parses a command line."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags, logging

# XLA calls OpenBLAS from its threads. With OpenBLAS's own beside them, Cholesky
# of 512 columns takes twice the CPU time, and a hundred times that on a busy
# machine. JAX is not imported yet.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from adapt_pruner_jax.errors import (
  EXIT_ERROR,
  EXIT_STOPPED,
  UserError,
  first_line,
  nearest,
)

ROOT = Path(__file__).resolve().parent
USAGE = """\
adapt-pruner COMMAND [--flags]; adapt-pruner COMMAND --help lists the flags

  run       prune a model, with or without recovery training
  plan      what a run would do and cost, before any of it
  compare   several methods at equal budgets, in one table
  evaluate  perplexity, tasks, latency of a model
  generate  text from a model
  convert   to hf, hf_uniform, gguf, orbax, or --verify
  report    report.html of a work directory
"""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits; docs/faults.md lists the exit codes."""
  argv = list(sys.argv[1:] if argv is None else argv)
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
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    _fail(error)
    sys.exit(EXIT_ERROR)
  except Exception as error:
    _fail(error)
    raise


# ---- Commands ----------------------------------------------------------------


def run(command: str, argv: list[str]) -> int:
  values = flags.FlagValues()
  _define_config(values, argv)
  flags.DEFINE_string(
    "workdir", None, "where all of the run goes", flag_values=values
  )
  _define_distributed(values)
  _parse(command, argv, values, ["workdir"])
  path = _workdir(values.workdir)
  _start_jax(values)
  from adapt_pruner_jax.distributed import stopping
  from adapt_pruner_jax.runs import run as run_

  try:
    run_.run(_config(values), path)
  except stopping.StoppedError as stopped:
    print(stopped, file=sys.stderr)
    return EXIT_STOPPED
  return 0


def plan(command: str, argv: list[str]) -> int:
  from adapt_pruner_jax.planning import plan as plan_

  values = flags.FlagValues()
  _define_config(values, argv)
  plan_.define_flags(values)
  _parse(command, argv, values)
  plan_.plan(_config(values), **plan_.flag_values(values))
  return 0


def compare(command: str, argv: list[str]) -> int:
  from adapt_pruner_jax.distributed import stopping
  from adapt_pruner_jax.runs import compare as compare_

  values = flags.FlagValues()
  _define_config(values, argv)
  text, numbers = flags.DEFINE_string, flags.DEFINE_integer
  text("workdir", None, "where the table goes", flag_values=values)
  text("methods", "all", "comma separated, or all", flag_values=values)
  text("ratios", "0.2,0.4,0.6", "shares to remove", flag_values=values)
  numbers(
    "recover_tokens", 0, "train each result on so many", flag_values=values
  )
  flags.DEFINE_bool(
    "from_scratch",
    False,
    "also train the shapes that adapt leaves from scratch",
    flag_values=values,
  )
  _define_distributed(values)
  _parse(command, argv, values, ["workdir"])
  path = _workdir(values.workdir)
  _start_jax(values)
  try:
    compare_.compare(
      _config(values),
      path,
      values.methods,
      values.ratios,
      recover_tokens=values.recover_tokens,
      from_scratch=values.from_scratch,
    )
  except stopping.StoppedError as stopped:
    print(stopped, file=sys.stderr)
    return EXIT_STOPPED
  return 0


def evaluate(command: str, argv: list[str]) -> int:
  values = flags.FlagValues()
  text, numbers = flags.DEFINE_string, flags.DEFINE_integer
  text("model", None, "a directory or hub id", flag_values=values)
  text("tasks", "perplexity", "perplexity, latency, tasks", flag_values=values)
  text("text", "", "text file for the perplexity", flag_values=values)
  text("tasks_dir", "", "jsonl files of the questions", flag_values=values)
  text("baseline", "", "a second model to compare with", flag_values=values)
  text("dtype", "float32", "of the arithmetic", flag_values=values)
  _define_ignore_fields(values)
  text("out", "", "JSON file for the result", flag_values=values)
  numbers("limit", 0, "questions a task; 0 = all", flag_values=values)
  numbers("seq_len", 0, "tokens a window; 0 = context", flag_values=values)
  numbers("batch", 8, "rows at a time", flag_values=values)
  _define_distributed(values)
  _parse(command, argv, values, ["model"])
  _start_jax(values)
  from adapt_pruner_jax.distributed import agreement
  from adapt_pruner_jax.evaluation import evaluate as evaluate_
  from adapt_pruner_jax.storage import json_files

  found = evaluate_.evaluate(
    values.model,
    [t for t in values.tasks.split(",") if t],
    text=values.text,
    tasks_dir=values.tasks_dir,
    baseline=values.baseline,
    limit=values.limit,
    seq_len=values.seq_len,
    batch=values.batch,
    dtype=values.dtype,
    ignore_fields=values.ignore_fields,
  )
  if agreement.is_writer():
    print(json.dumps(json_files.plain(found), indent=2))
    if values.out:
      json_files.write_json(Path(values.out), found)
  return 0


def generate(command: str, argv: list[str]) -> int:
  values = flags.FlagValues()
  text, numbers = flags.DEFINE_string, flags.DEFINE_integer
  text("model", None, "a directory or hub id", flag_values=values)
  text("prompt", "", "text to continue", flag_values=values)
  text("dtype", "float32", "of the arithmetic", flag_values=values)
  _define_ignore_fields(values)
  numbers("max_new_tokens", 128, "stop after so many", flag_values=values)
  numbers("top_k", 0, "sample among the best k; 0 = all", flag_values=values)
  numbers("seed", 0, "of sampling", flag_values=values)
  flags.DEFINE_float("top_p", 1.0, "nucleus", flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "0 = greedy", flag_values=values)
  _parse(command, argv, values, ["model"])
  _start_jax(None)
  from adapt_pruner_jax.data.tokenizer import load_tokenizer
  from adapt_pruner_jax.evaluation import generate as generate_
  from adapt_pruner_jax.formats import opening

  config, params, folder = opening.open_model(
    values.model, values.dtype, values.ignore_fields
  )
  tokenizer = load_tokenizer(folder)
  prompt = tokenizer.encode(values.prompt)
  (new,) = generate_.generate(
    config,
    params,
    [prompt],
    values.max_new_tokens,
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
    seed=values.seed,
  )
  print(tokenizer.backend.decode(prompt + new, skip_special_tokens=True))
  return 0


def convert(command: str, argv: list[str]) -> int:
  values = flags.FlagValues()
  text = flags.DEFINE_string
  text("model", None, "a directory or hub id", flag_values=values)
  text("out", "", "directory or file to write", flag_values=values)
  text("format", "hf", "hf, hf_uniform, gguf or orbax", flag_values=values)
  text(
    "dtype",
    "",
    "default as stored; gguf: f32, f16, bf16, q8_0",
    flag_values=values,
  )
  _define_ignore_fields(values)
  flags.DEFINE_bool("overwrite", False, "replace --out", flag_values=values)
  flags.DEFINE_bool(
    "verify", False, "check --model's SHA256SUMS", flag_values=values
  )
  _parse(command, argv, values, ["model"])
  _start_jax(None)
  from adapt_pruner_jax.formats import convert as convert_
  from adapt_pruner_jax.formats import orbax

  if values.verify:
    orbax.verify(values.model)
    return 0
  if not values.out:
    raise UserError("adapt-pruner convert needs --out=... (or --verify)")
  convert_.convert(
    values.model,
    Path(values.out),
    values.format,
    dtype=values.dtype,
    overwrite=values.overwrite,
    ignore_fields=values.ignore_fields,
  )
  return 0


def report(command: str, argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "of a run", flag_values=values)
  _parse(command, argv, values, ["workdir"])
  from adapt_pruner_jax.reporting.html import report as report_

  print(report_.write(Path(values.workdir)))
  return 0


COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
  "run": run,
  "plan": plan,
  "compare": compare,
  "evaluate": evaluate,
  "generate": generate,
  "convert": convert,
  "report": report,
}


# ---- Flags -------------------------------------------------------------------


def _define_config(values: flags.FlagValues, argv: list[str]) -> None:
  """--config=FILE and --config.section.field=value."""
  from ml_collections import config_flags

  from adapt_pruner_jax.config import Config, field_names

  names = field_names(Config())
  for argument in argv:
    name = argument.lstrip("-").split("=")[0]
    if name.startswith("config.") and name[7:] not in names:
      raise UserError(
        f"no config field {name}{nearest(name[7:], names)}; "
        "adapt_pruner_jax/config.py lists them"
      )
  default = ROOT.parent / "configs" / "tiny.py"
  if not default.exists():
    default = ROOT / "configs" / "tiny.py"
  argv[:] = [_found_config(a) for a in argv]
  config_flags.DEFINE_config_file(
    "config", str(default), "the recipe", flag_values=values, sys_argv=argv
  )


def _found_config(argument: str) -> str:
  """--config=configs/X.py also finds the recipes that are installed.

  What follows a colon, configs/X.py:0.4, is the argument of `get_config`.
  """
  flag, _, file = argument.partition("=")
  if flag.lstrip("-") != "config" or not file:
    return argument
  file, colon, given = file.partition(":")
  path = Path(file)
  for place in (path, ROOT.parent / path, ROOT / path):
    if place.is_file():
      return f"{flag}={place}{colon}{given}"
  folder = ROOT.parent / "configs"
  folder = folder if folder.is_dir() else ROOT / "configs"
  have = sorted(p.name for p in folder.glob("*.py") if p.stem != "__init__")
  raise UserError(
    f"--config={file}: no such file{nearest(path.name, have)}; there are "
    f"{', '.join('configs/' + n for n in have)}"
  )


def _config(values: flags.FlagValues):
  from adapt_pruner_jax.config import Config

  config = values.config
  if not isinstance(config, Config):
    raise UserError("the --config file's get_config() must return a Config")
  return config


def _define_ignore_fields(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "ignore_fields", "", "of config.json, comma separated", flag_values=values
  )


def _define_distributed(values: flags.FlagValues) -> None:
  flags.DEFINE_bool(
    "distributed",
    False,
    "one of several processes (TPU pod, Slurm, or the three flags below)",
    flag_values=values,
  )
  flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0", flag_values=values
  )
  flags.DEFINE_integer("num_processes", 0, "in all", flag_values=values)
  flags.DEFINE_integer("process_id", -1, "of this one", flag_values=values)
  flags.DEFINE_integer(
    "connect_seconds", 300, "wait for the others so long", flag_values=values
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
      from adapt_pruner_jax.config import Config

      print("\nconfig fields and their defaults; a recipe may set others:")
      for section, content in dataclasses.asdict(Config()).items():
        pairs = (
          content.items() if isinstance(content, dict) else [("", content)]
        )
        for name, value in pairs:
          print(f"  --config.{section}{'.' * bool(name)}{name}={value}")
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


def _workdir(path: str) -> Path:
  if "://" in path:
    raise UserError(
      f"--workdir={path} must be a directory: mount the bucket (Cloud Storage "
      "FUSE, s3fs) and give its path"
    )
  return Path(path).expanduser()


def _fail(error: Exception) -> None:
  if "jax" in sys.modules:  # else this process has not joined others
    from adapt_pruner_jax.distributed import processes

    processes.fail(error)


def _start_jax(values: flags.FlagValues | None) -> None:
  """Logging, several processes if asked for, and the compilation cache."""
  logging.set_verbosity(logging.WARNING)
  logging.use_absl_handler()
  import jax

  if values is not None and (values.distributed or values.coordinator):
    from adapt_pruner_jax.distributed import processes

    processes.connect(
      values.coordinator,
      values.num_processes,
      values.process_id,
      values.connect_seconds,
    )
  cache = os.environ.get("ADAPT_PRUNER_CACHE")
  home = Path(cache) if cache else Path.home() / ".cache" / "adapt_pruner_jax"
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(home / "jax"))
