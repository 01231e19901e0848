"""What a run would do and cost, from the recipe and config.json alone.

Sizes, tokens and FLOPs are arithmetic; how much of each layer goes is not known
before the layers are scored, so shapes are those of even pruning. Device memory
is `memory`'s. Nothing is written, no weights are read.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from adapt_pruner_jax.config import (
  Config,
  Prune,
  check,
  latency_table,
  vocab_size,
)
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning import hours, memory, times
from adapt_pruner_jax.planning.advice import fixed_attention, warnings
from adapt_pruner_jax.planning.cost import stage_table
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
from adapt_pruner_jax.pruning.targets import (
  resolve_limits,
  resolve_target,
  smallest,
)
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.reporting.progress import duration
from adapt_pruner_jax.runs import export_size
from adapt_pruner_jax.runs.summary import in_bytes
from adapt_pruner_jax.storage import places

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
  _check_table(config.prune, full)
  beside = export_size.beside(config.prune, full, _tokenizer_in(folder))
  target = resolve_target(full, config.prune, whole, beside)
  limits = resolve_limits(full, config.prune, beside)
  if target is None and not config.prune.max_steps:
    target = budgets.count(full, config.prune)  # the vocabulary alone
  chosen = None
  if config.train.hours:
    hours.checked(config)
    config, chosen = hours.predict(config, whole, hardware)
  stages = stage_table(config, full, target, limits)
  compiled_for = compile_for(hardware)
  configs = [full, *(stage.pop("config") for stage in stages)]
  found = {
    "model": config.model.path,
    "params": model_config.count_params(whole),
    "vocab": _vocabulary(whole, full),
    "target_params": target if config.prune.budget == "params" else None,
    "smallest_params": smallest(full, config.prune),
    **_budget(config.prune, (whole, configs[-1]), target, beside),
    "budgets": _every_budget(config.prune, whole, configs[-1]),
    "hardware": dataclasses.asdict(hardware),
    "chosen": chosen,  # for train.hours
    "stages": stages,
    "memory": memory.measure(
      *(config, full, configs[1], compiled_for),
      *(hardware.memory, hardware.device),
    ),
    "memory_from": source(hardware, compiled_for),
    "disk": disk(config, [whole, *configs[1:]], folder),
  }
  flops = sum(s["prune_flops"] + s["train_flops"] for s in stages)
  found["flops"] = flops
  spent = times.hours(config, full, configs[1:], stages, hardware)
  found["hours_of"], found["hours"] = spent, spent and sum(spent.values())
  found["warnings"] = warnings(config, found, hardware)
  found["warnings"] += fixed_attention(config.prune, full)
  if config.prune.budget == "quality":
    found["warnings"].append(
      "how small a model keeps the quality is measured as it is pruned: the "
      "plan is of the smallest that there may be"
    )
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
  if path.endswith(".gguf"):
    folder = load.resolve(path)
    return load.read_config(folder, ignored), folder
  if places.in_bucket(path):
    from adapt_pruner_jax.storage import download

    file = download.copy(places.to_path(path) / "config.json")
    return load.read_config(file.parent, ignored), file.parent
  folder = Path(os.path.expanduser(path))
  if "/" in path and not folder.exists():
    import huggingface_hub

    asked = re.fullmatch(load.HUB_ID, path)
    name, revision = asked.group("name", "revision") if asked else (path, None)
    try:
      file = huggingface_hub.hf_hub_download(
        name, "config.json", revision=revision
      )
    except Exception as error:
      raise UserError(
        f"{path} is not a directory, and the HuggingFace hub does not give its "
        f"config.json: {first_line(error)} Check the name and the "
        "network, or give a directory with config.json in it"
      ) from error
    folder = Path(file).parent
  return load.read_config(folder, ignored), folder


def _check_table(settings: Prune, full: ModelConfig) -> None:
  """Raises a UserError for a latency without a table of this model."""
  if not settings.counts("latency"):
    return
  if not settings.budget_table:
    raise UserError(
      "a plan times nothing: measure a table on the device that it is for "
      "(adapt-pruner profile --model=DIR --out=table.json) and give "
      "--config.prune.budget_table=table.json"
    )
  device = latency_table.read(settings.budget_table)["device"]
  budgets.check_table(full, settings, settings.budget_device or device)


def _tokenizer_in(folder: Path | None) -> Path | None:
  """A folder with a tokenizer, whose words a file's header has."""
  here = folder and (folder / "tokenizer.json").exists()
  return folder if here else None


