"""What a compiled TPU program costs, read from its HLO.

The TPU compiler writes its own estimate of the cycles of each fusion into the
scheduled program, and every collective stands there with its shape. Nothing is
taken to overlap, so a time that is added up from these is a bound from above:
good for comparing two programs, not for promising a speed.
"""

import dataclasses
import itertools
import math
import re

BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
KERNEL = re.compile(
  r'"cost_estimate":\{"bytes_accessed":"(\d+)","flops":"(\d+)"'
)
CALLED = re.compile(r"(?:to_apply|calls)=%([\w.\-]+)")
# Fusions around a collective repeat it; these are the ones that start it.
STARTS = re.compile(
  r"async-collective-start|(all-reduce|reduce|all)-(scatter|gather|to-all)"
)


@dataclasses.dataclass
class Cost:
  """What a chip does when it runs a program once.

  Attributes:
    cycles: that the compiler estimates.
    sent: bytes of collectives, by kind.
    computations: how many the program has; grows with what is unrolled.
    kernels: how often each Pallas kernel runs that says what it takes, its
      FLOPs, and the bytes it moves; the compiler estimates no cycles of it.
  """

  cycles: float = 0.0
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  computations: int = 0
  kernels: list[tuple[float, int, int]] = dataclasses.field(
    default_factory=list
  )


def cost(text: str, chips: int) -> Cost:
  """Adds up a scheduled program.

  Args:
    text: `compiled.as_text()`.
    chips: in a group of a collective that does not name its groups.
  """
  computations, entry = parse(text)
  found = Cost(computations=len(computations))
  _add(computations, entry, chips, 1.0, found)
  return found


def parse(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
  """The instructions (name, rest) of each computation, and the entry's name."""
  computations: dict[str, list[tuple[str, str]]] = {}
  name, entry = None, ""
  for line in text.splitlines():
    if head := HEAD.match(line):
      name = head[2]
      computations[name] = []
      entry = name if head[1] else entry
    elif line.rstrip() == "}":
      name = None
    elif name is not None:
      body = computations[name]
      if found := INSTRUCTION.match(line):
        body.append((found[1], found[2]))
      elif body and line.startswith("}}"):  # a kernel's metadata has lines
        body[-1] = body[-1][0], body[-1][1] + line
  return computations, entry


def _add(computations, name, chips, times, found):
  for instruction, rest in computations[name]:
    made, op, tail = _split(rest)
    inner = CALLED.search(tail)
    if op == "while":
      body = re.search(r"body=%([\w.\-]+)", tail)[1]
      trips = _trips(tail, computations)
      _add(computations, body, chips, times * trips, found)
    elif op == "conditional":  # of its branches the dearest counts
      _add_dearest(computations, tail, chips, times, found)
    elif op in ("call", "async-start") and inner:
      _add(computations, inner[1], chips, times, found)
    elif op.removesuffix("-start") in COLLECTIVES:
      kind, sent = _sent(op.removesuffix("-start"), made, tail, chips, name)
      found.sent[kind] = found.sent.get(kind, 0) + sent * times
    else:
      if cycles := re.search(r'"estimated_cycles":"(\d+)"', tail):
        found.cycles += int(cycles[1]) * times
      if kernel := KERNEL.search(tail):
        found.kernels.append((times, int(kernel[2]), int(kernel[1])))
      fused = op == "fusion" and inner
      if fused and (STARTS.match(instruction) or STARTS.match(inner[1])):
        _add(computations, inner[1], chips, times, found)


def _add_dearest(computations, tail, chips, times, found):
  branches = re.search(r"branch_computations=\{([^}]*)\}", tail)
  names = re.findall(r"%([\w.\-]+)", branches[1] if branches else "")
  names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", tail)
  costs = []
  for name in names:
    costs.append(Cost())
    _add(computations, name, chips, times, costs[-1])
  dearest = max(costs, key=lambda c: c.cycles)
  found.cycles += dearest.cycles
  found.kernels += dearest.kernels
  for kind, sent in dearest.sent.items():
    found.sent[kind] = found.sent.get(kind, 0) + sent


def _split(rest: str) -> tuple[str, str, str]:
  """The type that an instruction makes, its operation, and what follows."""
  end = rest.find(" ")
  if rest.startswith("("):
    depth = itertools.accumulate((c == "(") - (c == ")") for c in rest)
    end = next(i for i, open_ in enumerate(depth, 1) if not open_)
  tail = rest[end:]
  op = re.match(r"\s*([\w\-]+)\(", tail)
  return rest[:end], op[1] if op else "", tail


def _trips(tail: str, computations: dict) -> int:
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', tail)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%([\w.\-]+)", tail)[1]
  numbers = [
    int(n[1])
    for _, rest in computations[condition]
    if (n := re.search(r"[su]32\[\][^ ]* constant\((\d+)\)", rest))
  ]
  return max(numbers, default=1)


def _sent(kind, made, tail, chips, computation) -> tuple[str, float]:
  """Bytes that a chip sends in a ring, and the kind of collective."""
  sizes = [
    BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    for dtype, dims in SHAPE.findall(made)
    if dtype in BYTES
  ]
  group = _group(tail, chips)
  share = (group - 1) / group
  if kind == "all-reduce" and "all-reduce-scatter" in computation:
    return "reduce-scatter", sum(sizes) * share
  if kind == "all-gather":
    return kind, max(sizes, default=0) * share
  if kind == "reduce-scatter":  # what it makes is one shard
    return kind, max(sizes, default=0) * (group - 1)
  if kind == "all-reduce":
    return kind, 2 * sum(sizes) * share
  if kind == "all-to-all":
    return kind, sum(sizes) * share
  return kind, max(sizes, default=0)


def _group(tail: str, chips: int) -> int:
  """Chips of a group of a collective."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", tail):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    cut = re.findall(r"'([^']+)'", found[2])
    return max(math.prod(int(sizes.get(axis, 1)) for axis in cut), 1)
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", tail):
    return int(found[2])
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", tail):
    return len(found[1].split(","))
  return chips
