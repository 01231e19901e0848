"""Hours of a run, by what they go to.

Arithmetic counts at the share of the device's peak that is planned with, in
bfloat16. What is no arithmetic of the model counts by what was once measured:
see the constants.
"""

import os
from collections.abc import Sequence

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.config.names import task_names
from adapt_pruner_jax.evaluation.presets import PRESETS
from adapt_pruner_jax.models import flops as flops_
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.planning.hardware import Hardware
from adapt_pruner_jax.storage.places import in_bucket, to_path

# CPU seconds of the compiler (docs/accelerators.md): a train step of runs of
# layers, the programs of a least-squares refit, a pass of scoring.
STEP, REFIT, SCORING = 180.0, 130.0, 60.0
# Tokens a second that a core makes of text; half of what a BPE of 6k words did.
TOKENISED = 250_000.0
# A product in float32 takes so many times as long as one in bfloat16: six of
# these on a TPU, and by the data sheets of an H100.
FLOAT32 = {"TPU": 6.0, "NVIDIA": 15.0}
# Tokens that lm-eval's questions of a task take, about, and of any other task.
QUESTIONS = {
  "arc_easy": 3.3e5,
  "arc_challenge": 1.9e5,
  "boolq": 4.6e5,
  "hellaswag": 3.6e6,
  "mmlu": 3.5e7,
  "openbookqa": 4e4,
  "piqa": 1.7e5,
  "social_iqa": 2e5,
  "wikitext": 3e5,
  "winogrande": 8e4,
}
OTHER_TASK = 5e5


def hours(
  config: Config,
  full: ModelConfig,
  models: Sequence[ModelConfig],
  stages: Sequence[dict],
  hardware: Hardware,
) -> dict[str, float] | None:
  """Hours by what they go to; None if the device's peak is not known.

  Args:
    config: the recipe.
    full: the original model.
    models: what is left after each stage.
    stages: of `cost.stage_table`.
    hardware: what it is planned for.
  """
  if not hardware.peak:
    return None
  one = hardware.peak * hardware.mfu  # FLOP/s of a device
  rate = one * hardware.devices
  single = next(
    (n for kind, n in FLOAT32.items() if hardware.device.startswith(kind)), 1.0
  )
  sums, solves = _linear_algebra(config, full, stages)
  # A TPU slice solves together, other devices each the same.
  together = hardware.devices if hardware.device.startswith("TPU") else 1
  seconds = {
    "scoring and refits": sum(s["prune_flops"] for s in stages) / rate,
    "Gram matrices": sums * single / rate,
    "factorisations": solves * single / (one * together),
    "training": sum(s["train_flops"] for s in stages) / rate,
    "evaluation": _evaluated(config, full, models) / rate,
    "tokenising": _tokens(config) / (TOKENISED * (os.cpu_count() or 1)),
    "compiling": _compiling(config),
  }
  return {what: n / 3600 for what, n in seconds.items() if n}


def _linear_algebra(
  config: Config, full: ModelConfig, stages: Sequence[dict]
) -> tuple[float, float]:
  """FLOPs of Gram matrices of a refit, and of solving with all of them."""
  settings, of = config.prune, config.calibration
  channels = [*full.head_channels(), *full.ffn_widths]
  cubes = sum(2.0 * n**3 for n in channels)
  steps = sum(stage["prune_steps"] for stage in stages)
  solves = (
    cubes * steps if settings.pair()[1] in ("curvature", "surgeon") else 0
  )
  if not settings.solves():
    return 0.0, solves
  refits = len(stages)
  if settings.refit.isdecimal():
    refits += steps // int(settings.refit)
  tokens = of.refit_samples * of.seq_len
  sums = 2.0 * tokens * sum(n * (n + full.hidden_size) for n in channels)
  return refits * sums, solves + refits * cubes


def _evaluated(
  config: Config, full: ModelConfig, models: Sequence[ModelConfig]
) -> float:
  """FLOPs of perplexities, of the original and each stage, and of tasks, of
  the original and the result."""
  length = config.eval.seq_len or min(full.context, 2048)
  forward = lambda model: sum(flops_.forward_flops(model, length))
  total = _text_tokens(config) * sum(map(forward, (full, *models)))
  names = []
  for name in task_names(config.eval):
    names += PRESETS[name].metrics if name == "commonsense" else [name]
  asked = sum(QUESTIONS.get(name, OTHER_TASK) for name in names)
  return total + asked * (forward(full) + forward(models[-1]))


def _text_tokens(config: Config) -> float:
  """Of `eval.text`, four bytes each."""
  text = config.eval.text
  if not text or text == "embedded" or in_bucket(text):
    return 1e5 if text else 0.0
  file = to_path(text)
  return file.stat().st_size / 4 if file.is_file() else 1e5


def _tokens(config: Config) -> float:
  """That are made of text, at most."""
  of = config.calibration
  windows = of.samples + (
    of.refit_samples if config.prune.refit != "none" else 0
  )
  return config.train.tokens + windows * of.seq_len


def _compiling(config: Config) -> float:
  """Seconds of compiling, nothing of it kept from an earlier run."""
  settings = config.prune
  steps = config.train.tokens and settings.stages
  steps += bool(settings.refit_passes) * settings.stages
  return SCORING + REFIT * bool(settings.solves()) + STEP * steps
