"""The recipe of a run: every knob, visible, with its default.

A file in `configs/` returns a `Config`; `--config.section.field=value` on the
command line overrides a field. Numbers in the comments are the paper's.
"""

import dataclasses
import re
from typing import Any

from adapt_pruner_jax.errors import UserError, nearest

CHOICES = {
  "model.dtype": ("float32", "bfloat16", "float16"),
  "prune.method": (
    "adapt",
    "curvature",
    "llm_pruner",
    "flap",
    "wanda_sp",
    "slicegpt",
    "shortgpt",
    "magnitude",
    "random",
  ),
  "prune.group_importance": (
    "taylor",
    "taylor_vectorize",
    "taylor_second",
    "taylor_mix",
    "l1",
    "l2",
    "random",
  ),
  "prune.layer_importance": ("cosine", "euclidean", "manhattan"),
  "prune.gqa_fold": ("aligned", "reference"),
  "prune.llm_pruner_ranking": ("layer", "global"),
  "prune.flap_metric": ("WIFV", "WIFN", "IFV"),
  "prune.flap_structure": ("ALAM", "ALMM", "ULUM", "ULMM"),
  "prune.magnitude_norm": ("l1", "l2"),
  "train.schedule": ("wsd", "cosine"),
  "train.dtype": ("float32", "bfloat16"),
  "train.data_share": ("linear", "constant", "cosine"),
}


@dataclasses.dataclass
class Model:
  path: str = "tiny"  # HuggingFace directory, hub id, or "tiny" (embedded)
  dtype: str = "float32"
  ignore_fields: str = ""  # config.json fields to ignore, comma separated


@dataclasses.dataclass
class Prune:
  method: str = "adapt"
  # The target: parameters to keep, or the share of all parameters to remove.
  # 0 = not given; exactly one of them, or neither and max_steps.
  target_params: int = 0
  ratio: float = 0.0
  stages: int = 1
  step_size: float = 0.02  # growth of the mean sparsity a step
  max_steps: int = 0  # steps a stage; 0 = as many as the target needs
  amplitude: float = 0.02  # sparsity moved from important to unimportant layers
  group_importance: str = "taylor"
  layer_importance: str = "cosine"
  attention_layers: str = ""  # "2:6", half open; empty = all
  mlp_layers: str = ""
  gqa_fold: str = "aligned"  # "reference" = the authors' code
  trim: bool = True  # end just below the target; False = the authors'
  round_ffn_to: int = 1  # MLP widths become multiples of this
  # Least squares on what is left, after any method: none, final, or every so
  # many steps (curvature only).
  refit: str = "none"
  refit_ridge: float = 0.0  # 0 = by the number of tokens
  refit_all: bool = False  # all seven matrices, not just o and down
  # Curvature: what a step removes of all parameters, and at most of a module.
  curvature_step: float = 0.05
  cap: float = 0.2
  # Of the other methods; the defaults are the published ones.
  llm_pruner_steps: int = 1  # scores are taken anew for each
  llm_pruner_ranking: str = "layer"  # units compete in their layer, or "global"
  flap_metric: str = "WIFV"
  flap_structure: str = "ALAM"  # adaptive or uniform over layers, over modules
  slice_multiple: int = 1  # of residual widths; published (and faster): 8
  slice_subtract_mean: bool = False  # published, but wrong for RMSNorm
  magnitude_norm: str = "l2"


@dataclasses.dataclass
class Calibration:
  # embedded | text:FILE | jsonl:FILE | hf:NAME | tfds:NAME, or several with
  # weights (see sources.py), or npy:FILE
  source: str = "embedded"
  samples: int = 512  # sequences, fresh ones for each step
  seq_len: int = 64
  batch: int = 32  # sequences at a time
  refit_samples: int = 512  # sequences of a refit


@dataclasses.dataclass
class Data:
  source: str = "embedded"  # as calibration.source, but npy
  seq_len: int = 1024
  batch: int = 32  # sequences a train step

  @property
  def step_tokens(self) -> int:
    """Tokens of a train step."""
    return self.batch * self.seq_len


@dataclasses.dataclass
class Train:
  tokens: int = 0  # recovery training over all stages; 0 = none
  learning_rate: float = 2e-5
  min_learning_rate: float = 2e-6
  schedule: str = "wsd"
  data_share: str = "linear"  # share of the tokens that a stage gets
  weight_decay: float = 0.0
  dtype: str = "float32"  # of the arithmetic; weights and moments are float32
  remat: bool = False  # recompute each layer in the backward pass
  accumulation: int = 1  # microbatches a step
  carry_moments: bool = True  # keep Adam's moments of what a prune leaves
  distill_alpha: float = 0.0  # weight of the distillation loss; 0 = none
  lora_rank: int = 0  # 0 = train all weights
  lora_alpha: float = 16.0
  skip_nonfinite: bool = False  # pass over a batch with a non-finite loss


