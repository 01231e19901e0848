"""The tables of docs/budgets.md, from what budgets.py has measured.

They stand between two comments in the page, `begin` and `end` below. Intervals
are of 95 %, by paired bootstrap over the slices of all texts.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from real_model_numbers import RESAMPLES, TASKS, TEXTS
from real_model_questions import from_hex

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import markdown
from adapt_pruner_jax.storage import json_files, publish

BEGIN, END = "<!-- budgets.py: begin -->", "<!-- budgets.py: end -->"
DENSE = "dense"
NAMES = {
  DENSE: "SmolLM2-135M-Instruct",
  "file": "q8_0 gguf, at most 105 MB",
  "file_params": "parameters at which the gguf is as small",
  "file_vocab": "the same 105 MB, 16,384 tokens",
  "latency": "at most 0.75 x the decode time, 0.30 less asked for",
  "latency_params": "parameters at which decoding is as fast",
  "latency_one_width": "one width for all layers, 0.30 less asked for",
  "latency_share": "one share of all layers, 0.30 less asked for",
  "latency_36": "unequal layers, 0.36 less asked for",
  "vocab": "16,384 tokens, nothing else",
  "vocab_trained": "16,384 tokens, trained",
  "vocab_novels": "16,384 tokens for novels, trained",
  "hours": "half an hour, 20 % of the parameters",
  "flops": "0.80 x the FLOPs of a token",
  "cache": "0.75 x the cache",
  "quality": "at most 0.2 nats above the original on HELDOUT",
}
# Two rows that meet the same budget.
PAIRS = (
  ("file", "file_params"),
  ("latency", "latency_params"),
  ("latency", "latency_one_width"),
  ("latency_36", "latency_share"),
)
Rows = dict[str, dict]


def write(rows: Path, docs: Path) -> None:
  """Writes the tables into a page.

  Raises:
    UserError: the page has no place for them.
  """
  read = {row["row"]: row["result"] for row in json_files.read_lines(rows)}
  found = {name: read[name] for name in NAMES if name in read}
  whole = docs.read_text(encoding="utf-8")
  before, begin, rest = whole.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end:
    raise UserError(f"{docs} has no place for the tables: {BEGIN} and {END}")
  text = "\n\n".join([qualities(found), *pairs(found), commands(found)])
  publish.write_text(docs, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def qualities(found: Rows) -> str:
  """Bits per byte of each text, accuracy, and what the budget holds."""
  header = ["model", "parameters", "budget", *TEXTS.values(), "six tasks"]
  rows = []
  for name, result in found.items():
    bits = [f"{bits_per_byte(result, text):.3f}" for text in TEXTS]
    params = result.get("params_after", result.get("params"))
    size = f"{params:,}" if params else ""
    row = [NAMES[name], size, held(result), *bits]
    asked = "correct" in result
    rows.append([*row, f"{accuracy(result):.3f}" if asked else ""])
  return markdown.table(header, rows, header[3:])


def held(result: dict) -> str:
  """What a row has of its budget, measured."""
  timed = result.get("latency_budget")
  if timed:
    return (
      f"{timed['measured_ms']:.1f} ms ({timed['promised_ms']:.1f} promised), "
      f"{timed['ratio_measured']:.3f} x the original's "
      f"({timed['ratio_promised']:.3f})"
    )
  if "gguf_bytes" in result:
    return f"{result['gguf_bytes']:,} bytes"
  after = result.get("budget_after")
  if result.get("budget") in ("bytes", "kv_bytes"):
    return f"{after:,} bytes"
  if result.get("budget") == "flops":
    return f"{after / 1e6:,.1f} MFLOPs"
  if result.get("budget") == "quality":
    return f"{after:.3f} nats"
  if result.get("train_tokens"):
    minutes = result["wall_seconds"] / 60
    return f"{minutes:.1f} minutes, {result['train_tokens']:,} tokens"
  return ""


def bits_per_byte(result: dict, text: str) -> float:
  nats, size = sum(result["nats"][text]), sum(result["bytes"][text])
  return nats / size / math.log(2)


def accuracy(result: dict) -> float:
  """The mean over the tasks of the share that is right."""
  right, number = result["correct"], result["questions"]
  return float(np.mean([from_hex(right[n], number[n]).mean() for n in TASKS]))


def pairs(found: Rows) -> list[str]:
  """Each budget against a parameter target that meets it, a line each."""
  lines = []
  for name, other in PAIRS:
    if name in found and other in found:
      mean, low, high = difference(found[name], found[other], found[DENSE])
      lines.append(
        f"{NAMES[name]}, less {NAMES[other]}: {mean:+.3f} nats a token of the "
        f"original's ({low:+.3f} to {high:+.3f})."
      )
  lines += [
    f"{NAMES[name]}: {endings(result['endings'])}"
    for name, result in found.items()
    if "endings" in result
  ]
  return lines


def endings(result: dict) -> str:
  """Bits per byte of the ends of books, of the original and of a cut one."""
  dense, cut, size = (np.array(result[n]) for n in ("dense", "cut", "bytes"))
  bits = [x.sum() / size.sum() / math.log(2) for x in (cut, dense)]
  drawn = _resampled(len(size))
  changes = cut[drawn].sum(1) / dense[drawn].sum(1) - 1
  low, high = np.percentile(changes, (2.5, 97.5))
  return (
    f"{bits[0]:.3f} bits per byte on {len(size)} slices of the last 15 % of "
    f"eight books, whose beginnings it was cut for and trained on; the "
    f"original {bits[1]:.3f}: {bits[0] / bits[1] - 1:+.1%} ({low:+.1%} to "
    f"{high:+.1%})."
  )


def _resampled(number: int) -> np.ndarray:
  """Indices of so many slices, drawn again and again."""
  random = np.random.default_rng(0)
  return random.integers(0, number, (RESAMPLES, number))


def difference(
  one: dict, other: dict, dense: dict
) -> tuple[float, float, float]:
  """Nats a token of the original's, over all texts, with an interval."""
  of = lambda row, key: np.concatenate([row[key][text] for text in TEXTS])
  tokens = of(dense, "tokens")
  gap = of(one, "nats") - of(other, "nats")
  drawn = _resampled(len(gap))
  means = gap[drawn].sum(1) / tokens[drawn].sum(1)
  low, high = np.percentile(means, (2.5, 97.5))
  return gap.sum() / tokens.sum(), low, high


def commands(found: Rows) -> str:
  """What was typed, a block."""
  shown: Callable[[str], str] = lambda text: text.replace(" --", " \\\n  --")
  blocks = [
    f"# {NAMES[name]}\n{shown(result['command'])}"
    for name, result in found.items()
    if "command" in result
  ]
  return "```\n" + "\n\n".join(blocks) + "\n```"
