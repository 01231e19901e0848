"""Whole runs of a small random model, for tests."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax

from adapt_pruner_jax.config import Config, field_names, get
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.runs import tiny_model
from adapt_pruner_jax.storage import json_files

CHAT_TEMPLATE = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)
ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = tiny_model.Recipe(V=300, D=32, L=3, K=4, G=2, H=8, F=48, context=64)
QUESTIONS = [
  ("What does a with statement wrap?", ["a block", "a fish", "the sea"], 0),
  ("Which of these is a number?", ["seven", "object", "string"], 0),
  ("What does a function return?", ["a tree", "a value", "a road"], 1),
  ("What is a list of?", ["rain", "wind", "items"], 2),
]


def make_model(folder: pathlib.Path) -> pathlib.Path:
  """A random model with a tokenizer, as a HuggingFace directory."""
  tiny_model.train_tokenizer(folder / "tokenizer", SMALL.V)
  config = tiny_model.config_of(SMALL)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = tiny_model.init_params(config, 0, mesh)
  params = jax.tree.map(lambda x: x * 3, params)  # so that layers differ
  save.save(config, params, folder / "model", source=folder / "tokenizer")
  return folder / "model"


def write_questions(folder: pathlib.Path) -> int:
  """The questions as arc_easy's, in a new folder; returns their number."""
  folder.mkdir()
  for question, choices, answer in QUESTIONS:
    row = {"question": question, "choices": choices, "answer": answer}
    json_files.append_line(folder / "arc_easy.jsonl", row)
  return len(QUESTIONS)


def recipe(path, stages: int = 2, tokens: int = 0, **prune_fields) -> Config:
  config = Config()
  config.model.path = str(path)
  config.prune = dataclasses.replace(
    config.prune, ratio=0.3, stages=stages, step_size=0.05, **prune_fields
  )
  config.calibration = dataclasses.replace(
    config.calibration, samples=8, seq_len=16, batch=4, refit_samples=16
  )
  config.data = dataclasses.replace(config.data, seq_len=32, batch=8)
  config.train = dataclasses.replace(
    config.train, tokens=tokens, learning_rate=1e-3
  )
  config.mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1)
  config.eval = dataclasses.replace(config.eval, text="embedded", seq_len=64)
  config.checkpoint.steps = 4
  config.log.tensorboard = False
  return config


def flags_of(config: Config, path: os.PathLike) -> list[str]:
  """The command line of a run with this recipe."""
  default = Config()
  return [
    "--config=configs/paper.py",
    f"--workdir={path}",
    *(
      f"--config.{name}={get(config, name)}"
      for name in field_names(config)
      if get(config, name) != get(default, name)
    ),
  ]


def start(
  config,
  path,
  env: dict[str, str],
  *more: str,
  said: pathlib.Path | None = None,
  cwd: pathlib.Path = ROOT,
) -> subprocess.Popen:
  """A run in a process of its own; its output goes to a file, beside the work
  directory or `said`, as a pipe that nobody reads would stop it."""
  # What was compiled once serves the run that goes on.
  env = env | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  with open(_output(said or path, *more), "a") as output:
    return subprocess.Popen(
      [
        *(sys.executable, "-m", "adapt_pruner_jax", "run"),
        *flags_of(config, path),
        *more,
      ],
      env=os.environ | env,
      cwd=cwd,
      stdout=output,
      stderr=subprocess.STDOUT,
    )


def output(path: pathlib.Path, *more: str) -> str:
  """What the processes in this directory have said, with these flags."""
  return _output(path, *more).read_text()


def finish(config, path, env: dict[str, str]) -> str:
  """Runs to the end; returns the output."""
  assert start(config, path, env).wait(300) == 0, output(path)
  return output(path)


def _output(path: pathlib.Path, *more: str) -> pathlib.Path:
  process = more[-1].split("=")[-1] if more else ""
  return path.with_name(f"{path.name}{process}.out")


def profiled(path: pathlib.Path) -> list[int]:
  """Train steps in the one trace below a work directory."""
  (file,) = path.glob("profile/plugins/profile/*/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(file)).planes
  events = [e for plane in planes for line in plane.lines for e in line.events]
  # Calls of Python, which are named so, are not traced (reporting/trace.py).
  assert not [e.name for e in events if e.name.startswith("$")]
  return [dict(e.stats)["step_num"] for e in events if e.name == "train"]
