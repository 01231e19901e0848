"""The recipe of a run: every knob, visible, with its default.

A file in `configs/` returns a `Config`; `--config.section.field=value` on the
command line overrides a field. Numbers in the comments are the paper's.
"""

import dataclasses
import functools
import math
from typing import Any

from adapt_pruner_jax.config import latency_table
from adapt_pruner_jax.config.choices import BLOCKS, PUBLISHED
from adapt_pruner_jax.errors import UserError, nearest


class Section:
  """A part of the recipe; a name that it does not have is an error at once.

  Else a recipe file with a misspelt field would change nothing, silently.
  """

  def __new__(cls, *_: Any, **given: Any) -> "Section":
    for name in given:
      cls._require(name)
    return super().__new__(cls)

  def __setattr__(self, name: str, value: Any) -> None:
    self._require(name)
    full = ".".join([*_place(type(self), Config), name])
    super().__setattr__(name, today(full, value))

  @classmethod
  def _require(cls, name: str) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    if name in names:
      return
    full = ".".join([*_place(cls, Config), name])
    if full in OLD_FIELDS:
      raise UserError(f"{full} is now {OLD_FIELDS[full]}")
    meant = f"{full}{nearest(name, names)}"
    raise UserError(f"no field {meant}; `adapt-pruner run --help` lists them")


@functools.cache  # every assignment to a field asks
def _place(section: type, within: type) -> tuple[str, ...]:
  """The names that lead to a section, ("prune", "flap"); () of `within`."""
  for field in dataclasses.fields(within):
    if field.type is section:
      return (field.name,)
    inside = dataclasses.is_dataclass(field.type)
    if inside and (found := _place(section, field.type)):
      return (field.name, *found)
  return ()


@dataclasses.dataclass
class Model(Section):
  path: str = "tiny"  # HuggingFace directory, hub id, or "tiny" (embedded)
  # Of the result's weights; "" = as they are stored, each its own. With any
  # other, what does not train is computed in it as well, else in float32.
  dtype: str = ""
  ignore_fields: str = ""  # config.json fields to ignore, comma separated


@dataclasses.dataclass
class Ranking(Section):
  """One ranking of all units by score per parameter."""

  step_size: float = 0.05  # of all parameters, removed a step
  cap: float = 0.2  # of a module's units, removed a step at most


@dataclasses.dataclass
class Uniform(Section):
  """The same share of every layer."""

  steps: int = 1  # scores are taken anew for each; LLM-Pruner's too


@dataclasses.dataclass
class Search(Section):
  """The counts of modules that diverge least from the dense model."""

  steps: int = 1  # scores are taken anew for each
  evaluations: int = 100  # candidates a step
  tokens: int = 2048  # that each is tried on
  # The text that they are of, as calibration.source but npy; empty = the step's
  # calibration. Choices are made by it: it must not be one that is reported.
  source: str = ""


@dataclasses.dataclass
class LlmPruner(Section):
  ranking: str = "layer"  # units compete in their layer, or "global"


@dataclasses.dataclass
class Flap(Section):
  metric: str = "WIFV"
  structure: str = "ALAM"  # adaptive or uniform over layers, over modules


@dataclasses.dataclass
class SliceGpt(Section):
  multiple: int = 1  # of residual widths; published (and faster): 8
  subtract_mean: bool = False  # published, but wrong for RMSNorm


@dataclasses.dataclass
class Minitron(Section):
  depth: int = 0  # layers to drop, those whose absence the loss shows least


@dataclasses.dataclass
class Surgeon(Section):
  shots: int = 5  # published: 40; factors are measured anew for each
  # Added to the diagonals of the factors of inputs and of gradients, in units
  # of their means.
  damp_a: float = 0.01
  damp_g: float = 0.01
  # That pay and are updated: writers = o and down, through which a unit speaks;
  # all = also those that read the stream, for which it then pays twice.
  matrices: str = "writers"


@dataclasses.dataclass
class Magnitude(Section):
  norm: str = "l2"


