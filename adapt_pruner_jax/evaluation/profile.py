"""`adapt-pruner profile`: a latency table of this device.

Whole models are timed, since a layer alone stays in the caches of a CPU: of
equal layers, random weights, and one width of attention or MLP after the other.
Each is timed in turns with the widest one, so that a device that gets slower
meanwhile slows both. The format is `config.latency_table`'s.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.config import latency_table
from adapt_pruner_jax.distributed import virtual_devices
from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.evaluation import latency
from adapt_pruner_jax.formats.hf import load, save
from adapt_pruner_jax.formats.opening import check_dtype
from adapt_pruner_jax.models import axes, model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import json_files, publish

ENGINES = ("jax", "transformers")
LAYERS = 12  # that are timed, at most; all are alike
LANES = {"tpu": 128, "gpu": 64}  # multiples at which an MLP's time falls
CPU_LANES = 16
PAIRS = 20  # in which a finished model is timed against the original
Timer = Callable[[], float]  # milliseconds of one call


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    phase: decode (one token of all rows) or prefill (all prompts).
    batch: rows.
    context: tokens that a new one sees, or of a prompt.
  """

  phase: str = "decode"
  batch: int = 1
  context: int = 512

  def check(self, config: ModelConfig) -> None:
    """Raises a UserError for sizes that the model cannot have."""
    if self.phase not in ("decode", "prefill"):
      raise UserError(f"--phase={self.phase} is not one of decode, prefill")
    if self.batch < 1 or not 2 <= self.context <= config.context:
      raise UserError(
        f"latency of batch={self.batch} at context={self.context}: the batch "
        f"must be at least 1, the context 2 to the model's {config.context:,}"
      )


def write(
  model: str,
  out: Path,
  case: Case,
  engine: str = "jax",
  dtype: str = "float32",
  repeats: int = 7,
  ignore_fields: str = "",
) -> None:
  """Writes a table; one of the same device and engine gains a measurement.

  Args:
    model: a directory or hub id, of which only config.json is read.
    out: the file.
    case, engine, dtype, repeats: as `profile`'s.
    ignore_fields: of config.json, comma separated.

  Raises:
    UserError: bad input, or a table of something else is there.
  """
  check_engine(engine)
  check_dtype(dtype)
  if repeats < 1:
    raise UserError(f"--repeats={repeats} must be at least 1")
  config = load.read_config(model, ignore_fields)
  case.check(config)
  publish.require_free(out, overwrite=True)
  old = latency_table.read(str(out)) if out.exists() else None
  table = profile(config, case, engine, dtype, repeats, print)
  if old is not None:
    table = _joined(old, table, out)
  json_files.write_json(out, table)
  print(f"{out}: {case.phase} on {table['device']}")


def _joined(old: dict, new: dict, out: Path) -> dict:
  """The measurements of two tables; the new one's where both have it."""
  for name in ("device", "engine", "dtype", "model", "multiples"):
    if old[name] != new[name]:
      raise UserError(
        f"--out={out} has a table whose {name} is {old[name]}, not {new[name]}:"
        " give another file"
      )
  case = lambda m: (m["phase"], m["batch"], m["context"])
  found = {case(m): m for m in (*old["measured"], *new["measured"])}
  return new | {"measured": list(found.values())}


def profile(
  config: ModelConfig,
  case: Case,
  engine: str = "jax",
  dtype: str = "float32",
  repeats: int = 7,
  say: Callable[[str], None] = lambda text: None,
) -> dict:
  """Times attention and MLP of a layer at a few widths, and the model with a
  quarter of its vocabulary; a table's content.

  Args:
    config: of the model; its widest layer is the widest that is timed.
    dtype: of the weights.
    repeats: pairs of calls of each width.
    say: gets a line of text for each width.

  Raises:
    UserError: an engine or a case that there is not.
  """
  check_engine(engine)
  case.check(config)
  wide = _equal_layers(config)
  layers, most = wide.num_layers, {u: wide.units()[u][0] for u in UNITS}
  lanes = LANES.get(jax.devices()[0].platform, CPU_LANES)
  lanes = lanes if most["F"] >= 4 * lanes else 1
  models = {}
  for u, what in (("K", "KV groups"), ("F", "MLP channels")):
    for width in _widths(most[u], u, lanes):
      units = wide.units() | {u: (width,) * layers}
      models[f"{width:,} {what}"] = (u, width), wide.with_units(units)
  few = config.vocab_size // 4
  fewer = dataclasses.replace(wide, vocab_size=few)
  models[f"{few:,} tokens"] = ("V", few), fewer
  made = lambda model: timer(engine, _random(model, dtype), case)
  base, bases, share = made(wide), [], {}
  for what, (key, other) in models.items():
    first, second = in_turns(base, made(other), repeats)
    bases += first
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    share[key] = statistics.median(ratios)
    say(f"{what}: {share[key]:.1%} of the time")
  whole = statistics.median(bases)
  return {
    "format": latency_table.FORMAT,
    "device": device_name(engine),
    "engine": engine,
    "dtype": dtype,
    "model": {name: getattr(config, name) for name in latency_table.MODEL},
    "multiples": {"kv_groups": 1, "ffn": lanes},
    "measured": [dataclasses.asdict(case) | _curves(whole, share, wide)],
  }


