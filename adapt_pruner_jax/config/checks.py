"""Which values a recipe may have."""

import math
import re

from adapt_pruner_jax.config.choices import BLOCKS, CHOICES, RANKED, WHOLE
from adapt_pruner_jax.config.field_types import check_types
from adapt_pruner_jax.config.fields import (
  Config,
  Prune,
  Vocab,
)
from adapt_pruner_jax.config.names import get, task_names
from adapt_pruner_jax.errors import UserError, nearest

# The least that a field may be.
AT_LEAST = {
  "vocab.keep_tokens": 0,
  "prune.target_params": 0,
  "prune.budget_value": 0,
  "prune.budget_context": 1,
  "prune.budget_batch": 1,
  "prune.max_steps": 0,
  "prune.amplitude": 0,
  "prune.stages": 1,
  "prune.round_ffn_to": 1,
  "prune.round_kv_to": 1,
  "prune.uniform.steps": 1,
  "prune.search.steps": 1,
  "prune.search.evaluations": 1,
  "prune.search.tokens": 2,
  "prune.slicegpt.multiple": 1,
  "prune.minitron.depth": 0,
  "prune.surgeon.shots": 1,
  "prune.surgeon.damp_a": 1e-6,
  "prune.surgeon.damp_g": 1e-6,
  "prune.refit_ridge": 0,
  "prune.refit_passes": 0,
  "prune.refit_rate": 0,
  "prune.refit_batch": 0,
  "prune.refit_temperature": 0.1,
  "calibration.refit_samples": 2,
  "calibration.tokens_per_channel": 0,
  "calibration.samples": 1,
  "calibration.seq_len": 2,
  "calibration.batch": 1,
  "calibration.pass_tokens": 0,
  "data.seq_len": 2,
  "data.batch": 1,
  "train.tokens": 0,
  "train.hours": 0,
  "train.learning_rate": 0,
  "train.min_learning_rate": 0,
  "train.weight_decay": 0,
  "train.accumulation": 1,
  "train.distill_alpha": 0,
  "train.distill_temperature": 0.1,
  "train.lora_rank": 0,
  "train.teacher_cache": 0,
  "train.lora_alpha": 0,
  "eval.seq_len": 0,
  "eval.batch": 1,
  "checkpoint.steps": 1,
  "checkpoint.minutes": 0,
  "checkpoint.keep": 1,
}
# Allotments whose steps have a size of their own, and may just be counted.
STEPPING = ("adapt", *RANKED)
# Those that can count in another unit than parameters.
BUDGETED = ("adapt", "uniform", *RANKED, "search")


def check(config: Config) -> None:
  """Raises a UserError for a value that no run can have."""
  check_types(config)
  for name, allowed in CHOICES.items():
    value = get(config, name)
    if value not in allowed:
      raise UserError(
        f"--config.{name}={value} is not one of {', '.join(allowed)}"
        + nearest(str(value), allowed)
      )
  _check_vocab(config)
  _check_target(config.prune, config.vocab.asked())
  for name, low in AT_LEAST.items():
    value = get(config, name)
    if not low <= value < math.inf:  # written so that NaN fails
      raise UserError(f"--config.{name}={value} must be at least {low}, finite")
  _check_profile(config)
  if config.train.distill_alpha > 1:
    raise UserError(
      f"train.distill_alpha={config.train.distill_alpha} must be in [0, 1]"
    )
  if config.train.teacher_cache and not config.train.distill_alpha:
    raise UserError(
      f"--config.train.teacher_cache={config.train.teacher_cache} keeps what a "
      "teacher says: give --config.train.distill_alpha=0.5 with it"
    )
  rate, least = config.train.learning_rate, config.train.min_learning_rate
  if config.train.tokens and least > rate:
    raise UserError(
      f"--config.train.min_learning_rate={least} is above "
      f"--config.train.learning_rate={rate}: the rate would rise at the end"
    )
  if config.train.lora_base and not config.train.lora_rank:
    raise UserError(
      f"--config.train.lora_base={config.train.lora_base} is what adapters are "
      "trained beside: give --config.train.lora_rank=16 with it"
    )
  for name in {"perplexity", "latency"} & {*task_names(config.eval)}:
    raise UserError(
      f"--config.eval.tasks={config.eval.tasks}: {name} is no task here; give "
      "--config.eval.text=FILE for perplexity, --config.eval.latency=True for "
      "latency"
    )
  for name in (
    "prune.step_size",
    "prune.ranking.step_size",
    "prune.ranking.cap",
  ):
    if not 0 < get(config, name) <= 1:
      raise UserError(f"{name}={get(config, name)} must be in (0, 1]")
  _check_parts(config.prune)
  _check_streamed(config.prune)
  _check_tuning(config)
  _check_search(config)


