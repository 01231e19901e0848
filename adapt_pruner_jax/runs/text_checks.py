"""Whether a run's texts are enough, and apart from what is reported."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Config, Prune, get
from adapt_pruner_jax.data import overlap, tuning_questions
from adapt_pruner_jax.data.calibration import GivenData, WindowData
from adapt_pruner_jax.data.packing import TrainData
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import refit_loss

SHARED = 0.01  # of a reported text's windows, from which it is no accident
FEW = 4.0  # tokens a channel, below which a second-order score is mostly noise
SECOND_ORDER = ("curvature", "surgeon")  # scores that invert Gram matrices
TUNING = "prune.search.source"

Texts = WindowData | GivenData | TrainData
Say = Callable[[str], None]


def check_refit(
  recipe: Config, mesh: Mesh, opened: GivenData | WindowData | None = None
) -> None:
  """Raises as `refit_loss.split`, where there will be such a refit.

  Args:
    recipe, mesh: of the run.
    opened: what refits read; None = not yet, and a file may say how many
      windows there are.
  """
  windows = recipe.calibration.refit_samples
  if isinstance(opened, GivenData):
    windows = opened.samples.shape[1]
  elif recipe.calibration.source.startswith("npy:"):
    return
  if recipe.prune.refit_passes:
    batch = recipe.prune.refit_batch or recipe.calibration.batch
    refit_loss.split(windows, batch, mesh)


def check_overlaps(
  recipe: Config,
  reported_N: np.ndarray | None,
  texts: Mapping[str, Texts | None],
  say: Say,
) -> None:
  """Compares `eval.text` with all texts that something is learnt from.

  Calibration and training are told, since one may measure on one's own text on
  purpose; what a search makes its choices by is refused.

  Args:
    recipe: of the run.
    reported_N: tokens of `eval.text`; None = there is none.
    texts: what is opened, by the field that names it; None = nothing.
    say: is told of each that overlaps.

  Raises:
    UserError: the text of a search is part of the reported one.
  """
  if reported_N is None:
    return
  for name, opened in texts.items():
    if opened is None:
      continue
    share = overlap.share(reported_N, _tokens(opened))
    if share < SHARED:
      continue
    found = (
      f"{share:.0%} of --config.eval.text={recipe.eval.text} is also in "
      f"--config.{name}={get(recipe, name)} (windows of {overlap.WINDOW} "
      "tokens)"
    )
    if name == TUNING:
      raise UserError(
        f"{found}, so that what the search finds would look better than it is: "
        "give one of them another text"
      )
    say(f"WARNING: {found}: what is measured on it is not held out")


def check_questions(recipe: Config) -> None:
  """Raises a UserError if a quality is measured on questions that are reported.

  Those of `eval.tasks_dir`; what is asked from the network is not compared.
  """
  source, folder = recipe.calibration.tuning, recipe.eval.tasks_dir
  if not source.startswith(tuning_questions.PREFIX) or not folder:
    return
  if found := tuning_questions.shared(source, Path(os.path.expanduser(folder))):
    raise UserError(
      f"--config.calibration.tuning={source} has a question of "
      f"--config.eval.tasks_dir ({found}), so that the result would look "
      "better than it is: give other questions"
    )


def _tokens(opened: Texts) -> Iterable[np.ndarray]:
  if isinstance(opened, GivenData):
    return (np.ravel(step) for step in opened.samples)
  return (stream.tokens for stream in opened.streams)


def many_steps(settings: Prune) -> int:
  """No run draws windows for more steps than these, about."""
  sizes = settings.step_size, settings.ranking.step_size
  counts = settings.uniform.steps, settings.search.steps
  stage = settings.max_steps or max(*counts, *(round(1 / s) for s in sizes))
  return settings.stages * stage + max(1, settings.refit_passes)


def check_channels(
  settings: Prune,
  recipe: Config,
  full: ModelConfig,
  steps: WindowData | GivenData,
  refits: WindowData | GivenData,
  say: Say,
) -> None:
  """Compares the tokens of a step with the channels that it looks at.

  A score that inverts a Gram matrix, and a refit, need several tokens for each
  input channel of a matrix. Those of windows that overlap, since the text is
  short, count once.

  Args:
    settings: of the prune.
    recipe: what else the run is told.
    full: the model's sizes.
    steps, refits: what pruning steps read, and refits.
    say: is told if there are few.

  Raises:
    UserError: fewer than `calibration.tokens_per_channel`.
  """
  channels = max(
    full.hidden_size, max(full.head_channels()), max(full.ffn_widths)
  )
  needs = {}
  if (score := settings.pair()[1]) in SECOND_ORDER:
    needs[f"{score}'s scores"] = ("samples", steps)
  if settings.solves():
    needs["the refit"] = ("refit_samples", refits)
  for name, opened in {"samples": steps, "refit_samples": refits}.items():
    rows, length, tokens = _shape(opened)
    if tokens < rows * length and (name == "samples" or refits is not steps):
      say(
        f"WARNING: {rows} windows of {length} tokens overlap: "
        f"--config.calibration.source has {tokens:,} for them; give a longer "
        f"text, or lower --config.calibration.{name}"
      )
  least = recipe.calibration.tokens_per_channel
  for what, (name, opened) in needs.items():
    rows, length, tokens = _shape(opened)
    if tokens / channels >= (least or FEW):
      continue
    different = f" ({tokens:,} different)" if tokens < rows * length else ""
    found = (
      f"{what}: {rows} windows of {length} tokens{different} are "
      f"{tokens / channels:.2g} a channel of the widest matrix, which has "
      f"{channels:,}"
    )
    enough = math.ceil((least or FEW) * channels / length)
    hint = f"give at least --config.calibration.{name}={enough}"
    hint = "give a longer text" if different else hint
    if least:
      raise UserError(
        f"{found}, below --config.calibration.tokens_per_channel={least:g}: "
        f"{hint}, or longer windows"
      )
    say(f"WARNING: {found}: below {FEW:g} they are mostly noise; {hint}")


def _shape(opened: WindowData | GivenData) -> tuple[int, int, int]:
  """Windows of a step, tokens of each, and how many of all are different."""
  if isinstance(opened, GivenData):
    rows, length = opened.samples.shape[1:]
    return rows, length, rows * length
  different = sum(
    min(count * opened.seq_len, len(stream.tokens))
    for stream, count in zip(opened.streams, opened.counts, strict=True)
  )
  return sum(opened.counts), opened.seq_len, different