@dataclasses.dataclass
class Mesh:
  data: int = 1  # -1 = whatever is left, for one of the three
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass
class Eval:
  text: str = ""  # a text file for the perplexity, "embedded"; empty = none
  tasks: str = ""  # presets and lm-eval's tasks, comma separated; empty = none
  tasks_dir: str = ""  # jsonl files of the questions; empty = the network
  trust_tasks_dir: bool = False  # the folder's YAML may run its Python
  latency: bool = False  # `run` also times the original and the result
  seq_len: int = 0  # tokens a window; 0 = the model's context, at most 2048
  batch: int = 8


@dataclasses.dataclass
class Checkpoint:
  steps: int = 500  # train steps between checkpoints
  keep: int = 2  # the newest so many


@dataclasses.dataclass
class Log:
  tensorboard: bool = True
  trackers: str = ""  # wandb, trackio, or both


@dataclasses.dataclass
class Config:
  """A run; `dataclasses.asdict` of it is the work directory's config.json."""

  model: Model = dataclasses.field(default_factory=Model)
  prune: Prune = dataclasses.field(default_factory=Prune)
  calibration: Calibration = dataclasses.field(default_factory=Calibration)
  data: Data = dataclasses.field(default_factory=Data)
  train: Train = dataclasses.field(default_factory=Train)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  eval: Eval = dataclasses.field(default_factory=Eval)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  log: Log = dataclasses.field(default_factory=Log)
  oneshot_control: bool = False  # then also prune in one go, to compare
  seed: int = 0


def task_names(recipe: Eval) -> list[str]:
  """The names in `eval.tasks`."""
  return [name.strip() for name in recipe.tasks.split(",") if name.strip()]


def field_names(config: Config) -> list[str]:
  """Dotted names of all fields, e.g. 'prune.ratio'."""
  return [".".join(path) for path, _ in _leaves(dataclasses.asdict(config))]


def get(config: Config, name: str) -> Any:
  """Value of a dotted field."""
  value = config
  for part in name.split("."):
    value = getattr(value, part)
  return value


def difference(old: dict, new: dict) -> list[str]:
  """One 'field: old -> new' for each field that two recipes do not share."""
  old = {".".join(path): value for path, value in _leaves(old)}
  new = {".".join(path): value for path, value in _leaves(new)}
  return [
    f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
    for name in sorted(old | new)
    if old.get(name, "absent") != new.get(name, "absent")
  ]


def check(config: Config) -> None:
  """Raises a UserError for a value that no run can have."""
  for name, allowed in CHOICES.items():
    value = get(config, name)
    if value not in allowed:
      raise UserError(
        f"--config.{name}={value} is not one of {', '.join(allowed)}"
        + nearest(str(value), allowed)
      )
  p = config.prune
  if p.ratio and p.target_params:
    raise UserError(
      f"prune.ratio={p.ratio} and prune.target_params={p.target_params} are "
      "both given: give one of them"
    )
  if not (p.ratio or p.target_params or p.max_steps):
    raise UserError(
      "no target: give --config.prune.ratio=0.2 (share of all parameters to "
      "remove), --config.prune.target_params=N, or --config.prune.max_steps=N"
    )
  if not 0 <= p.ratio < 1:
    raise UserError(f"prune.ratio={p.ratio} must be in [0, 1)")
  if p.stages > 1 and not (p.ratio or p.target_params):
    raise UserError(
      f"prune.stages={p.stages} needs prune.ratio or prune.target_params"
    )
  at_least = {
    "prune.target_params": 0,
    "prune.max_steps": 0,
    "prune.amplitude": 0,
    "prune.stages": 1,
    "prune.round_ffn_to": 1,
    "prune.llm_pruner_steps": 1,
    "prune.slice_multiple": 1,
    "prune.refit_ridge": 0,
    "calibration.refit_samples": 2,
    "calibration.samples": 1,
    "calibration.seq_len": 2,
    "calibration.batch": 1,
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
  for name, low in at_least.items():
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
  for name in ("prune.step_size", "prune.curvature_step", "prune.cap"):
    if not 0 < get(config, name) <= 1:
      raise UserError(f"{name}={get(config, name)} must be in (0, 1]")
  if not isinstance(p.refit, str):
    raise UserError(f'prune.refit={p.refit!r} must be text: "{p.refit}"')
  if not re.fullmatch(r"none|final|[1-9]\d*", p.refit):
    raise UserError(
      f"--config.prune.refit={p.refit} is not none, final, or a number of "
      "pruning steps (such as 2) after which to refit"
    )
  if p.refit.isdigit() and p.method != "curvature":
    raise UserError(
      f"--config.prune.refit={p.refit} refits between the steps of curvature; "
      f"with --config.prune.method={p.method} give final or none"
    )


def layer_range(text: str, num_layers: int, name: str) -> range:
  """Parses '2:6' (half open; either end may be left out; empty = all)."""
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


def _leaves(tree: dict, path: tuple = ()) -> list[tuple[tuple, Any]]:
  found = []
  for key, value in tree.items():
    if isinstance(value, dict):
      found += _leaves(value, (*path, key))
    else:
      found.append(((*path, key), value))
  return found