@dataclasses.dataclass
class Prune(Section):
  method: str = "adapt"
  # The target: parameters to keep, or the share of all parameters to remove.
  # 0 = not given; exactly one of them, or neither and max_steps.
  target_params: int = 0
  ratio: float = 0.0
  # What the ratio is a share of, and a value to end at in its unit, in place of
  # a ratio: params | flops | bytes | kv_bytes | latency | quality, in nats
  # above the original or the share of its accuracy lost (docs/budgets.md).
  budget: str = "params"
  budget_value: float = 0.0
  limits: str = ""  # further ones, such as "kv_bytes=2e6,latency=12"
  budget_context: int = 2048  # tokens, of flops, kv_bytes and latency
  budget_batch: int = 1  # sequences, of kv_bytes and latency
  budget_export: str = "bf16"  # of bytes: f32 | bf16 | q8_0 | q4_k_m ...
  budget_phase: str = "decode"  # of latency, or "prefill"
  budget_table: str = ""  # of latency; empty = measured here, before pruning
  budget_device: str = ""  # that the table is of; empty = this one
  stages: int = 1
  step_size: float = 0.02  # growth of the mean sparsity a step
  max_steps: int = 0  # steps a stage; 0 = as many as the target needs
  amplitude: float = 0.02  # sparsity moved from important to unimportant layers
  # How much goes from each module and what a unit is worth; empty = as
  # published with the method.
  allotment: str = ""
  group_importance: str = ""
  layer_importance: str = "cosine"
  attention_layers: str = ""  # "2:6", half open; empty = all
  mlp_layers: str = ""
  gqa_fold: str = "aligned"  # "reference" = the authors' code
  trim: bool = True  # end just below the target; False = the authors'
  round_ffn_to: int = 1  # MLP widths become multiples of this
  # So do the numbers of KV groups, as a tensor-parallel server needs.
  round_kv_to: int = 1
  # An allotment by ranking may take all of a layer's attention or MLP.
  whole_halves: bool = False
  attention: str = "auto"  # which implementation scores; docs/speed.md
  # Of float32 products in scoring and refits; less is faster (docs/method.md).
  precision: str = "float32"
  # Least squares on what is left: none, final, or every so many steps and at
  # the end; loss = only the passes below.
  refit: str = "none"
  refit_ridge: float = 0.0  # 0 = by the number of tokens
  refit_all: bool = False  # all seven matrices, not just o and down
  # Then passes, each over fresh windows, that lower the loss by all weights.
  refit_passes: int = 0
  refit_rate: float = 3e-4  # the highest learning rate of these
  refit_batch: int = 0  # windows a step of these; 0 = calibration.batch
  refit_temperature: float = 1.0  # what both models' logits are divided by
  # Of single allotments and methods; the defaults are the published ones.
  ranking: Ranking = dataclasses.field(default_factory=Ranking)
  uniform: Uniform = dataclasses.field(default_factory=Uniform)
  search: Search = dataclasses.field(default_factory=Search)
  llm_pruner: LlmPruner = dataclasses.field(default_factory=LlmPruner)
  flap: Flap = dataclasses.field(default_factory=Flap)
  slicegpt: SliceGpt = dataclasses.field(default_factory=SliceGpt)
  minitron: Minitron = dataclasses.field(default_factory=Minitron)
  surgeon: Surgeon = dataclasses.field(default_factory=Surgeon)
  magnitude: Magnitude = dataclasses.field(default_factory=Magnitude)
  # While units are scored, layers lie in the host's memory and come to the
  # device one by one, for a model that fills it (docs/budgets.md).
  stream_layers: bool = False

  def rounding(self) -> dict[str, int]:
    """What widths become multiples of, by unit: KV groups, MLP channels."""
    K, F = self.round_kv_to, self.round_ffn_to
    if self.counts("bytes"):
      F = math.lcm(F, BLOCKS.get(self.budget_export, 1))
    if self.counts("latency"):
      steps = latency_table.read(self.budget_table)["multiples"]
      K, F = math.lcm(K, steps["kv_groups"]), math.lcm(F, steps["ffn"])
    return {"K": K, "F": F}

  def other_limits(self) -> list[tuple[str, float]]:
    """The budgets in `limits` with their values."""
    parts = [part.partition("=") for part in self.limits.split(",") if part]
    return [(name.strip(), float(value)) for name, _, value in parts]

  def counts(self, budget: str) -> bool:
    """Whether something is limited in this unit."""
    return budget in (self.budget, *(name for name, _ in self.other_limits()))

  def has_target(self) -> bool:
    """Whether it is said where to end."""
    return bool(self.ratio or self.target_params or self.budget_value)

  def solves(self) -> bool:
    """Whether a refit has least squares in it."""
    return self.refit not in ("none", "loss")

  def pair(self) -> tuple[str, str]:
    """The allotment and the unit score that these settings ask for."""
    allotment, score = PUBLISHED[self.method]
    if score == "magnitude":
      score = self.magnitude.norm
    return self.allotment or allotment, self.group_importance or score


