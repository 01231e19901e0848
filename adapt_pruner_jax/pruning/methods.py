"""The pruning methods by name, and how their parts combine.

A method measures what units are worth, allots how much goes from each module,
and removes the units of the lowest scores. `prune.method` names the published
pairs; `prune.allotment` and `prune.group_importance` exchange one of the two.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import (
  allotment,
  curvature,
  fisher,
  least_squares,
  linear_algebra,
  one_width,
  refit,
  refit_loss,
  scores,
  search,
  steps,
  surgery,
)
from adapt_pruner_jax.pruning.baselines import (
  flap,
  llm_pruner,
  minitron,
  reap,
  shortgpt,
  slicegpt,
  surgeon,
  wanda_sp,
)
from adapt_pruner_jax.pruning.steps import Method
from adapt_pruner_jax.pruning.task import Pruned, PruneTask

# What units are worth, by `prune.group_importance` or a method's own name.
MEASURES = {
  **{kind: partial(scores.measure, kind=kind) for kind in scores.KINDS},
  "curvature": curvature.measure,
  "fisher": fisher.measure,
  "fluctuation": flap.fluctuation,
  "flap": flap.measure,
  "wanda_sp": wanda_sp.measure,
  "shortgpt": shortgpt.measure,
  "minitron": minitron.measure,
  "surgeon": surgeon.measure,
}
# How much goes where, by `prune.allotment` or a method's own name.
ALLOTMENTS = {
  "adapt": allotment.adapt,
  "uniform": allotment.uniform,
  "ranking": allotment.ranking,
  "one_width": one_width.one_width,
  "search": search.search,
  "llm_pruner": llm_pruner.allot,
  "flap": flap.allot,
  "wanda_sp": wanda_sp.allot,
  "shortgpt": shortgpt.allot,
  "minitron": minitron.allot,
  "surgeon": surgeon.allot,
}
# What methods do before and after.
AROUND = {
  "llm_pruner": {"prepare": llm_pruner.prepare},
  "magnitude": {"prepare": llm_pruner.prepare},
  "random": {"prepare": llm_pruner.prepare},
  "flap": {"prepare": flap.prepare, "finish": flap.finish},
  "shortgpt": {"finish": shortgpt.finish},
  "minitron": {"prepare": minitron.prepare, "finish": shortgpt.finish},
  "surgeon": {"prepare": surgeon.prepare, "update": surgeon.update},
}

# Methods that prune models with layers of two kinds.
OF_ALL_KINDS = (
  "adapt",
  "fisher",
  "llm_pruner",
  "magnitude",
  "random",
  "shortgpt",
)


def method_of(settings: Prune) -> Method:
  """The parts that the settings ask for; not of SliceGPT, which has none."""
  name, score = settings.pair()
  measure, around = MEASURES[score], AROUND.get(settings.method, {})
  if name == "adapt":
    measure = partial(scores.with_importance, measure)
    around = around | {"strict": True}
  return Method(measure, ALLOTMENTS[name], **around)


def prune(task: PruneTask) -> Pruned:
  """Prunes as `task.settings` say; without the refit at the end.

  Raises:
    UserError: bad settings, a target out of reach, or values that are not
      finite.
  """
  check(task.full, task.settings)
  with jax.default_matmul_precision(task.settings.precision):
    if task.settings.method == "slicegpt":
      return slicegpt.prune(task)
    if task.settings.method == "reap":
      return reap.prune(task)
    return steps.prune(method_of(task.settings), task)


def refit_after(task: PruneTask, pruned: Pruned) -> Pruned:
  """The refit that `prune.refit` asks for at the end of a prune.

  Least squares; then, by `prune.refit_passes`, the loss, each pass on windows
  of its own.

  Args:
    task: of the prune.
    pruned: what it gave. Where both refits are done its params are given up
      between them, since training takes all the memory that there is.

  Returns:
    The same without a refit; else with new params, a record a matrix, and one
    of the loss.
  """
  settings = task.settings
  if settings.refit == "none":
    return pruned
  done = task.after.number if task.after else 0
  if pruned.trace:
    done = pruned.trace[-1]["step"]
  dense = task.config, task.params
  params, records, by_loss = pruned.params, [], None
  if settings.solves():
    params, records = _solved(task, pruned, task.refit_samples(done))
    if settings.refit_passes:
      pruned.params.clear()
  if settings.refit_passes:
    params, by_loss = refit_loss.refit_loss(
      dense,
      (pruned.config, params),
      lambda number: task.refit_samples(done + number),
      settings.refit_batch or task.batch,
      task.mesh,
      passes=settings.refit_passes,
      rate=settings.refit_rate,
      temperature=settings.refit_temperature,
      seed=task.seed,
    )
  return dataclasses.replace(
    pruned, params=params, refits=records, refit_loss=by_loss
  )


def _solved(
  task: PruneTask, pruned: Pruned, tokens_NT: np.ndarray
) -> tuple[Params, list[dict]]:
  """What least squares make of the params, and a record a matrix."""
  settings = task.settings
  with jax.default_matmul_precision(settings.precision):
    return refit.refit(
      (task.config, task.params),
      (pruned.config, pruned.params),
      surgery.relative_to(task.kept, pruned.kept),
      tokens_NT,
      task.batch,
      ridge=settings.refit_ridge,
      refit_all=settings.refit_all,
      mesh=task.mesh,
    )


def _by_gates(settings: Prune) -> bool:
  """Whether a method sees units by what they do, not by one kind of matrix."""
  measured = settings.pair()[1] in (*scores.KINDS, "fisher", "shortgpt")
  return measured and settings.method in OF_ALL_KINDS


def resumes(settings: Prune) -> bool:
  """Whether a prune can go on from one of its steps: all by masks can."""
  return settings.method not in ("slicegpt", "reap")


def check(config: ModelConfig, settings: Prune) -> None:
  """Raises a UserError if this model cannot be pruned so, before any work."""
  if config.residual and settings.method != "slicegpt":
    raise UserError(
      "this model was cut by SliceGPT, whose layers have residual widths of "
      "their own: only --config.prune.method=slicegpt prunes it again"
    )
  if settings.method == "slicegpt" and (
    config.norm != "rms" or config.parallel
  ):
    raise UserError(
      f"SliceGPT turns the residual stream of models with RMSNorm in front of "
      f"each half; {config.family} is not one: choose another "
      "--config.prune.method"
    )
  if settings.method == "slicegpt" and settings.refit != "none":
    raise UserError(
      "SliceGPT changes the residual width, which a refit compares: give "
      "--config.prune.refit=none"
    )
  if settings.stream_layers and jax.process_count() > 1:
    raise UserError(
      "--config.prune.stream_layers=True is for one process: leave it out, "
      "since more devices hold more"
    )
  if any(config.kinds()) and not _by_gates(settings):
    others = "a gated delta net in place of attention"
    others = "wider heads" if config.wide else others
    raise UserError(
      f"{config.family} has layers with {others}, which this method does not "
      "measure: choose "
      f"--config.prune.method={', '.join(OF_ALL_KINDS)}, with "
      f"--config.prune.group_importance={', '.join(scores.KINDS)} or fisher"
    )
  if settings.method == "shortgpt" and config.reuses:
    raise UserError(
      f"{config.family} models with layers that use the keys and values of "
      "others cannot drop layers: choose another --config.prune.method than "
      "shortgpt"
    )
  if settings.method == "minitron":
    minitron.check(config, settings)
  if settings.method == "surgeon":
    surgeon.check(settings)
  if settings.method == "reap":
    reap.check(config, settings)
  if config.experts:
    _check_experts(config, settings)
  inverts = settings.pair()[1] in ("curvature", "surgeon")
  if inverts or settings.method == "surgeon":
    linear_algebra.check(config)
  if settings.solves():
    least_squares.check(config, settings.refit_all)


def _check_experts(config: ModelConfig, settings: Prune) -> None:
  """Raises a UserError for what does not look into experts."""
  score = settings.pair()[1]
  if settings.method != "reap" and not _by_gates(settings):
    raise UserError(
      f"{config.family} is a mixture of experts, whose channels "
      f"{settings.method if score == settings.method else score} does not "
      "score: choose --config.prune.method=adapt, fisher, llm_pruner, "
      "magnitude or random"
    )
  if settings.method == "reap" and settings.solves():
    raise UserError(
      "least squares refit experts by their own tokens, and those of experts "
      "that reap drops have none: give --config.prune.refit=loss, or none"
    )
