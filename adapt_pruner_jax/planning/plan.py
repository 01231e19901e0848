"""What a run would do and cost, from the recipe and config.json alone.

Sizes, tokens and FLOPs are arithmetic; how much of each layer goes is not known
before the layers are scored, so shapes are those of even pruning. Device memory
is `memory`'s. Nothing is written, no weights are read.
"""

import dataclasses
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import Config, Prune, check, vocab_size
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import memory
from adapt_pruner_jax.planning.advice import fixed_attention, warnings
from adapt_pruner_jax.planning.cost import hours, stage_table
from adapt_pruner_jax.planning.disk import disk
from adapt_pruner_jax.planning.hardware import (
  Hardware,
  compile_for,
  define_flags,
  flag_values,
  resolve,
  source,
)
from adapt_pruner_jax.pruning import budgets
from adapt_pruner_jax.pruning.targets import resolve_target, smallest
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.reporting.progress import duration
from adapt_pruner_jax.runs.summary import in_bytes

STAGE_COLUMNS = [
  "stage",
  "params",
  "kv_groups",
  "ffn",
  "prune_steps",
  "train_tokens",
]

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
  whole, folder = original(config)
  tokens = vocab_size(config.vocab, whole.vocab_size)
  full = dataclasses.replace(whole, vocab_size=tokens)
  target = resolve_target(full, config.prune, whole)
  if target is None and not config.prune.max_steps:
    target = budgets.count(full, config.prune)  # the vocabulary alone
  stages = stage_table(config, full, target)
  compiled_for = compile_for(hardware)
  configs = [full, *(stage.pop("config") for stage in stages)]
  found = {
    "model": config.model.path,
    "params": model_config.count_params(whole),
    "vocab": _vocabulary(whole, full),
    "target_params": target if config.prune.budget == "params" else None,
    "smallest_params": smallest(full, config.prune),
    **_budget(config.prune, whole, configs[-1], target),
    "hardware": dataclasses.asdict(hardware),
    "stages": stages,
    "memory": memory.measure(config, full, configs[1], compiled_for),
    "memory_from": source(compiled_for),
    "disk": disk(config, [whole, *configs[1:]], folder),
  }
  flops = sum(s["prune_flops"] + s["train_flops"] for s in stages)
  found["flops"] = flops
  found["hours"] = hours(flops, hardware)
  found["warnings"] = warnings(config, found, hardware)
  found["warnings"] += fixed_attention(config.prune, full)
  show(found, config, hardware, log or Log(None))
  return found


def original(config: Config) -> tuple[ModelConfig, Path | None]:
  """The sizes of the model to prune, and its folder; None for "tiny".

  Of a hub model config.json alone is fetched.

  Raises:
    UserError: no such model, or it is of no supported family.
  """
  from adapt_pruner_jax.formats.hf import load

  path, ignored = config.model.path, config.model.ignore_fields
  if path == "tiny":
    from adapt_pruner_jax.runs import tiny_model

    return tiny_model.config_of(tiny_model.Recipe()), None
  folder = Path(path).expanduser()
  if "/" in path and not folder.exists():
    import huggingface_hub

    try:
      file = huggingface_hub.hf_hub_download(path, "config.json")
    except Exception as error:
      raise UserError(
        f"{path} is not a directory, and the HuggingFace hub does not give its "
        f"config.json: {first_line(error)} Check the name and the "
        "network, or give a directory with config.json in it"
      ) from error
    folder = Path(file).parent
  return load.read_config(folder, ignored), folder


def _budget(
  settings: Prune, whole: ModelConfig, last: ModelConfig, target: int | None
) -> dict[str, Any]:
  """What the recipe's budget is now, and what it buys: an even model."""
  return {
    "budget": settings.budget,
    "budget_target": target,
    "budget_before": budgets.count(whole, settings),
    "budget_after": budgets.count(last, settings),
  }


def _vocabulary(whole: ModelConfig, full: ModelConfig) -> dict | None:
  """What cutting the vocabulary saves; None if nothing is cut."""
  if whole == full:
    return None
  return {
    "tokens_before": whole.vocab_size,
    "tokens_after": full.vocab_size,
    "params_after": model_config.count_params(full),
  }


def show(found: dict, config: Config, hardware: Hardware, log: Log) -> None:
  """The plan as tables."""
  size, target = found["budget_before"], found["budget_target"]
  aim = f" to {target:,} ({1 - target / size:.1%} less)" if target else ""
  log.say(
    f"{found['model']}: {size:,} {budgets.UNIT[found['budget']]}{aim}; the "
    f"least that can be reached is {found['smallest_params']:,}"
  )
  if vocab := found["vocab"]:
    log.say(
      f"{vocab['tokens_after']:,} of {vocab['tokens_before']:,} tokens stay, "
      f"which leaves {vocab['params_after']:,} parameters before any pruning"
    )
  log.table(
    "Stages (shapes if pruned evenly; scores will decide)",
    ("stage", "parameters", "KV groups", "MLP width", "prune steps", "tokens"),
    [tuple(stage[name] for name in STAGE_COLUMNS) for stage in found["stages"]],
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
      ("original on disk", in_bytes(found["disk"]["original"])),
      ("export on disk", in_bytes(found["disk"]["export"])),
      (
        f"checkpoints ({config.checkpoint.keep} + the one being written)",
        in_bytes(found["disk"]["checkpoints"]),
      ),
    ],
  )
  for phase, parts in found["memory"].items():
    total = sum(parts.values())
    log.table(
      f"{phase.capitalize()}: memory of a device"
      + (f", of {in_bytes(hardware.memory)}" if hardware.memory else ""),
      ("what", "how much"),
      [(what, in_bytes(n)) for what, n in parts.items()]
      + [("total", in_bytes(total))],
    )
  log.say(f"Memory: {found['memory_from']}.")
  for line in found["warnings"]:
    log.say(f"WARNING: {line}")