@dataclasses.dataclass
class Vocab(Section):
  """Tokens that stay; cut first, and what it saves counts as pruned."""

  keep_tokens: int = 0  # how many; 0 = all
  ratio: float = 0.0  # or the share of tokens to remove
  # The corpus that the model is for, its rarest tokens go; as
  # calibration.source, which it is if empty.
  source: str = ""

  def asked(self) -> bool:
    """Whether any tokens go."""
    return bool(self.keep_tokens or self.ratio)


@dataclasses.dataclass(kw_only=True)
class Calibration(Section):
  # embedded | text:FILE | jsonl:FILE | parquet:FILE | hf:NAME | tfds:NAME, or
  # self:PROMPTS.jsonl (the dense model's own answers), or several with weights
  # (docs/data.md), or npy:FILE
  source: str = "embedded"
  samples: int = 512  # sequences, fresh ones for each step
  seq_len: int = 64
  batch: int = 32  # sequences at a time
  # Tokens that one program scores, at least a batch, which its memory grows
  # with; 0 = as many as fill half a GB a device, or all (docs/speed.md).
  pass_tokens: int = 0
  refit_samples: int = 512  # sequences of a refit
  # The text that a quality to keep is measured on, or questions:FILE.jsonl, of
  # which accuracy is (docs/budgets.md); empty = other windows of the source.
  tuning: str = ""
  # The least tokens for each input channel of the widest matrix that a
  # curvature's score, or a refit, may have; 0 = any, but few are told.
  tokens_per_channel: float = 0.0


@dataclasses.dataclass
class Data(Section):
  source: str = "embedded"  # as calibration.source, but npy
  seq_len: int = 1024
  batch: int = 32  # sequences a train step
  # Calibration windows, training rows and windows of the evaluation start with
  # the token that the tokenizer puts before a text, if it does; none = without.
  bos: str = "auto"

  @property
  def step_tokens(self) -> int:
    """Tokens of a train step."""
    return self.batch * self.seq_len


@dataclasses.dataclass
class Train(Section):
  tokens: int = 0  # recovery training over all stages; 0 = none
  hours: float = 0.0  # or the time that all of a run takes: it chooses tokens
  learning_rate: float = 2e-5
  min_learning_rate: float = 2e-6
  schedule: str = "wsd"
  data_share: str = "linear"  # share of the tokens that a stage gets
  weight_decay: float = 0.0
  dtype: str = "float32"  # of the arithmetic; what is trained is float32
  attention: str = "auto"  # which implementation; docs/speed.md
  # What the backward pass computes once more: none | dots | attention+mlp |
  # full | offload, or auto = by the device's memory (docs/accelerators.md).
  remat: str = "auto"
  # Compile runs of layers, padded to one size, once: auto = not on a CPU.
  scan_layers: str = "auto"
  accumulation: int = 1  # microbatches a step
  carry_moments: bool = True  # keep Adam's moments of what a prune leaves
  distill_alpha: float = 0.0  # weight of the distillation loss; 0 = none
  distill_temperature: float = 1.0  # what both models' logits are divided by
  lora_rank: int = 0  # 0 = train all weights
  lora_alpha: float = 16.0
  skip_nonfinite: bool = False  # pass over a batch with a non-finite loss
  # Likeliest tokens of the teacher that are kept on disk at each position, once
  # for all stages; 0 = the whole teacher runs beside (docs/accelerators.md).
  teacher_cache: int = 0
  # In which gradients of matrices are summed where dtype is bfloat16.
  gradient_dtype: str = "bfloat16"
  moments: str = "float32"  # Adam's between steps; bfloat16 = half the memory
  # Of the matrices that adapters are trained beside: "" = as model.dtype, or
  # int8, which adds up to half a step of a 127th of an output's largest weight.
  lora_base: str = ""

  def has_teacher_beside(self) -> bool:
    """Whether the dense model runs with each step: not if it is cached."""
    return bool(self.distill_alpha) and not self.teacher_cache


