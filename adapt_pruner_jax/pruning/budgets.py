"""What a target is counted in: parameters, FLOPs, bytes, cache, milliseconds.

params    as everywhere; a tied output matrix once
flops     of one token behind `prune.budget_context` - 1 others, whose keys and
          values are in the cache; the embedding's look-up is none
bytes     of the weights in an export of `prune.budget_export`: safetensors in
          f32, f16 or bf16, or a gguf (`file_bytes`)
quality   the loss: as params, and pruning stops where it is too much
kv_bytes  of the keys and values of `prune.budget_batch` sequences of
          `prune.budget_context` tokens, two bytes a number
latency   by a table of what halves of some widths take on a device
          (`config.latency_table`), counted in nanoseconds

Each is a sum over half layers, and what is outside of them: `half` is what one
takes, whatever its width. In quantised files rows come in blocks, on some
devices widths in lanes: MLP widths then become multiples (`Prune.rounding`).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from adapt_pruner_jax.config import Prune, latency_table
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import axes, flops, model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import file_bytes

CACHED = 2  # bytes of a number in the cache
UNIT = {"params": "parameters", "flops": "FLOPs", "bytes": "bytes"}
UNIT |= {"kv_bytes": "bytes of cache", "latency": "ms"}
UNIT |= {"quality": "parameters"}
NUMBERS = ("params", "quality")  # count parameters
Curves = dict[str, list[np.ndarray]]  # {"K": an int [K + 1] a layer, "F": ...}


def count(config: ModelConfig, settings: Prune) -> int:
  """How much of the budget a model takes: `value` has it in its unit."""
  if settings.budget in NUMBERS:
    return model_config.count_params(config)
  units = config.units()
  return _outside(config, settings) + sum(
    int(half(config, settings, u, i, units[u][i]))
    for u in UNITS
    for i in range(config.num_layers)
  )


def value(amount: int, settings: Prune) -> float | int:
  """A count in the budget's own unit: milliseconds, else as it is."""
  if settings.budget == "latency":
    return amount / latency_table.NANO
  return amount


def amount(value: float, settings: Prune) -> int:
  """The largest count that is not above a value in the budget's own unit."""
  scale = latency_table.NANO if settings.budget == "latency" else 1
  return int(value * scale)


def shown(amount: int, settings: Prune) -> str:
  """A count for people, with its unit."""
  return f"{number(amount, settings)} {unit(settings)}"


def number(amount: int, settings: Prune) -> str:
  """A count for people."""
  form = ",.3f" if settings.budget == "latency" else ","
  return format(value(amount, settings), form)


def aim(target: int, settings: Prune) -> str:
  """Where a prune ends, for people."""
  if settings.budget == "quality":
    return f"at most {settings.budget_value} nats (or of the accuracy) worse"
  return shown(target, settings)


def unit(settings: Prune) -> str:
  """The budget's unit, and what it is of, for people."""
  if settings.budget == "bytes":
    return f"bytes of {settings.budget_export}"
  if settings.budget == "latency":
    return f"ms ({phase(settings)})"
  return UNIT[settings.budget]


def phase(settings: Prune) -> str:
  """What a latency is of, for people."""
  what = "a token" if settings.budget_phase == "decode" else "a prompt"
  return (
    f"{what}, batch {settings.budget_batch}, context {settings.budget_context}"
  )


def of_widths(
  full: ModelConfig, width: Mapping[str, np.ndarray], settings: Prune
) -> int:
  """`count` of the model with these sizes, {"K": [L], "F": [L]}."""
  units = {u: tuple(int(n) for n in width[u]) for u in UNITS}
  return count(full.with_units(units), settings)


def curves(config: ModelConfig, settings: Prune) -> Curves:
  """What each half takes at each width from 0 to the one that it has."""
  return {
    u: [
      half(config, settings, u, i, np.arange(width + 1))
      for i, width in enumerate(config.units()[u])
    ]
    for u in UNITS
  }


