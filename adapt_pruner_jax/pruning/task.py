"""What a prune works on, what it has done so far, and what it gives back."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.config import Prune
from adapt_pruner_jax.data.tuning_questions import TuningQuestions
from adapt_pruner_jax.distributed import sharding
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.axes import UNITS, Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import surgery
from adapt_pruner_jax.pruning.schedule import Modules
from adapt_pruner_jax.pruning.surgery import Kept, Masks

# Calibration tokens of a pruning step (from 0), int32 [N, T].
Samples = Callable[[int], np.ndarray]
Counts = dict[str, np.ndarray]  # units to remove, {"K": int [L], "F": int [L]}
# Further budgets: settings that count, and the most that there may be.
Limits = tuple[tuple[Prune, int], ...]
Scores = dict[str, np.ndarray]  # float64, of the shapes of masks


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One pruning step; `runs.state` keeps what a stage goes on from."""

  number: int  # from 1
  masks: Masks
  sparsity: Modules
  params: int  # after it
  # What was left at each refit between the steps so far, by step.
  refitted: dict[int, Masks] = dataclasses.field(default_factory=dict)
  losses_M: np.ndarray | None = None
  importance_L: np.ndarray | None = None  # summed over minibatches
  relative: Modules | None = None
  scores: Scores | None = None  # before the removal
  facts: dict | None = None  # how the allotment came about, for the record
  rise: float | None = None  # above the model before, as `Quality.limit`
  ended: bool = False  # no further step keeps the quality


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
  """A loss to keep, or an accuracy.

  Attributes:
    limit: nats a token above the model's before pruning, at most; with
      questions, the share of its accuracy that may be lost.
    tokens_NT: the windows that it is measured on.
    questions: in their place; None = there are none.
  """

  limit: float
  tokens_NT: np.ndarray | None
  questions: TuningQuestions | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PruneTask:
  """A model to prune, and how far.

  Attributes:
    config, params: the model as it is now.
    settings: the recipe; the target in it is not read.
    samples: gives the calibration tokens of each step.
    target: parameters to keep; None = `settings.max_steps` steps.
    full: sizes of the original model, if this one has been pruned before.
    kept: which of its units are left.
    refit_samples: gives the tokens of the refit behind a step; only asked for
      one, since a file of given samples may hold none for it.
    tuning: gives the tokens that a search tries its candidates on; None =
      those of the step.
    batch: calibration sequences at a time.
    pass_tokens: calibration tokens that one program scores, at least a batch; 0
      = by memory (`passes`).
    mesh: devices; default one.
    seed: of random scores.
    after: the last step that an interrupted prune has done.
    log: called with `record(step)` and the step, after each.
    limits: met beside the target.
    quality: where pruning stops before the target.
  """

  config: ModelConfig
  params: Params
  settings: Prune
  samples: Samples
  target: int | None = None
  _: dataclasses.KW_ONLY
  full: ModelConfig | None = None
  kept: Kept | None = None
  refit_samples: Samples | None = None
  tuning: Samples | None = None
  batch: int = 32
  pass_tokens: int = 0
  mesh: Mesh | None = None
  seed: int = 0
  after: Step | None = None
  log: Callable[[dict, Step], None] | None = None
  limits: Limits = ()
  quality: Quality | None = None

  def __post_init__(self) -> None:
    given = {
      "full": self.full or self.config,
      "kept": self.kept or surgery.everything(self.config),
      "mesh": self.mesh or sharding.one_device(),
    }
    for name, value in given.items():
      object.__setattr__(self, name, value)

  def stacked(self) -> Params:
    """The model in dense stacked coordinates, as `surgery.expand`."""
    args = self.config, self.params, self.kept, self.full, self.mesh
    return surgery.expand(*args, self.settings.stream_layers)

  @property
  def begin(self) -> Masks:
    """Units of the original that are there when the prune begins."""
    return surgery.to_masks(self.kept, self.full)


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
  """A model under way: whole arrays, and the units that count in them.

  Attributes:
    stacked: the task's params in dense coordinates (`surgery.expand`), as the
      refits so far have left them.
    step: the last one that is done.
  """

  task: PruneTask
  stacked: Params
  step: Step

  @property
  def masks(self) -> Masks:
    """Units that are left."""
    return self.step.masks

  @property
  def number(self) -> int:
    """Of the step under way, from 1."""
    return self.step.number + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """What a step has measured of a masked model.

  Attributes:
    scores: of all units; those that are masked mean nothing.
    losses_M: of the minibatches, nats a token.
    importance_L: of the layers, summed over minibatches.
    facts: what the method's `finish` wants to know.
    halves: scores of each half, [L], as one piece: all units that are left of
      it; None = of a score that knows them by their units alone.
  """

  scores: Scores
  losses_M: np.ndarray | None = None
  importance_L: np.ndarray | None = None
  facts: object = None
  halves: Scores | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Allotted:
  """How much goes from each module in a step.

  Attributes:
    counts: units to remove.
    sparsity: that the modules should have now; None = what they have.
    relative: importance of the modules, for the record.
    importance_L: of the layers, for the record.
    facts: how it came about, JSON-able, for the record.
  """

  counts: Counts
  sparsity: Modules | None = None
  relative: Modules | None = None
  importance_L: np.ndarray | None = None
  facts: dict | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
  """A smaller model, and how it came about."""

  config: ModelConfig
  params: Params
  kept: Kept
  trace: list[dict]  # a JSON-able record a step, see `record`
  refits: list[dict] = dataclasses.field(default_factory=list)  # of matrices
  refit_loss: dict | None = None  # of the refit by the loss