@dataclasses.dataclass
class Mesh(Section):
  data: int = 0  # replicas; 0 = as many as slices of TPUs or nodes of GPUs
  fsdp: int = -1  # -1 = whatever is left, for one of the four
  tensor: int = 1
  slices: int = 0  # 0 = as the devices say
  expert: int = 1  # devices that experts are cut over


@dataclasses.dataclass
class Eval(Section):
  text: str = ""  # a text file for the perplexity, "embedded"; empty = none
  # Prompts whose answers by the dense model the result is compared on, token by
  # token: self (ours), self:PROMPTS.jsonl; empty = none.
  answers: str = ""
  tasks: str = ""  # presets and lm-eval's tasks, comma separated; empty = none
  tasks_dir: str = ""  # jsonl files of the questions; empty = the network
  trust_tasks_dir: bool = False  # the folder's YAML may run its Python
  latency: bool = False  # `run` also times the original and the result
  seq_len: int = 0  # tokens a window; 0 = the model's context, at most 2048
  batch: int = 8


@dataclasses.dataclass
class Checkpoint(Section):
  steps: int = 500  # train steps between checkpoints
  minutes: float = 15.0  # or so long, if that is sooner; 0 = by steps alone
  keep: int = 2  # the newest so many


@dataclasses.dataclass
class Log(Section):
  tensorboard: bool = True
  trackers: str = ""  # wandb, trackio, or both
  profile_steps: str = ""  # train steps to trace, such as 10:13; empty = none


@dataclasses.dataclass
class Config(Section):
  """A run; `dataclasses.asdict` of it is the work directory's config.json."""

  model: Model = dataclasses.field(default_factory=Model)
  vocab: Vocab = dataclasses.field(default_factory=Vocab)
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

  def weight_dtype(self) -> str:
    """Of a run's weights: float32 where they are trained, and in place of
    float16, in which scores of many tokens underflow."""
    trained = self.train.tokens and not self.train.lora_rank
    wide = trained or self.model.dtype == "float16"
    return "float32" if wide else self.model.dtype or "float32"


# Fields that were booleans once, and what these are called now.
OLD_VALUES = {"train.remat": {"True": "full", "False": "none"}}


def today(name: str, value: Any) -> Any:
  """The value of a field by today's name, be it given by an old one."""
  return OLD_VALUES.get(name, {}).get(str(value), value)


# Fields that once had another name. A stored recipe is read with the old names
# too; a command line and a recipe file are told the new one.
OLD_FIELDS = {
  "prune.llm_pruner_steps": "prune.uniform.steps",
  "prune.llm_pruner_ranking": "prune.llm_pruner.ranking",
  "prune.flap_metric": "prune.flap.metric",
  "prune.flap_structure": "prune.flap.structure",
  "prune.slice_multiple": "prune.slicegpt.multiple",
  "prune.slice_subtract_mean": "prune.slicegpt.subtract_mean",
  "prune.magnitude_norm": "prune.magnitude.norm",
  "prune.curvature_step": "prune.ranking.step_size",
  "prune.cap": "prune.ranking.cap",
}
