"""What will not work as planned, and what to change."""

import math

from adapt_pruner_jax.config import Config, Prune
from adapt_pruner_jax.models.devices import USABLE
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import arrays
from adapt_pruner_jax.planning.hardware import Hardware
from adapt_pruner_jax.pruning.targets import prunable_modules
from adapt_pruner_jax.runs.summary import in_bytes

BY_DEFAULT = 0.75  # of a GPU's memory
FRACTION = f"XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}"


def warnings(config: Config, found: dict, hardware: Hardware) -> list[str]:
  """What will not work, and what to change."""
  lines = []
  usable = hardware.memory * USABLE
  for phase, parts in found["memory"].items():
    need = sum(parts.values())
    if usable and need > usable:
      lines.append(
        f"{phase} needs {in_bytes(need)} a device and {in_bytes(usable)} can "
        "be used: " + advice(config, phase, parts, hardware)
      )
  settings = config.prune
  most = max((sum(p.values()) for p in found["memory"].values()), default=0)
  small = hardware.memory * BY_DEFAULT
  if hardware.device.startswith("NVIDIA") and small < most <= usable:
    lines.append(
      f"JAX takes {BY_DEFAULT:.0%} of a GPU's memory unless it is told to take "
      f"more: start with launch/gpu.sh or launch/slurm.sh, or with {FRACTION}"
    )
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


def fixed_attention(settings: Prune, full: ModelConfig) -> list[str]:
  """A line if no layer's attention can lose a KV group; else nothing."""
  prunable_L = prunable_modules(full, settings)["K"]
  groups = [k for k, p in zip(full.kv_groups, prunable_L, strict=True) if p]
  if not groups or max(groups) > settings.round_kv_to:
    return []
  return [
    f"attention cannot shrink: a layer that may be pruned has {max(groups)} KV "
    f"group(s), and {settings.round_kv_to} stay (--config.prune.round_kv_to); "
    "the MLPs bear all of it"
  ]


def advice(
  config: Config, phase: str, parts: dict[str, int], hardware: Hardware
) -> str:
  """What to change so that a phase fits.

  Args:
    config: the recipe.
    phase: "scoring", "refit" or "training".
    parts: its bytes on a device, from `memory.measure`.
    hardware: what it is planned for.
  """
  usable = hardware.memory * USABLE
  held = sum(parts.values()) - parts["temporary"]
  few = config.mesh.data in (0, 1) and config.mesh.tensor == 1
  tips = []
  if phase == "scoring" and not config.prune.stream_layers:
    tips.append(
      "--config.prune.stream_layers=True, which keeps the model in the host's "
      "memory"
    )
  if held > usable:
    number = math.ceil(held * hardware.devices / (usable * 0.8))
    tips.append(
      f"about {number} such devices with --config.mesh.fsdp=-1"
      if few
      else "--config.mesh.data=1 --config.mesh.fsdp=-1, which cuts the weights"
    )
    if phase == "training" and not config.train.lora_rank:
      tips.append("--config.train.lora_rank=16, which trains adapters only")
    elif phase == "training" and not config.train.lora_base:
      tips.append("--config.train.lora_base=int8")
  elif phase == "training":
    if config.train.remat not in ("auto", "full", "offload"):
      tips.append("--config.train.remat=full")
    less = smaller(parts["temporary"], usable - held)
    accumulation = less * config.train.accumulation
    if config.data.batch % (accumulation * hardware.devices) == 0:
      tips.append(f"--config.train.accumulation={accumulation}")
    tips.append(f"--config.data.seq_len={max(config.data.seq_len // less, 2)}")
  else:
    fewer = config.calibration.refit_samples // 2
    if phase == "refit":
      tips.append(f"--config.calibration.refit_samples={fewer}")
    if config.calibration.batch > 1:
      tips.append(f"--config.calibration.batch={config.calibration.batch // 2}")
    tips.append(f"about {2 * hardware.devices} devices")
  halves = arrays.weight_dtype(config).itemsize == 4 and not config.train.tokens
  if phase == "scoring" and halves:  # training keeps float32 weights
    tips.insert(0, "--config.model.dtype=bfloat16")
  return ", or ".join(tips)


def smaller(temporary: float, room: float) -> int:
  """How many times fewer tokens at a time have to be to fit a room, a power of
  two; a step's temporary memory grows with them."""
  return 2 ** max(1, math.ceil(math.log2(temporary / max(room, 1))))
