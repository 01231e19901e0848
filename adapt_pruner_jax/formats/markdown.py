"""Tables in Markdown."""

from collections.abc import Collection, Sequence
from typing import Any


def table(
  columns: Sequence[str],
  rows: Sequence[Sequence[Any]],
  numbers: Collection[str] = (),
) -> str:
  """A table; the columns `numbers` are set to the right."""
  rule = ["---:" if column in numbers else "---" for column in columns]
  lines = [columns, rule, *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