def removed_share(begin: Masks, masks: Masks) -> Modules:
  """Share of each module's units that is gone, {"K": [L], "F": [L]}."""
  first, now = surgery.widths(begin), surgery.widths(masks)
  return {u: 1 - now[u] / np.maximum(first[u], 1) for u in UNITS}


def record(step: Step) -> dict:
  """A line of trace.jsonl; what a method does not measure (NaN) is None."""

  def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

  width = surgery.widths(step.masks)
  facts = {} if step.facts is None else {"search": step.facts}
  if step.rise is not None:
    # What is left, so that the model of each step can be made again.
    masks = surgery.to_hex(step.masks)
    facts |= {"rise": step.rise, "ended": step.ended, "masks": masks}
  return facts | {
    "step": step.number,
    "loss": number(np.mean(step.losses_M)),
    "params": int(step.params),
    "layers": [
      {
        "kv_groups": int(width["K"][i]),
        "ffn": int(width["F"][i]),
        "importance": number(step.importance_L[i]),
        "attn_importance": number(step.relative["K"][i]),
        "mlp_importance": number(step.relative["F"][i]),
        "attn_sparsity": float(step.sparsity["K"][i]),
        "mlp_sparsity": float(step.sparsity["F"][i]),
      }
      for i in range(len(width["K"]))
    ],
  }


def in_one_step(
  task: PruneTask, config: ModelConfig, params: Params, kept: Kept, facts: dict
) -> Pruned:
  """What a method gives that cuts all at once, by scores of no single unit.

  Args:
    task: of the prune; its log is called.
    config, params, kept: what is left.
    facts: more of the step's record.
  """
  nan_L = np.full(config.num_layers, np.nan)
  step = Step(
    1,
    task.begin,
    dict.fromkeys(UNITS, np.zeros(config.num_layers)),
    model_config.count_params(config),
    losses_M=np.array([np.nan]),
    importance_L=nan_L,
    relative=dict.fromkeys(UNITS, nan_L),
  )
  trace = record(step) | facts
  if task.log is not None:
    task.log(trace, step)
  return Pruned(config, params, kept, [trace])
