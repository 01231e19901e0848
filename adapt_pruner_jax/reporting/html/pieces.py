"""Boxes, tables and legends, as HTML; their words are escaped."""

import html
from collections.abc import Sequence

from adapt_pruner_jax.reporting.html.charts import as_number


def section(title: str, text: str, inner: str) -> str:
  """A box; `inner` is HTML, the others are text."""
  intro = f"<p>{html.escape(text)}</p>" if text else ""
  return f"<section><h2>{html.escape(title)}</h2>{intro}{inner}</section>"


def table(
  columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = ""
) -> str:
  """A table of text; `kind` is its class."""
  head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
  head = f"<tr>{head}</tr>" if any(columns) else ""
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
    for row in rows
  )
  return f'<div class="scroll"><table class="{kind}">{head}{body}</table></div>'


def legend(entries: Sequence[tuple[Sequence[str], str]]) -> str:
  """Colours, by their names in the page, with what they stand for."""
  spans = []
  for colours, label in entries:
    boxes = "".join(f'<i style="background:var(--{c})"></i>' for c in colours)
    spans.append(f"<span>{boxes}{html.escape(label)}</span>")
  return f'<div class="legend">{"".join(spans)}</div>'


def change(name: str, before: float, after: float) -> tuple[str, ...]:
  """A row of a table: before, after, and by how much it changed."""
  low, high = as_number(before), as_number(after)
  relative = f"{high / low - 1:+.1%}".replace("-", "−") if low else ""
  return name, f"{low:.4g}", f"{high:.4g}", relative


def gone(before: int, after: int) -> str:
  """The share that is gone."""
  return f"{1 - after / before:.0%}" if before else ""


def shown(value: float | None) -> str:
  """A number for people."""
  return "" if value is None else f"{as_number(value):.4g}"
