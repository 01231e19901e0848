"""Each command and program in the README, the pages and the recipes is run.

They run as they are written, in a directory that has what they name: a random
model called DIR, texts called FILE and HELDOUT, questions. Flags behind them
make them small. What cannot run here is in `NOT_HERE`, and its flags are read.
"""

import ast
import dataclasses
import functools
import os
import pathlib
import re
import shlex
import subprocess

import jax
import pytest

from adapt_pruner_jax import cli
from adapt_pruner_jax.config import Config, Ranking, latency_table
from adapt_pruner_jax.data import sources
from adapt_pruner_jax.distributed import sharding
from configs import oneshot
from tests import small_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
# What is in a line -> why it does not run here.
NOT_HERE = {
  "pip install": "needs the network",
  "vllm serve": "needs vLLM, which is not installed",
  "xpk workload": "needs a cluster",
  "sbatch": "needs Slurm",
  "--coordinator=": "needs four machines",
  "benchmarks/base_model.py": "trains for a quarter of an hour",
  "benchmarks/claims.py": "measures for hours",
  "benchmarks/real_model.py": "measures for hours",
  "benchmarks/tpu_compile.py": "needs libtpu, half a gigabyte",
  "configs/deepseek_r1_qwen_15b_to_1b.py": "needs the hub",
  "configs/llama31_8b_oneshot.py": "needs the hub",
  "configs/mobilellm_": "needs the hub",
  "configs/qwen25_05b_to_350m.py": "needs the hub",
  "configs/smollm2_135m.py": "needs the hub",
}
# What is in a line -> the flags that make it small, and fill what it leaves.
CALIBRATION = """--config.calibration.samples=8 --config.calibration.seq_len=16
  --config.calibration.batch=8 --config.calibration.refit_samples=16
  --config.prune.step_size=0.1"""
TRAINING = """--config.prune.stages=1 --config.train.tokens=256
  --config.data.seq_len=16 --config.data.batch=8"""
SMALL = {
  "adapt-pruner run": CALIBRATION,
  "adapt-pruner plan": CALIBRATION,
  "adapt-pruner compare": CALIBRATION + " --ratios=0.3",
  "--methods=all": "--methods=magnitude",
  "--recover_tokens": "--recover_tokens=256 " + TRAINING,
  "adapt-pruner generate": "--max_new_tokens=4",
  "compare-tiny": "--config.model.path=DIR",
  "run --workdir=runs/tiny": "--config.model.path=DIR " + TRAINING,
  "configs/accel.py": "--config.prune.target_params=33000 " + TRAINING,
  "configs/X.py": "--config.model.path=DIR --config.prune.ratio=0.3",
}


def commands(file: pathlib.Path) -> list[str]:
  """What is between ```bash and ```, a command a line."""
  text = file.read_text()
  blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  if file.suffix == ".py":  # a recipe's docstring has its command, indented
    blocks = re.findall(
      r"^  (adapt-pruner .*?)(?:\n\n|\n\"\"\")", text, re.MULTILINE | re.DOTALL
    )
  lines = re.sub(r"\\+\n", " ", "\n".join(blocks))  # doubled in docstrings
  return [line for line in lines.splitlines() if line.strip()]


def programs(file: pathlib.Path) -> list[str]:
  """What is between ```python and ```, but for a mere signature."""
  found = re.findall(r"^```python\n(.*?)^```", file.read_text(), re.M | re.S)
  return [program for program in found if "import" in program]


def words(line: str) -> list[str]:
  """The words of a command, with values in place of its placeholders."""
  line = re.sub(r"=N\b|=\$I\b", "=1", line).replace(" ...", " --workdir=W")
  line = line.replace("configs/X.py", "configs/oneshot.py")
  return shlex.split(os.path.expandvars(line), True)


def reason(line: str) -> str | None:
  """Why a command is not run."""
  return next((why for part, why in NOT_HERE.items() if part in line), None)


ALL = [(f, line) for f in PAGES + RECIPES for line in commands(f)]
OURS = [
  pytest.param(line, id=f"{file.name}-{number}")
  for number, (file, line) in enumerate(ALL)
  if line.startswith("adapt-pruner") and reason(line)
]
LAUNCHES = [
  pytest.param(line, id=f"{file.name}-{number}")
  for number, (file, line) in enumerate(ALL)
  if line.startswith("bash launch/")
]
RUN = {
  file: [line for f, line in ALL if f == file and not reason(line)]
  for file, _ in ALL
}


class Parsed(Exception):
  pass


def test_there_are_commands():
  assert sum(len(lines) for lines in RUN.values()) > 20
  assert len(OURS) > 5
  assert len(LAUNCHES) > 3


