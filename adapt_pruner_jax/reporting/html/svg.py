"""Matplotlib figures as SVG inside an HTML page.

Colours are CSS variables of the page (`var(--ink)`), so that one drawing serves
light and dark; matplotlib, which knows no variables, draws with a stand-in
colour for each. Text stays text. Whatever is drawn with a `gid` has an id in
the SVG, and may have a tooltip.
"""

import html
import io
import re
from collections.abc import Callable
from typing import Any

REMOVED = 5  # tints of what was removed, first stages to last
DIVERGING = 7  # colours of importance, lowest to highest
DEPTH = 6  # colours of lines, first layers to last
_NAMES = (
  ["ink", "muted", "grid", "kept", "accent"]
  + [f"removed{i}" for i in range(REMOVED)]
  + [f"importance{i}" for i in range(DIVERGING)]
  + [f"depth{i}" for i in range(DEPTH)]
)
# Stand-ins: colours that nothing else has.
TONE = {name: f"#00fe{i:02x}" for i, name in enumerate(_NAMES)}
_VARIABLE = {tone: f"var(--{name})" for name, tone in TONE.items()}

WIDE, NARROW = 7.6, 3.7  # inches; the page shows one of the two
STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "adapt-pruner",
  "text.parse_math": False,  # labels come from files: "$" is a dollar
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.titlelocation": "left",
  "axes.titlecolor": TONE["ink"],
  "axes.facecolor": "none",
  "axes.edgecolor": TONE["grid"],
  "axes.labelcolor": TONE["muted"],
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.axisbelow": True,
  "figure.facecolor": "none",
  "grid.color": TONE["grid"],
  "grid.linewidth": 0.7,
  "text.color": TONE["ink"],
  "xtick.color": TONE["muted"],
  "ytick.color": TONE["muted"],
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "lines.linewidth": 1.5,
}


def render(
  draw: Callable[[Any, bool, dict[str, str]], None],
  name: str,
  height: float,
  label: str,
  narrow_height: float | None = None,
) -> str:
  """A chart in two widths, `<div class="chart">`; the page shows one of them.

  Args:
    draw: called with an empty matplotlib figure, whether it is the narrow one,
      and a dict to which it adds tooltips by gid.
    name: begins the ids in it: `NAME-wide-GID`, `NAME-narrow-GID`.
    height: in inches.
    label: what is to be seen, for those who cannot see it.
    narrow_height: of the narrow one, if another.
  """
  import matplotlib
  from matplotlib.figure import Figure

  drawn = []
  sizes = {"wide": (WIDE, height), "narrow": (NARROW, narrow_height or height)}
  for kind, size in sizes.items():
    tooltips: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
      figure = Figure(size, layout="constrained")
      draw(figure, kind == "narrow", tooltips)
      drawn.append(_inline(figure, f"{name}-{kind}", kind, label, tooltips))
  return f'<div class="chart" id="{name}">{"".join(drawn)}</div>'


def _inline(figure, prefix, kind, label, tooltips) -> str:
  file = io.StringIO()
  figure.savefig(file, format="svg", metadata={"Date": None})
  text = file.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
  text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
  text = re.sub(r"#00fe[0-9a-f]{2}", lambda m: _VARIABLE[m[0]], text)
  # Ids are unique on a page, and nine charts are on it.
  text = re.sub(r'\bid="', f'id="{prefix}-', text)
  text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
  for gid, tip in tooltips.items():
    group = f'<g id="{prefix}-{gid}">'
    text = text.replace(group, f"{group}<title>{html.escape(tip)}</title>", 1)
  box = re.search(r'viewBox="[^"]*"', text)[0]
  head = f'<svg class="{kind}" {box} role="img" aria-label="{_attr(label)}"'
  head += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
  return head + re.sub(r"^<svg[^>]*>", "", text).strip()


def _attr(text: str) -> str:
  return html.escape(text, quote=True)
