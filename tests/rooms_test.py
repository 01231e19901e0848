"""The order of the rooms: a sub-package imports only those below it."""

import ast
import importlib
import pathlib
import re

import pytest

PACKAGE = "adapt_pruner_jax"
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE
# From the top down; what stands together may import each other.
ORDER = (
  ("__main__", "cli", "api"),
  ("planning",),
  ("runs",),
  ("reporting",),
  ("evaluation",),
  ("formats",),
  ("pruning",),
  ("training",),
  ("data",),
  ("storage",),
  ("distributed",),
  ("models",),
  ("config", "errors", "__init__"),
)
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names}
ROOMS = sorted(p.parent for p in ROOT.rglob("*/__init__.py"))


def imported(file):
  """Names in the package that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(file.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_point_down():
  up = []
  for file in ROOT.rglob("*.py"):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(file):
      parts = name.split(".")
      if parts[0] != PACKAGE or len(parts) == 1 or parts[1] == room:
        continue
      if LEVEL[parts[1]] < LEVEL[room]:
        up.append(f"{file.relative_to(ROOT)} imports {name}")
  assert not up


def test_the_root_holds_the_front_doors_only():
  files = {p.stem for p in ROOT.glob("*.py")}
  rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")}
  assert files == {"__init__", "__main__", "cli", "api", "errors"}
  assert files | rooms == set(LEVEL)


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.name)
def test_a_room_says_what_each_of_its_files_is_for(room):
  name = ".".join(room.relative_to(ROOT.parent).parts)
  said = importlib.import_module(name).__doc__ or ""
  files = {p.stem for p in room.glob("*.py")} - {"__init__"}
  inner = {p.parent.name for p in room.glob("*/__init__.py")}
  named = set(re.findall(r"\w+", said))
  assert not sorted((files | inner) - named)