def test_how_it_works_has_the_imports_of_the_loop():
  tree = ast.parse((ROOT / "adapt_pruner_jax" / "runs" / "run.py").read_text())
  package = ROOT / "adapt_pruner_jax"
  imported = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and "adapt_pruner" in node.module:
      place = node.module.removeprefix("adapt_pruner_jax").strip(".")
      for name in node.names:
        file = package.joinpath(*place.split("."), f"{name.name}.py")
        imported.add(f"{place}.{name.name}" if file.exists() else place)
  text = (ROOT / "docs" / "how-it-works.md").read_text()
  table = text.split("## The loop of a run")[1].split("\n## ")[0]
  rows = [line.split("|")[1] for line in table.splitlines() if "| `" in line]
  assert set(re.findall(r"`([\w.]+)`", " ".join(rows))) == imported


def test_the_latency_table_of_the_docs_is_one(tmp_path):
  text = (ROOT / "docs" / "budgets.md").read_text()
  table = text.split("```json\n")[1].split("```")[0]
  (tmp_path / "table.json").write_text(table)
  read = latency_table.costs(str(tmp_path / "table.json"), "decode", 1, 512)
  assert read.half("F", 700) == 161_250  # of 704 channels, in nanoseconds


@pytest.mark.parametrize("part", NOT_HERE)
def test_reasons_are_of_commands(part):
  assert any(part in line for _, line in ALL)


@pytest.mark.parametrize("line", OURS)
def test_command_that_is_not_run_parses(line, monkeypatch):
  """Stopped once the flags are read, before anything else."""
  _, command, *arguments = words(line)
  real = cli._parse

  def parse(*args):
    real(*args)
    raise Parsed

  monkeypatch.setattr(cli, "_parse", parse)
  monkeypatch.chdir(ROOT)
  with pytest.raises(Parsed):
    cli.COMMANDS[command](command, arguments)


@pytest.fixture
def place(small_model, tmp_path, tmp_path_factory, monkeypatch):
  """A directory, and in it what the pages name, which is where we are."""
  text = sources.embedded_text("heldout")[:40_000]
  for name in ("FILE", "HELDOUT"):
    (tmp_path / name).write_text(text)
  (tmp_path / "DIR").symlink_to(small_model)
  small_runs.write_questions(tmp_path / "QUESTIONS")
  cache = tmp_path_factory.getbasetemp() / "cache"  # what a page has compiled
  monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(cache))
  monkeypatch.chdir(tmp_path)
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "make_mesh", one)  # which compiles fastest
  old = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", old)


@pytest.mark.slow
@pytest.mark.parametrize(
  "file", [f for f in RUN if RUN[f]], ids=lambda f: f.name
)
def test_commands_run(file, place, monkeypatch):
  """Those of a page one after the other, as they build on each other."""
  for line in RUN[file]:
    small = " ".join(flags for part, flags in SMALL.items() if part in line)
    program, *arguments = words(line) + small.split()
    if program == "adapt-pruner":
      with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
      assert not stop.value.code, line
    else:
      assert line.startswith("bash launch/"), line  # see the next test
  for program in programs(file):
    if "llama_cpp" not in program:  # see gguf_test
      exec(compile(program, file, "exec"), {})


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_script_takes_it(line, tmp_path):
  """It would install and use devices: a dry run, with a GPU's driver."""
  driver = tmp_path / "nvidia-smi"
  driver.write_text("#!/bin/sh\necho 580.65.06\n")
  driver.chmod(0o755)
  script, *arguments = words(line)[1:]
  done = subprocess.run(
    ["bash", script, "--dry-run", *arguments],
    cwd=ROOT,
    env=os.environ
    | {
      "ADAPT_PRUNER_CACHE": "/nonexistent",
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
    if "://" not in target:
      assert (page.parent / target).exists(), target


def test_the_readme_has_the_recipe_in_python():
  """What `configs/oneshot.py` says, as arguments."""
  text = (ROOT / "README.md").read_text()
  call = re.search(r"smaller = (prune\(.*?\n\))", text, re.DOTALL)[1]
  arguments = ast.parse(call).body[0].value.keywords
  given = {a.arg: ast.unparse(a.value) for a in arguments}
  recipe, plain = oneshot.get_config(), Config()
  for name in ("prune", "calibration"):
    section, default = getattr(recipe, name), getattr(plain, name)
    for field in dataclasses.fields(section):
      value = getattr(section, field.name)
      if value != getattr(default, field.name):
        found = eval(given.pop(field.name), {"Ranking": Ranking})
        assert found == value, field.name
  assert given.keys() == {"ratio", "calibration"}


def test_the_tables_of_the_real_model_are_its_cells(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import real_model_bench
  import real_model_report

  found = real_model_bench.read_cells(ROOT / "benchmarks" / "real_model.jsonl")
  for file, table in (
    ("README.md", real_model_report.summary(found)),
    ("docs/results.md", real_model_report.untrained(found, 0.2)),
  ):
    assert table in (ROOT / file).read_text(), "--part=report writes it"


def test_the_readme_says_first_what_on_what_and_how_long():
  """Before any table, and so before any of losses."""
  text = (ROOT / "README.md").read_text()
  before = text[: text.index("\n|")]
  for words in ("What it is for", "It was run on CPUs only", "takes minutes"):
    assert words in before
