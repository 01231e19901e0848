"""The tables of docs/budgets.md, from what budgets.py has measured."""

from pathlib import Path


def write(rows: Path, docs: Path) -> None:
  raise NotImplementedError