def _curves(
  whole: float, share: dict[tuple[str, int], float], wide: ModelConfig
) -> dict:
  """Milliseconds of a layer's halves by their widths, and of all else.

  Args:
    whole: milliseconds of the model.
    share: of them that a model takes whose halves have fewer units (K, F), or
      whose vocabulary has fewer tokens (V).
    wide: its sizes.
  """
  found, rest, layers = {}, whole, wide.num_layers
  for u, name in latency_table.CURVES.items():
    none, most = share[u, 0], wide.units()[u][0]
    of = {
      w: whole * (s - none) / layers for (v, w), s in share.items() if u == v
    }
    of[most] = whole * (1 - none) / layers
    found[name] = [[w, max(of[w], 0.0)] for w in sorted(of)]
    rest -= layers * max(of[most], 0.0)
  found["rest_ms"] = max(rest, 0.0)
  [(few, fewer)] = [(w, s) for (v, w), s in share.items() if v == "V"]
  tokens = wide.vocab_size
  output = whole * (1 - fewer) * tokens / (tokens - few)
  output = min(max(output, 0.0), found["rest_ms"])
  return found | {latency_table.OUTPUT: [[0, 0.0], [tokens, output]]}


def _equal_layers(config: ModelConfig) -> ModelConfig:
  """The model with fewer layers, each as wide as the widest."""
  layers = min(config.num_layers, LAYERS)
  units = {u: (max(w),) * layers for u, w in config.units().items()}
  if any(config.kinds()):
    raise UserError(
      f"{config.family} has two kinds of attention, and a table has one curve "
      "for attention: budgets in milliseconds are not supported for it"
    )
  if not all(w[0] for w in units.values()):
    raise UserError("the model has no attention, or no MLP, to time")
  return config.with_layers(range(layers)).with_units(units)


def _widths(most: int, unit: str, lanes: int) -> list[int]:
  """Widths to time below the widest, from 0 on."""
  least, step = (1, 1) if unit == "K" else (0, lanes)
  quarters = (most * part // 4 // step * step for part in (1, 2, 3))
  return sorted({0, least, *quarters} - {most})


def _random(config: ModelConfig, dtype: str) -> tuple[ModelConfig, Params]:
  """Random weights; the same numbers in each layer are enough."""
  random = np.random.default_rng(0)
  numbers: dict[tuple, jax.Array] = {}

  def one(name: str, layer: int | None, leaf: Any) -> jax.Array:
    del layer
    if "norm" in name:
      return jnp.ones(leaf.shape, leaf.dtype)
    if leaf.shape not in numbers:
      values = random.standard_normal(leaf.shape, np.float32) * 0.02
      numbers[leaf.shape] = jnp.asarray(values, leaf.dtype)
    return jnp.copy(numbers[leaf.shape])  # memory of its own

  shapes = model_config.abstract_params(config, jnp.dtype(dtype))
  return config, axes.map_named(one, shapes)


# ---- Timers ------------------------------------------------------------------


def check_engine(engine: str) -> None:
  """Raises a UserError for an engine that cannot be timed here."""
  if engine not in ENGINES:
    raise UserError(
      f"--engine={engine} is not one of {', '.join(ENGINES)}"
      f"{nearest(engine, ENGINES)}; a table of another is written by hand, "
      "docs/budgets.md has the format"
    )


def timer(
  engine: str, model: tuple[ModelConfig, Params] | Path, case: Case
) -> Timer:
  """Times a model by an engine, one call at a time; all is compiled before.

  Args:
    model: the pair; for transformers also a directory.
  """
  if engine == "jax":
    made = latency.timer(*model, case.phase, case.batch, case.context)
  else:
    made = _transformers(model, case)
  made()
  return made


def in_turns(
  first: Timer, second: Timer, pairs: int
) -> tuple[list[float], list[float]]:
  """Milliseconds of two models, measured one after the other."""
  times = [(first(), second()) for _ in range(pairs)]
  return [a for a, _ in times], [b for _, b in times]


def _transformers(
  model: tuple[ModelConfig, Params] | Path, case: Case
) -> Timer:
  """As `latency.timer`, by Transformers, of the model as it is exported."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(
      "--engine=transformers needs torch and transformers: pip install "
      "torch transformers"
    ) from error
  with tempfile.TemporaryDirectory() as folder:
    if not isinstance(model, Path):
      written = Path(folder) / "model"
      save.save(*model, written, say=lambda text: None)
      model = written
    opened = transformers.AutoModelForCausalLM.from_pretrained(
      model, trust_remote_code=_is_ours(model), dtype="auto"
    )
  opened = opened.eval().to("cuda" if torch.cuda.is_available() else "cpu")
  new = latency.new_tokens(case.context) if case.phase == "decode" else 0
  shape = case.batch, case.context - new
  ids = torch.zeros(shape, dtype=torch.long, device=opened.device)
  one = ids[:, :1]

  def wait() -> None:
    if torch.cuda.is_available():
      torch.cuda.synchronize()

  @torch.inference_mode()
  def run() -> float:
    if not new:
      return latency.milliseconds(
        lambda: opened(ids, use_cache=True, logits_to_keep=1), wait
      )
    cache = opened(ids, use_cache=True, logits_to_keep=1).past_key_values
    wait()

    def decode() -> None:
      for _ in range(new):
        opened(one, past_key_values=cache, use_cache=True)

    return latency.milliseconds(decode, wait) / new

  return run


def _is_ours(folder: Path) -> bool:
  """Whether a directory has the loader file that we write, and no other."""
  names = {file.name for file in folder.glob("*.py")}
  return all(name.startswith("modeling_pruned_") for name in names)


def device_name(engine: str) -> str:
  """The hardware's name, for a table."""
  kind = jax.local_devices()[0].device_kind
  if engine == "transformers":
    import torch

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  if kind != "cpu":
    return kind
  return f"{_processor()}, {virtual_devices.cores()} cores"


def _processor() -> str:
  """The processor's name, as Linux knows it."""
  file = Path("/proc/cpuinfo")
  lines = file.read_text().splitlines() if file.exists() else []
  names = [x.partition(":")[2].strip() for x in lines if "model name" in x]
  return names[0] if names else "cpu"
