"""Every command in the README and the pages parses: its flags exist."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest

from adapt_pruner_jax import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


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


def words(line: str) -> list[str]:
  """The words of a command, with values in place of its placeholders."""
  line = re.sub(r"=N\b|=\$I\b", "=1", line).replace(" ...", " --workdir=W")
  return shlex.split(line.replace("configs/X.py", "configs/accel.py"), True)


ALL = [(f, line) for f in PAGES + RECIPES for line in commands(f)]
OURS = [
  pytest.param(line, id=f"{file.name}-{number}")
  for number, (file, line) in enumerate(ALL)
  if line.startswith("adapt-pruner")
]
LAUNCHES = [
  pytest.param(line, id=f"{file.name}-{number}")
  for number, (file, line) in enumerate(ALL)
  if line.startswith("bash launch/")
]


class Parsed(Exception):
  pass


def test_there_are_commands():
  assert len(OURS) > 10
  assert len(LAUNCHES) > 3


@pytest.mark.parametrize("line", OURS)
def test_command_parses(line, monkeypatch):
  """Stopped once the flags are read, before anything else."""
  _, command, *arguments = words(line)
  real = main._parse

  def parse(*args):
    real(*args)
    raise Parsed

  monkeypatch.setattr(main, "_parse", parse)
  monkeypatch.chdir(ROOT)
  with pytest.raises(Parsed):
    main.COMMANDS[command](command, arguments)


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_script_takes_it(line):
  script, *arguments = words(line)[1:]
  done = subprocess.run(
    ["bash", script, "--dry-run", *arguments],
    cwd=ROOT,
    env=os.environ | {"ADAPT_PRUNER_CACHE": "/nonexistent"},
    capture_output=True,
    text=True,
  )
  said = done.stdout + done.stderr
  if script.endswith("gpu.sh") and "GPU" in done.stderr:
    return  # says in one line that there is none here
  assert done.returncode == 0, said
  assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
    if "://" not in target:
      assert (page.parent / target).exists(), target
