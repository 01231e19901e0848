"""What a run would do and cost, from the recipe and config.json alone.

Sizes, tokens and FLOPs are arithmetic; how much of each layer goes is not known
before the layers are scored, so shapes are those of even pruning. Device memory
is `memory`'s. Nothing is written, no weights are read.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import Config, Prune, check
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.models import flops as flops_
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import memory
from adapt_pruner_jax.planning.hardware import (
  USABLE,
  Hardware,
  compile_for,
  define_flags,
  flag_values,
  resolve,
  source,
)
from adapt_pruner_jax.pruning import schedule
from adapt_pruner_jax.pruning.targets import (
  prunable_modules,
  resolve_target,
  smallest,
)
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.reporting.progress import duration

__all__ = ["Hardware", "define_flags", "flag_values", "plan"]


def plan(
  config: Config,
  hardware: Hardware | None = None,
  log: Log | None = None,
) -> dict[str, Any]:
  """Prints what a run would do and cost; returns the same, JSON-able.

  Raises:
    UserError: bad input, or a target that cannot be reached.
  """
  check(config)
  hardware = resolve(hardware or Hardware())
  full = original(config)
  target = resolve_target(full, config.prune)
  stages = stage_table(config, full, target)
  compiled_for = compile_for(hardware)
  configs = [full, *(stage.pop("config") for stage in stages)]
  found = {
    "model": config.model.path,
    "params": model_config.count_params(full),
    "target_params": target,
    "smallest_params": smallest(full, config.prune),
    "hardware": dataclasses.asdict(hardware),
    "stages": stages,
    "memory": memory.measure(config, full, configs[1], compiled_for),
    "memory_from": source(compiled_for),
    "disk": disk(config, configs),
  }
  flops = sum(s["prune_flops"] + s["train_flops"] for s in stages)
  found["flops"] = flops
  found["hours"] = hours(flops, hardware)
  found["warnings"] = warnings(config, found, hardware)
  show(found, config, hardware, log or Log(None))
  return found


def original(config: Config) -> ModelConfig:
  """The config of the model to prune; of a hub model only that is fetched."""
  from adapt_pruner_jax.formats.hf import load

  path, ignored = config.model.path, config.model.ignore_fields
  if path == "tiny":
    from adapt_pruner_jax.runs import tiny_model

    return tiny_model.config_of(tiny_model.Recipe())
  if "/" in path and not Path(path).expanduser().exists():
    import huggingface_hub

    try:
      file = huggingface_hub.hf_hub_download(path, "config.json")
    except Exception as error:
      raise UserError(
        f"{path} is not a directory, and the HuggingFace hub does not give its "
        f"config.json: {first_line(error)} Check the name and the "
        "network, or give a directory with config.json in it"
      ) from error
    path = Path(file).parent
  return load.read_config(path, ignored)


# ---- Sizes, tokens, FLOPs ----------------------------------------------------


def stage_table(
  config: Config, full: ModelConfig, target: int | None
) -> list[dict]:
  """A row a stage; its "config" is the model after it, pruned evenly."""
  settings = config.prune
  size, number = model_config.count_params(full), settings.stages
  targets = [even_target(full, settings)]
  if target is not None:
    targets = schedule.stage_targets(size, target, number)
  per_step = config.data.step_tokens
  total = -(-config.train.tokens // per_step)
  ends = schedule.stage_ends(total, number, config.train.data_share)
  rows, now, trained = [], full, 0
  for i, (aim, last) in enumerate(zip(targets, ends, strict=True)):
    after = evenly(full, settings, aim)
    needed = prune_steps(now, after, full, settings)
    steps = min(needed, settings.max_steps or needed)
    rows.append(
      {
        "stage": i + 1,
        "config": after,
        "params": model_config.count_params(after),
        "kv_groups": _spread(after.kv_groups),
        "ffn": _spread(after.ffn_widths),
        "steps_needed": needed,
        "prune_steps": steps,
        "train_steps": last - trained,
        "train_tokens": (last - trained) * per_step,
        "prune_flops": steps * scoring_flops(full, config),
        "train_flops": (last - trained)
        * per_step
        * training_flops(after, full, config),
      }
    )
    now, trained = after, last
  return rows


def even_target(full: ModelConfig, settings: Prune) -> int:
  """Parameters that `max_steps` steps leave, without a target."""
  sparsity_ = min(settings.max_steps * _step_size(settings), 1)
  size = model_config.count_params(full)
  gone = int(_prunable_params(full, settings) * sparsity_)
  return max(size - gone, smallest(full, settings))


def evenly(full: ModelConfig, settings: Prune, target: int) -> ModelConfig:
  """The largest model not above `target` that loses the same share everywhere.

  KV groups are few: where their rounding takes too much or too little, the MLPs
  make up for it.
  """
  prunable = prunable_modules(full, settings)

  def cut(unit: str, share: float, rounding: Callable = math.floor) -> tuple:
    block = settings.round_ffn_to if unit == "F" else 1
    return tuple(
      min(n, max(rounding(n * (1 - share) / block), 1) * block) if may else n
      for n, may in zip(full.units()[unit], prunable[unit], strict=True)
    )

  def made(K: tuple, share: float) -> ModelConfig:
    return dataclasses.replace(full, kv_groups=K, ffn_widths=cut("F", share))

  def fits(config: ModelConfig) -> bool:
    return model_config.count_params(config) <= target

  share = _least(lambda s: fits(made(cut("K", s), s)))
  found = []
  for rounding in math.floor, math.ceil:
    K = cut("K", share, rounding)
    found.append(made(K, _least(lambda s, K=K: fits(made(K, s)))))
  return max(filter(fits, found), key=model_config.count_params)


def prune_steps(
  before: ModelConfig, after: ModelConfig, full: ModelConfig, settings: Prune
) -> int:
  """Steps of a stage.

  Each grows the mean sparsity by `step_size` or, for curvature, removes
  `curvature_step` of the original's parameters.
  """
  if settings.method not in ("adapt", "curvature"):
    return settings.llm_pruner_steps if settings.method == "llm_pruner" else 1
  gone = model_config.count_params(before) - model_config.count_params(after)
  if settings.method == "curvature":
    share = gone / model_config.count_params(full)
  else:
    share = gone / max(_prunable_params(before, settings), 1)
  return max(math.ceil(share / _step_size(settings) - 1e-9), 1)


def _step_size(settings: Prune) -> float:
  curvature = settings.method == "curvature"
  return settings.curvature_step if curvature else settings.step_size


def scoring_flops(config: ModelConfig, recipe: Config) -> float:
  """Of one pruning step, always at the original's size.

  With gradients a layer runs forward twice and backward once, the output
  matrix forward once and backward for its input. Curvature goes backward to
  activations only, and has Gram matrices.
  """
  layer, head = flops_.forward_flops(config, recipe.calibration.seq_len)
  each = 4 * layer + 2 * head
  if recipe.prune.method == "curvature":
    heads = [
      K * config.queries_per_group * config.head_dim for K in config.kv_groups
    ]
    grams = [n**2 + config.hidden_size**2 for n in (*heads, *config.ffn_widths)]
    each = 3 * layer + 2 * head + 2 * sum(grams)
  elif not recipe.prune.group_importance.startswith("taylor"):
    each = layer + head
  return recipe.calibration.samples * recipe.calibration.seq_len * each


def training_flops(
  config: ModelConfig, teacher: ModelConfig, recipe: Config
) -> float:
  """Of one token: forward and backward, three times forward.

  What rematerialisation repeats does not count, as in the definition of MFU.
  """
  flops = flops_.training_flops(config, recipe.data.seq_len)
  if recipe.train.distill_alpha:
    flops += sum(flops_.forward_flops(teacher, recipe.data.seq_len))
  return flops


def hours(flops: float, hardware: Hardware) -> float | None:
  if not hardware.peak:
    return None
  return flops / (hardware.peak * hardware.mfu * hardware.devices) / 3600


def disk(config: Config, configs: Sequence[ModelConfig]) -> dict[str, int]:
  """Bytes of the export, of a checkpoint, and of all that are kept."""
  itemsize = memory.weight_dtype(config).itemsize
  largest = model_config.count_params(configs[1])
  checkpoint = largest * itemsize
  if config.train.tokens and not config.train.lora_rank:
    checkpoint += 2 * largest * 4
  # While one is written, the old ones are still there.
  return {
    "export": model_config.count_params(configs[-1]) * itemsize,
    "checkpoint": checkpoint,
    "checkpoints": checkpoint * (config.checkpoint.keep + 1),
  }


# ---- What to say -------------------------------------------------------------


def warnings(config: Config, found: dict, hardware: Hardware) -> list[str]:
  """What will not work, and what to change."""
  lines = []
  usable = hardware.memory * USABLE
  for phase, parts in found["memory"].items():
    need = sum(parts.values())
    if usable and need > usable:
      lines.append(
        f"{phase} needs {gb(need)} a device and {gb(usable)} can be used: "
        + advice(config, phase, parts, hardware)
      )
  settings = config.prune
  steps = max(stage["steps_needed"] for stage in found["stages"])
  if settings.max_steps and steps > settings.max_steps:
    lines.append(
      f"prune.max_steps={settings.max_steps} ends a stage above its target, "
      f"which needs about {steps} steps: set --config.prune.max_steps=0"
    )
  if config.train.tokens and not found["stages"][0]["train_steps"]:
    lines.append(
      f"train.tokens={config.train.tokens:,} is too little for a train step in "
      "each stage: give more, or a smaller --config.data.batch"
    )
  if hardware.peak and config.train.tokens and config.train.dtype == "float32":
    lines.append(
      "the hours are at a share of the bfloat16 peak; float32 takes longer: "
      "--config.train.dtype=bfloat16"
    )
  return lines


def advice(
  config: Config, phase: str, parts: dict[str, int], hardware: Hardware
) -> str:
  """What to change so that a phase fits."""
  usable = hardware.memory * USABLE
  held = sum(parts.values()) - parts["temporary"]
  few = config.mesh.data == 1 and config.mesh.tensor == 1
  tips = []
  if held > usable:
    number = math.ceil(held * hardware.devices / (usable * 0.8))
    tips.append(
      f"about {number} such devices with --config.mesh.fsdp=-1"
      if few
      else "--config.mesh.data=1 --config.mesh.fsdp=-1, which cuts the weights"
    )
    if phase == "training" and not config.train.lora_rank:
      tips.append("--config.train.lora_rank=16, which trains adapters only")
  elif phase == "training":
    if not config.train.remat:
      tips.append("--config.train.remat=True")
    tips.append(f"--config.train.accumulation={2 * config.train.accumulation}")
    tips.append(f"--config.data.seq_len={config.data.seq_len // 2}")
  else:
    name = "refit_samples" if phase == "refit" else "samples"
    fewer = getattr(config.calibration, name) // 2
    tips.append(f"--config.calibration.{name}={fewer}")
    tips.append(f"about {2 * hardware.devices} devices")
  halves = memory.weight_dtype(config).itemsize == 4 and not config.train.tokens
  if phase == "scoring" and halves:  # training keeps float32 weights
    tips.insert(0, "--config.model.dtype=bfloat16")
  return ", or ".join(tips)


def show(found: dict, config: Config, hardware: Hardware, log: Log) -> None:
  """The plan as tables."""
  size, target = found["params"], found["target_params"]
  aim = f" to {target:,} ({1 - target / size:.1%} less)" if target else ""
  log.say(
    f"{found['model']}: {size:,} parameters{aim}; the least that can be "
    f"reached is {found['smallest_params']:,}"
  )
  log.table(
    "Stages (shapes if pruned evenly; scores will decide)",
    ("stage", "parameters", "KV groups", "MLP width", "prune steps", "tokens"),
    [
      (
        s["stage"],
        s["params"],
        s["kv_groups"],
        s["ffn"],
        s["prune_steps"],
        s["train_tokens"],
      )
      for s in found["stages"]
    ],
  )
  name = hardware.device or "device"
  time = "unknown: give --device or --tflops"
  if found["hours"] is not None:
    time = duration(found["hours"] * 3600)
    time += f" at {hardware.mfu:.0%} of the peak"
  scored = sum(s["prune_flops"] for s in found["stages"])
  trained = sum(s["train_flops"] for s in found["stages"])
  log.table(
    f"Cost on {hardware.devices} x {name}",
    ("what", "how much"),
    [
      ("scoring", f"{scored:.3g} FLOPs"),
      ("training", f"{trained:.3g} FLOPs"),
      ("time", time),
      ("export", gb(found["disk"]["export"])),
      (
        f"checkpoints ({config.checkpoint.keep} + the one being written)",
        gb(found["disk"]["checkpoints"]),
      ),
    ],
  )
  for phase, parts in found["memory"].items():
    total = sum(parts.values())
    log.table(
      f"{phase.capitalize()}: memory of a device"
      + (f", of {gb(hardware.memory)}" if hardware.memory else ""),
      ("what", "how much"),
      [(what, gb(n)) for what, n in parts.items()] + [("total", gb(total))],
    )
  log.say(f"Memory: {found['memory_from']}.")
  for line in found["warnings"]:
    log.say(f"WARNING: {line}")


def gb(size: float) -> str:
  """Bytes for people: 10^9 are a GB."""
  return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _prunable_params(config: ModelConfig, settings: Prune) -> int:
  cost, prunable = (
    model_config.unit_cost(config),
    prunable_modules(config, settings),
  )
  return sum(
    cost[u] * n
    for u in UNITS
    for n, may in zip(config.units()[u], prunable[u], strict=True)
    if may
  )


def _least(is_enough: Callable[[float], bool]) -> float:
  """The smallest share in [0, 1] that is enough, by bisection."""
  low, high = 0.0, 1.0
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (low, middle) if is_enough(middle) else (middle, high)
  return high


def _spread(widths: Sequence[int]) -> str:
  low, high = min(widths), max(widths)
  return f"{low:,}" if low == high else f"{low:,} - {high:,}"
