"""Which values a recipe may have."""

import math
import re

from adapt_pruner_jax.config.fields import (
  CHOICES,
  WHOLE,
  Config,
  Prune,
  Vocab,
  get,
  task_names,
)
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
  "prune.refit_ridge": 0,
  "prune.refit_passes": 0,
  "prune.refit_rate": 0,
  "calibration.refit_samples": 2,
  "calibration.samples": 1,
  "calibration.seq_len": 2,
  "calibration.batch": 1,
  "calibration.pass_tokens": 0,
  "data.seq_len": 2,
  "data.batch": 1,
  "train.tokens": 0,
  "train.learning_rate": 0,
  "train.min_learning_rate": 0,
  "train.weight_decay": 0,
  "train.accumulation": 1,
  "train.distill_alpha": 0,
  "train.lora_rank": 0,
  "train.lora_alpha": 0,
  "eval.seq_len": 0,
  "eval.batch": 1,
  "checkpoint.steps": 1,
  "checkpoint.keep": 1,
}
# Allotments whose steps have a size of their own, and may just be counted.
STEPPING = ("adapt", "ranking")
# Those that can count in another unit than parameters.
BUDGETED = ("adapt", "uniform", "ranking")


def check(config: Config) -> None:
  """Raises a UserError for a value that no run can have."""
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
    if not value >= low:  # written so that NaN fails
      raise UserError(f"--config.{name}={value} must be at least {low}")
  if config.train.distill_alpha > 1:
    raise UserError(
      f"train.distill_alpha={config.train.distill_alpha} must be in [0, 1]"
    )
  rate, least = config.train.learning_rate, config.train.min_learning_rate
  if config.train.tokens and least > rate:
    raise UserError(
      f"--config.train.min_learning_rate={least} is above "
      f"--config.train.learning_rate={rate}: the rate would rise at the end"
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
  _check_search(config)


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
  if p.budget != "params" and (
    p.target_params or p.pair()[0] not in BUDGETED or p.method in WHOLE
  ):
    raise UserError(
      f"--config.prune.budget={p.budget} goes with prune.ratio or "
      "prune.budget_value, and with the allotments "
      f"{', '.join(BUDGETED)}: give --config.prune.method=adapt or curvature"
    )
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


def _check_parts(p: Prune) -> None:
  """Whether method, allotment, score and refit go together."""
  if not isinstance(p.refit, str):
    raise UserError(f'prune.refit={p.refit!r} must be text: "{p.refit}"')
  if not re.fullmatch(r"none|final|[1-9]\d*", p.refit):
    raise UserError(
      f"--config.prune.refit={p.refit} is not none, final, or a number of "
      "pruning steps (such as 2) after which to refit"
    )
  if p.refit_passes and p.refit == "none":
    raise UserError(
      f"--config.prune.refit_passes={p.refit_passes} follows a refit: give "
      "--config.prune.refit=final with it"
    )
  for name in ("allotment", "group_importance"):
    if getattr(p, name) and p.method in WHOLE:
      raise UserError(
        f"--config.prune.{name}={getattr(p, name)} cannot be combined with "
        f"--config.prune.method={p.method}, whose scores and allotment are one "
        "thing: leave it out, or give --config.prune.method=adapt"
      )


def _check_search(config: Config) -> None:
  """Whether a step has the tokens that candidates are tried on."""
  given = config.calibration.samples * config.calibration.seq_len
  tokens = config.prune.search.tokens
  searches = config.prune.pair()[0] == "search"
  # A file of given samples says itself how many there are.
  if searches and tokens > given and "npy:" not in config.calibration.source:
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