def _check_profile(config: Config) -> None:
  """Whether the train steps to trace are some, and will be taken."""
  steps = config.log.profile_steps
  if not steps:
    return
  first, _, end = steps.partition(":")
  if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
    raise UserError(
      f"--config.log.profile_steps={steps} must be FIRST:END, such as 10:13"
    )
  taken = -(-config.train.tokens // config.data.step_tokens)
  if int(first) >= taken and not config.train.hours:
    raise UserError(
      f"--config.log.profile_steps={steps} are no steps of this run, which "
      f"takes {taken} train steps, from 0 on: give --config.train.tokens=N, or "
      "earlier steps"
    )


def _check_tuning(config: Config) -> None:
  """Whether a quality to keep has what it is measured on."""
  given, value = config.calibration.tuning, config.prune.budget_value
  if config.prune.budget != "quality":
    if given:
      raise UserError(
        f"--config.calibration.tuning={given} is what a quality is measured "
        "on: give --config.prune.budget=quality with it, or leave it out"
      )
    return
  source = given or config.calibration.source
  if source.startswith("npy:"):
    raise UserError(
      f"--config.prune.budget=quality is measured on text, not on {source}: "
      "give --config.calibration.tuning=text:FILE, or questions:FILE"
    )
  if given.startswith("questions:") and value >= 1:
    raise UserError(
      f"--config.prune.budget_value={value}: with questions it is the share of "
      "the original's accuracy that may be lost, such as 0.05"
    )


def _check_vocab(config: Config) -> None:
  v = config.vocab
  if v.keep_tokens and v.ratio:
    raise UserError(
      f"vocab.keep_tokens={v.keep_tokens} and vocab.ratio={v.ratio} are both "
      "given: give one of them"
    )
  if not 0 <= v.ratio < 1:
    raise UserError(f"vocab.ratio={v.ratio} must be in [0, 1)")
  if v.asked() and config.calibration.source.startswith("npy:"):
    raise UserError(
      f"--config.calibration.source={config.calibration.source}: its ids are "
      "those of the whole vocabulary, which --config.vocab cuts; give the "
      "text, such as text:FILE"
    )


def vocab_size(v: Vocab, size: int) -> int:
  """How many tokens stay of a vocabulary.

  Raises:
    UserError: all of them.
  """
  if not v.asked():
    return size
  keep = v.keep_tokens or math.floor(size * (1 - v.ratio))
  if keep >= size:
    raise UserError(
      f"vocab.keep_tokens={keep:,} is not below the model's {size:,} tokens: "
      "nothing would be cut"
    )
  return keep


def _check_target(p: Prune, vocab: bool) -> None:
  names = ("ratio", "target_params", "budget_value")
  given = [f"prune.{n}={getattr(p, n)}" for n in names if getattr(p, n)]
  if len(given) > 1:
    raise UserError(
      f"{' and '.join(given)} are "
      f"{'both' if len(given) == 2 else 'all'} given: give one of them"
    )
  _check_budget(p)
  if vocab and not (p.has_target() or p.max_steps):
    return  # the vocabulary alone
  if not (p.has_target() or p.max_steps):
    raise UserError(
      "no target: give --config.prune.ratio=0.2 (share of all parameters to "
      "remove), --config.prune.target_params=N, or --config.prune.max_steps=N"
    )
  if not 0 <= p.ratio < 1:
    raise UserError(f"prune.ratio={p.ratio} must be in [0, 1)")
  if not p.has_target() and p.pair()[0] not in STEPPING:
    raise UserError(
      f"prune.method={p.method} needs a target, prune.max_steps is not enough: "
      "give --config.prune.ratio=0.2 (share of all parameters to remove) or "
      "--config.prune.target_params=N"
    )
  if p.stages > 1 and not p.has_target():
    raise UserError(
      f"prune.stages={p.stages} needs prune.ratio or prune.target_params"
    )


def _check_budget(p: Prune) -> None:
  """Whether budgets, method and allotment go together."""
  if p.whole_halves and (p.pair()[0] != "ranking" or p.method in WHOLE):
    raise UserError(
      "--config.prune.whole_halves=True goes with the allotment ranking, in "
      "which halves compete with their units: give "
      "--config.prune.method=curvature, or --config.prune.allotment=ranking"
    )
  if p.limits:
    _check_limits(p)
  if p.budget == "quality" and (
    p.limits
    or not p.budget_value
    or p.stages > 1
    or p.pair()[0] not in STEPPING
    or p.method in WHOLE
  ):
    raise UserError(
      "--config.prune.budget=quality goes with prune.budget_value (nats above "
      "the original, or the share of its accuracy), one stage, no further "
      "limits, and the allotments "
      f"{', '.join(STEPPING)}: give --config.prune.method=adapt or curvature"
    )
  if p.budget == "params" and not p.limits:
    return
  if p.pair()[0] not in BUDGETED or p.method in WHOLE:
    name = "budget" if p.budget != "params" else "limits"
    raise UserError(
      f"--config.prune.{name}={getattr(p, name)} goes with the allotments "
      f"{', '.join(BUDGETED)}: give --config.prune.method=adapt or curvature"
    )
  if p.pair()[0] == "search" and p.counts("kv_bytes"):
    raise UserError(
      "--config.prune.allotment=search tries out MLPs, which have no part in "
      "kv_bytes: leave that budget out, or give "
      "--config.prune.allotment=ranking"
    )
  if p.budget != "params" and p.target_params:
    raise UserError(
      f"--config.prune.budget={p.budget} goes with prune.ratio or "
      "prune.budget_value, not with prune.target_params"
    )
  if p.whole_halves and p.counts("bytes") and p.budget_export in BLOCKS:
    raise UserError(
      "a gguf has no layers without attention or MLP: with "
      f"--config.prune.budget_export={p.budget_export} leave out "
      "--config.prune.whole_halves"
    )


def _check_limits(p: Prune) -> None:
  """Whether `prune.limits` says what it should."""
  left = [b for b in CHOICES["prune.budget"] if b not in ("quality", p.budget)]
  for part in p.limits.split(","):
    name, equals, text = (x.strip() for x in part.partition("="))
    try:
      good = bool(equals) and float(text) > 0 and math.isfinite(float(text))
    except ValueError:
      good = False
    if not good or name not in left:
      raise UserError(
        f"--config.prune.limits={p.limits}: {part!r} is none; give further "
        f"budgets than {p.budget}, each once with its value, such as "
        f"kv_bytes=2e6,latency=12; there are {', '.join(left)}"
        + nearest(name, left)
      )
    left.remove(name)
  if not p.has_target():
    raise UserError(
      f"--config.prune.limits={p.limits} goes beside a target: give "
      "--config.prune.ratio or .budget_value too, or the limit as "
      "--config.prune.budget"
    )


def _check_parts(p: Prune) -> None:
  """Whether method, allotment, score and refit go together."""
  if not re.fullmatch(r"none|final|loss|[1-9]\d*", p.refit):
    raise UserError(
      f"--config.prune.refit={p.refit} is not none, final, loss, or a number "
      "of pruning steps (such as 2) after which to refit"
    )
  if p.refit_passes and p.refit == "none":
    raise UserError(
      f"--config.prune.refit_passes={p.refit_passes} follows a refit: give "
      "--config.prune.refit=final with it, or loss for these passes alone"
    )
  if p.refit == "loss" and not p.refit_passes:
    raise UserError(
      "--config.prune.refit=loss makes --config.prune.refit_passes, which are "
      "0: give a number with it, such as 3"
    )
  for name in ("allotment", "group_importance"):
    if getattr(p, name) and p.method in WHOLE:
      raise UserError(
        f"--config.prune.{name}={getattr(p, name)} cannot be combined with "
        f"--config.prune.method={p.method}, whose scores and allotment are one "
        "thing: leave it out, or give --config.prune.method=adapt"
      )


def _check_streamed(p: Prune) -> None:
  """Whether layers may stay in the host's memory while units are scored."""
  if not p.stream_layers:
    return
  allotment, _ = p.pair()
  if p.method in WHOLE or allotment not in CHOICES["prune.allotment"]:
    raise UserError(
      f"--config.prune.stream_layers=True is not for prune.method={p.method}: "
      "give --config.prune.method=fisher, curvature or adapt"
    )
  if p.refit.isdigit():
    raise UserError(
      f"--config.prune.refit={p.refit} refits between steps, when layers are "
      "in the host's memory (prune.stream_layers): give "
      "--config.prune.refit=final"
    )


def _check_search(config: Config) -> None:
  """Whether a search has the tokens that candidates are tried on."""
  source = config.prune.search.source
  if source.startswith(("npy:", "self")):
    raise UserError(
      f"--config.prune.search.source={source} must be a text: embedded, "
      "text:FILE, jsonl:FILE, parquet:FILE, hf:NAME or tfds:NAME"
    )
  if source and config.prune.pair()[0] != "search":
    raise UserError(
      f"--config.prune.search.source={source} is for a search: give "
      "--config.prune.allotment=search with it, or leave it out"
    )
  given = config.calibration.samples * config.calibration.seq_len
  tokens = config.prune.search.tokens
  searches = config.prune.pair()[0] == "search"
  # A file of given samples says itself how many there are.
  if source or "npy:" in config.calibration.source:
    return
  if searches and tokens > given:
    raise UserError(
      f"--config.prune.search.tokens={tokens} is more than the {given} "
      "calibration tokens of a step: lower it, or give more "
      "--config.calibration.samples"
    )


def layer_range(text: str, num_layers: int, name: str) -> range:
  """Parses '2:6' (half open; either end may be left out; empty = all).

  Args:
    text: what was given.
    num_layers: of the model.
    name: of the field, for the message.

  Raises:
    UserError: it is no range, or reaches beyond the model.
  """
  if not text:
    return range(num_layers)
  found = re.fullmatch(r"(\d*):(\d*)", text.strip())
  start = int(found[1] or 0) if found else -1
  stop = int(found[2] or num_layers) if found else -1
  if not 0 <= start <= stop <= num_layers:
    raise UserError(
      f"--config.{name}={text} is not a range of layers START:STOP within "
      f"0:{num_layers}"
    )
  return range(start, stop)
