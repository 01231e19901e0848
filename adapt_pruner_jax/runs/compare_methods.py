"""Who takes part in a comparison: methods by name, and their settings."""

import dataclasses
from collections.abc import Callable
from functools import partial

from adapt_pruner_jax.config import PUBLISHED, Config, Prune, check
from adapt_pruner_jax.errors import UserError, nearest

# Names beside those of `config.PUBLISHED`, as settings of prune.*.
VARIANTS = {
  "uniform": {"method": "adapt", "amplitude": 0.0},
  # The published selection; the target is met exactly all the same.
  "paper": {"method": "adapt", "gqa_fold": "reference", "trim": True},
}
NAMES = (*PUBLISHED, *VARIANTS)
REFIT = "+refit"  # after a name: with prune.refit, "final" if that is none
OURS = ("curvature", "fisher")
ALL = (*NAMES, *(name + REFIT for name in ("adapt", *OURS)))
FEW = ("reap",)  # for mixtures of experts alone: not among "all"
DENSE, SCRATCH = "dense", "from_scratch"


def parse_names(
  text: str, may: Callable[[str], bool] = lambda name: True
) -> list[str]:
  """Reads --methods: names with commas between, or "all".

  A name is one of `config.CHOICES["prune.method"]`, `uniform` (amplitude 0) or
  `paper` (heads counted as the authors' code does), with `+refit` behind it or
  not. All are those that any model can be pruned by, and, with `may`, that may.

  Raises:
    UserError: an unknown name, or one that is given twice.
  """
  if text == "all":
    return [name for name in ALL if name not in FEW and may(name)]
  names = [name.strip() for name in text.split(",") if name.strip()]
  for name in names:
    if name.removesuffix(REFIT) not in NAMES:
      raise UserError(
        f"--methods={text}: no method {name}{nearest(name, ALL)}; there are "
        f"{', '.join(NAMES)}, each also with {REFIT}, and all"
      )
  if not names or len({*names}) < len(names):
    raise UserError(
      f"--methods={text}: give names once each, with commas between, or all"
    )
  return names


def parse_ratios(text: str) -> list[float]:
  """Reads --ratios: shares of all parameters to remove, rising.

  Raises:
    UserError: not numbers between 0 and 1.
  """
  try:
    ratios = sorted({float(part) for part in text.split(",")})
  except ValueError:
    ratios = []
  if not ratios or not all(0 < ratio < 1 for ratio in ratios):
    raise UserError(
      f"--ratios={text}: give shares to remove, above 0 and below 1, with "
      "commas between, such as 0.2,0.4,0.6"
    )
  return ratios


def settings_of(name: str, ratio: float, base: Prune) -> Prune:
  """The settings that a method's name stands for, at a ratio.

  Args:
    base: of `shared_recipe`.
  """
  plain = name.removesuffix(REFIT)
  refit = "none" if plain == name else base.refit
  # Of the tables' methods only ours are refitted between their steps.
  if refit.isdigit() and plain not in OURS:
    refit = "final"
  variant = VARIANTS.get(plain, {"method": plain})
  variant = variant | {"ratio": ratio, "refit": refit, "allotment": ""}
  if refit == "none":
    variant["refit_passes"] = 0
  # A kind of Taylor score is for the methods that have one.
  if PUBLISHED[variant["method"]][1] != "taylor":
    variant["group_importance"] = ""
  return dataclasses.replace(base, **variant)


def shared_recipe(config: Config, recover_tokens: int) -> Config:
  """What all rows share; the work directory's config.json.

  Raises:
    UserError: limits beside the ratio, or hours.
  """
  if config.train.hours:
    raise UserError(
      f"--config.train.hours={config.train.hours}: methods are compared at "
      "equal tokens; give --recover_tokens=N"
    )
  if config.prune.limits:
    raise UserError(
      f"--config.prune.limits={config.prune.limits}: methods are compared at "
      "one budget; leave it out, or use `run`"
    )
  return dataclasses.replace(
    config,
    prune=dataclasses.replace(
      config.prune,
      method="adapt",
      ratio=0.0,
      target_params=0,
      budget_value=0.0,
      max_steps=0,
      stages=1,
      # What +refit means; not "none", so that its calibration is opened.
      refit="final" if config.prune.refit == "none" else config.prune.refit,
    ),
    train=dataclasses.replace(config.train, tokens=recover_tokens),
    oneshot_control=False,
  )


def _counts_so(shared: Config, name: str) -> bool:
  """Whether a method can meet the recipe's budget."""
  settings = settings_of(name, 0.5, shared.prune)
  try:
    check(dataclasses.replace(shared, prune=settings))
  except UserError:
    return shared.prune.budget == "params"  # then it is told
  return True


def jobs(
  config: Config,
  methods: str,
  ratios: list[float],
  recover_tokens: int,
  from_scratch: bool,
) -> list[tuple[str, float]]:
  """The rows of a comparison: names with their ratios, the original first.

  Args:
    config, recover_tokens, from_scratch: as `compare.compare`'s.
    methods: names with commas between.
    ratios: from `parse_ratios`.

  Raises:
    UserError: unknown names, or what no comparison can be made of.
  """
  shared = shared_recipe(config, recover_tokens)
  names = parse_names(methods, partial(_counts_so, shared))
  if not (config.eval.text or config.eval.tasks):
    raise UserError(
      "nothing to compare by: give --config.eval.text=FILE for perplexity, "
      "--config.eval.tasks=arc_easy,... for accuracy, or both"
    )
  if from_scratch and not recover_tokens:
    raise UserError("--from_scratch needs --recover_tokens=N to train on")
  if from_scratch and "adapt" not in names:
    raise UserError(
      "--from_scratch trains the shapes that adapt leaves: add adapt to "
      "--methods"
    )
  found = [(DENSE, 0.0)]
  for ratio in ratios:
    for name in names:
      settings = settings_of(name, ratio, shared.prune)
      check(dataclasses.replace(shared, prune=settings))
      found.append((name, ratio))
    found += [(SCRATCH, ratio)] * from_scratch
  return found