def _budget(
  settings: Prune,
  configs: tuple[ModelConfig, ModelConfig],
  target: int | None,
  beside: int,
) -> dict[str, Any]:
  """What the recipe's budget is now, and what it buys: an even model.

  Args:
    configs: the original and what is left.
    target: of the budget, without what is beside it.
    beside: the header of a file.
  """
  extra = beside if settings.budget == "bytes" else 0
  amount = lambda n: budgets.value(n + extra, settings)
  before, after = (amount(budgets.count(c, settings)) for c in configs)
  return {
    "budget": settings.budget,
    "budget_target": target and amount(target),
    "budget_before": before,
    "budget_after": after,
  }


def _every_budget(
  settings: Prune, whole: ModelConfig, last: ModelConfig
) -> list[dict[str, Any]]:
  """The original and the even model in every unit, of weights alone."""
  found = []
  for name in budgets.UNIT:
    if name == "quality":
      continue
    if name == "latency" and not settings.budget_table:
      continue
    one = dataclasses.replace(settings, budget=name, limits="")
    before, after = (
      budgets.value(budgets.count(c, one), one) for c in (whole, last)
    )
    unit = budgets.unit(one)
    found.append({"budget": name, "unit": unit, "before": before})
    found[-1]["after"] = after
  return found


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
  least = budgets.shown(found["smallest_params"], config.prune)
  log.say(
    f"{found['model']}: {size:,} {budgets.unit(config.prune)}{aim}; the least "
    f"that can be reached is {least}"
  )
  for limit in config.prune.other_limits():
    log.say("and at most {1:,} of {0}".format(*limit))
  if vocab := found["vocab"]:
    log.say(
      f"{vocab['tokens_after']:,} of {vocab['tokens_before']:,} tokens stay, "
      f"which leaves {vocab['params_after']:,} parameters before any pruning"
    )
  if found["chosen"]:
    log.say(found["chosen"])
  log.table(
    "Stages (shapes if pruned evenly; scores will decide)",
    ("stage", "parameters", "KV groups", "MLP width", "prune steps", "tokens"),
    [tuple(stage[name] for name in STAGE_COLUMNS) for stage in found["stages"]],
  )
  _show_budgets(found["budgets"], log)
  name = hardware.device or "device"
  time, spent = "unknown: give --device or --tflops", found["hours_of"] or {}
  if found["hours"] is not None:
    time = duration(found["hours"] * 3600)
    time += f" at {hardware.mfu:.0%} of the peak"
  scored = sum(s["prune_flops"] for s in found["stages"])
  trained = sum(s["train_flops"] for s in found["stages"])
  cached = []
  if size := found["disk"].get("teacher cache"):
    cached = [("teacher cache on disk, at most", in_bytes(size))]
  log.table(
    f"Cost on {hardware.devices} x {name}",
    ("what", "how much"),
    [
      ("scoring", f"{scored:.3g} FLOPs"),
      ("training", f"{trained:.3g} FLOPs"),
      ("time", time),
      *((f"  {n}", duration(h * 3600)) for n, h in spent.items()),
      ("original on disk", in_bytes(found["disk"]["original"])),
      ("export on disk", in_bytes(found["disk"]["export"])),
      *cached,
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


def _show_budgets(rows: list[dict], log: Log) -> None:
  log.table(
    "What it buys, if pruned evenly",
    ("budget", "unit", "before", "after", "change"),
    [
      (
        *(row["budget"], row["unit"]),
        *(
          f"{row[n]:,.6g}" if row["budget"] == "latency" else f"{row[n]:,}"
          for n in ("before", "after")
        ),
        f"{row['after'] / row['before'] - 1:+.1%}" if row["before"] else "",
      )
      for row in rows
    ],
  )
