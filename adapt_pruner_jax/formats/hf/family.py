"""What the row of a family says, see `families`."""

import dataclasses
from typing import Any

from adapt_pruner_jax.formats.hf.tensor_names import LAYER, OUTER

ROPES = (
  *("default", "linear", "dynamic", "llama3", "yarn", "longrope"),
  "proportional",
)


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of the table.

  Attributes:
    module: of Transformers, below `transformers.models`.
    model_type: of its files, if not the row's name.
    prefix: of its classes, as in LlamaForCausalLM; the config class is
      `config_class`, the model without head `model_class`.
    fields: of config.json, with their defaults.
    fixed: fields of `ModelConfig` that hold for all models of the family.
    tensors: names as in `LAYER`.
    own: names in files that classes of our own read, where those are others.
    outer: names of the tensors outside the layers.
    layer: what the name of its layer's class ends with.
    body: of the model without head, in the class with one.
    by_head: parameters that share a tensor head by head, not one below the
      other.
    renamed: what it calls some fields, by what all others call them.
    must: fields that have to have this value; other values are not supported.
    passed: fields that count only in parts which `must` leaves no room for.
    anyway: fields that its class does not read, with values that it goes by.
    written: values of such fields that its config class has to see.
    windows: which layers have a sliding window: "" none, "all", "each" (all
      that layer_types does not except), "last" (from max_window_layers on),
      "pattern" (all but every n-th), "nope" (those without rotary embeddings),
      "kinds" (none, but each layer has a kind).
    period: n of the pattern.
    divides: Transformers insists that the heads divide the hidden size.
    ropes: kinds of rotary embedding that its config class lets pass.
    rope: fields of the rotary embedding where a file says nothing of it.
    rope_aliases: what it calls some kinds.
    local_rope: layers with a window have a rotary embedding of their own.
    interleaved: rotary pairs lie side by side in its files.
    query_growth: queries grow with their position, as its rope says.
    nope: which layers have no rotary embeddings: "" none, "list" (those with a
      0 in no_rope_layers), "switch" (all, by position_embedding_type), "global"
      (those without a window), "full" (the same if the file has any window).
    bias_of_o: `attention_bias` is one of `o` too.
    rope_alpha: a dynamic rope may have an alpha, which stretches theta.
    delta: layers may have a gated delta net in place of attention.
    wide: layers without a window have heads of another size.
    turned: matrices of experts lie the other way round in its files.
    text: "Text" in the names of classes (Gemma 3).
    unread: tensors that its class passes over where files have them; a `*`
      stands for anything.
    heads: tasks for which Transformers has a class besides the language model.
  """

  module: str
  prefix: str
  fields: dict[str, Any]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  model_type: str = ""
  tensors: dict[str, str] = dataclasses.field(default_factory=lambda: LAYER)
  own: dict[str, str] = dataclasses.field(default_factory=dict)
  outer: dict[str, str] = dataclasses.field(default_factory=lambda: OUTER)
  body: str = "model"
  layer: str = "DecoderLayer"
  by_head: tuple[str, ...] = ()
  renamed: dict[str, str] = dataclasses.field(default_factory=dict)
  must: dict[str, Any] = dataclasses.field(default_factory=dict)
  passed: tuple[str, ...] = ()
  anyway: dict[str, Any] = dataclasses.field(default_factory=dict)
  written: dict[str, Any] = dataclasses.field(default_factory=dict)
  windows: str = ""
  period: int = 2
  divides: bool = False
  ropes: tuple[str, ...] = ROPES
  rope: dict[str, Any] = dataclasses.field(default_factory=dict)
  rope_aliases: dict[str, str] = dataclasses.field(default_factory=dict)
  local_rope: bool = False
  query_growth: bool = False
  interleaved: bool = False
  nope: str = ""
  delta: bool = False
  wide: bool = False
  bias_of_o: bool = True
  rope_alpha: bool = False
  turned: bool = False
  text: str = ""
  unread: tuple[str, ...] = ()
  heads: tuple[str, ...] = ("SequenceClassification", "TokenClassification")

  @property
  def config_class(self) -> str:
    return f"{self.prefix}{self.text}Config"

  @property
  def model_class(self) -> str:
    return f"{self.prefix}{self.text}Model"

  def head_class(self, task: str) -> str:
    return f"{self.prefix}{self.text}For{task}"

  def module_of(self, name: str) -> str:
    """Below a layer, the module of our parameter `name`."""
    return self.tensors[name].removesuffix(".weight")