def unit_cost(config: ModelConfig, settings: Prune) -> dict[str, np.ndarray]:
  """How much goes with a unit of each layer, {"K": [L], "F": [L]}.

  The mean where it depends on the width, over whole blocks.
  """
  if settings.budget in NUMBERS:
    layers = range(config.num_layers)
    cost = [model_config.unit_cost(config, i) for i in layers]
    return {u: np.array([of_layer[u] for of_layer in cost]) for u in UNITS}
  block, found = settings.rounding(), {}
  for u in UNITS:
    few, costs = block[u], []
    for i, width in enumerate(config.units()[u]):
      many = max(width // few, 2) * few
      all_, one = half(config, settings, u, i, np.array([many, few]))
      costs.append((all_ - one) / (many - few) or one / few)
    found[u] = np.array(costs)
  return found


def half(
  config: ModelConfig,
  settings: Prune,
  unit: str,
  layer: int,
  width: int | np.ndarray,
) -> np.ndarray:
  """What a layer's attention (K) or MLP (F) takes, int64 of `width`'s shape.

  Args:
    config: of the model; the layer's own width is not read.
    width: units that it has; nothing is left of a half without any.
  """
  width = np.asarray(width, np.int64)
  seen = _seen(config, settings)[layer]
  if settings.budget == "latency":
    return _table(settings).half(unit, width)
  if settings.budget == "kv_bytes":
    each = _cached(config, layer, seen) if unit == "K" else 0
    return CACHED * settings.budget_batch * each * width
  letters = (x for x, of in axes.LETTERS.items() if of == unit)
  sizes = config.sizes(layer) | dict.fromkeys(letters, width)
  names, what = (
    _names(config, layer),
    file_bytes.Layer(layer, config.num_layers),
  )
  total = sum(
    _tensor(settings, n, _asked(config, settings, n, sizes), what)
    for n in names[unit]
  )
  if settings.budget == "flops" and unit == "K":
    total = total + width * flops.of_group(config, layer, seen)
  return np.where(width > 0, total, 0)


def _outside(config: ModelConfig, settings: Prune) -> int:
  """What the embedding, the output, and layers without units take."""
  if settings.budget == "kv_bytes":
    return 0
  if settings.budget == "latency":
    return _table(settings).outside(config.vocab_size)
  names = model_config.outer_names(config)
  if settings.budget == "flops":  # not of what is looked up
    looked_up = {"told"} if config.tied else {"told", "embedding"}
    names = [name for name in names if name not in looked_up]
  what = file_bytes.Layer(None, config.num_layers, config.tied)
  total = sum(_tensor(settings, n, config.sizes(), what) for n in names)
  for i in range(config.num_layers):
    what = file_bytes.Layer(i, config.num_layers)
    total += sum(
      int(_tensor(settings, n, config.sizes(i), what))
      for n in _names(config, i)[""]
    )
  return int(total)


def _tensor(
  settings: Prune, name: str, sizes: Mapping, what: file_bytes.Layer
) -> int | np.ndarray:
  """Numbers, bytes or FLOPs of a parameter; its sizes may be arrays."""
  numbers = 1
  for n in axes.shape(name, sizes):
    numbers = numbers * n
  if settings.budget == "bytes":
    return file_bytes.tensor(settings.budget_export, name, sizes, what)
  return 2 * numbers if settings.budget == "flops" else numbers


def _asked(
  config: ModelConfig, settings: Prune, name: str, sizes: Mapping
) -> Mapping:
  """Of a parameter, what a token's FLOPs are of: it sees some experts only."""
  if settings.budget == "flops" and axes.AXES[name][0] == "X":
    return {**sizes, "X": config.experts_per_token}
  return sizes


def _names(config: ModelConfig, layer: int) -> dict[str, list[str]]:
  """Parameters of a layer's attention ("K"), of its MLP ("F"), of both ("")."""
  units = {"": (0, 0), "K": (1, 0), "F": (0, 1)}
  one = config.with_layers([layer])
  made = {
    u: model_config.layer_names(one.with_units({"K": (k,), "F": (f,)}), 0)
    for u, (k, f) in units.items()
  }
  # A norm that both halves share is as if there always.
  made[""] = [n for n in made["K"] if n in made[""] or n in made["F"]]
  always = {*made[""]}
  return made | {u: [n for n in made[u] if n not in always] for u in UNITS}


def _cached(config: ModelConfig, layer: int, seen: int) -> int:
  """Numbers that a KV group of a layer keeps of a sequence."""
  if config.reuses and config.reuses[layer]:
    return 0  # those of another layer
  if not config.is_delta(layer):
    return 2 * config.group(layer)[1] * seen
  net = config.delta_net
  values = net.values_per_key * net.value_dim
  inputs = (net.taps - 1) * (2 * net.key_dim + values)
  return inputs + 2 * net.key_dim * values  # the memory is float32


def _seen(config: ModelConfig, settings: Prune) -> np.ndarray:
  """Tokens that a layer's attention sees at the context, int [L]."""
  context = settings.budget_context
  window = config.window or (0,) * config.num_layers
  return np.array([min(w or context, context) for w in window], np.int64)


# ---- Latency -----------------------------------------------------------------


def _table(settings: Prune) -> latency_table.Costs:
  return latency_table.costs(
    settings.budget_table,
    settings.budget_phase,
    settings.budget_batch,
    settings.budget_context,
  )


def check_table(config: ModelConfig, settings: Prune, device: str) -> None:
  """Raises a UserError for a latency table of another model or device.

  Args:
    device: the name of what is here; `prune.budget_device` overrules it.
  """
  file = settings.budget_table
  table, name = latency_table.read(file), f"--config.prune.budget_table={file}"
  costs = _table(settings)
  for field in latency_table.MODEL:
    mine, theirs = getattr(config, field), table["model"][field]
    cut = field == "vocab_size" and costs.output is not None and mine < theirs
    if mine != theirs and not cut:
      raise UserError(
        f"{name} is of another model: its {field} is {theirs:,}, this one's "
        f"{mine:,}; measure this one: adapt-pruner profile --model=DIR"
      )
  wanted = settings.budget_device or device
  if table["device"] != wanted:
    raise UserError(
      f"{name} is of another device ({table['device']}) than {wanted}: measure "
      "here (adapt-pruner profile), or say that you prune for that one: "
      f"--config.prune.budget_device='{table['device']}'"
    )
  for u, what in (("K", "KV groups"), ("F", "MLP channels")):
    most = max(config.units()[u])
    last = costs.points[u][0][-1]
    if most > last:
      raise UserError(
        f"{name} ends at {last:,} {what}, and the model has layers of "
        f"{most:,}: measure up to that width"
      )


# ---- Several at once ---------------------------------------------------------


def limits(settings: Prune) -> list[tuple[Prune, int]]:
  """`prune.limits` as settings of a budget each, and the most they may be."""
  found, multiples = [], settings.rounding()
  for name, value in settings.other_limits():
    other = dataclasses.replace(
      settings,
      budget=name,
      budget_value=value,
      ratio=0.0,
      target_params=0,
      limits="",
      round_ffn_to=multiples["F"],
      round_kv_to=multiples["K"],
    )
    found.append((other, amount(value, other)))
  return found
