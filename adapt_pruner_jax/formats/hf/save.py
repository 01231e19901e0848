"""Writes a HuggingFace directory: `save(config, params, path)`.

Tensors go one by one from the devices, or from other files, to the file. The
directory is written under another name, opened again and compared with the
model, and only then gets its name. In a run of many processes all of them call
`save`; process 0 writes.
"""

import contextlib
import os
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.hf import (
  card,
  config_json,
  kinds,
  layers,
  parent_files,
  reopen,
  uniform,
  weights,
)
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.files import CONFIG, MANIFEST
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig, layer_names
from adapt_pruner_jax.storage import json_files, publish
from adapt_pruner_jax.storage.places import to_path

FORMATS = ("hf", "hf_uniform")
# GPT-NeoX makes heads of hidden_size / heads channels, Helium an `o` of D
# inputs.
RESIZE_NEOX = """\
  attention, heads = layer.attention, sizes.num_attention_heads
  size, width = config.head_dim, config.hidden_size
  has_bias = attention.dense.bias is not None
  attention.head_size, attention.scaling = size, size**-0.5
  attention.query_key_value = nn.Linear(width, 3 * heads * size, bias=has_bias)
  attention.dense = nn.Linear(heads * size, width, bias=has_bias)
"""
# OLMoE's norms over all heads are as large as if these filled the hidden size.
RESIZE_OLMOE = """\
  attention, size, eps = layer.self_attn, config.head_dim, config.rms_norm_eps
  attention.q_norm = stock.OlmoeRMSNorm(sizes.num_attention_heads * size, eps)
  attention.k_norm = stock.OlmoeRMSNorm(sizes.num_key_value_heads * size, eps)
"""
RESIZE_HELIUM = """\
  inputs = sizes.num_attention_heads * config.head_dim
  layer.self_attn.o_proj = nn.Linear(inputs, config.hidden_size, bias=False)
"""
# StableLM's attention is made as in the whole model, see `MADE_WITH`.
RESIZE_STABLELM = """\
  attention, size, width = layer.self_attn, config.head_dim, config.hidden_size
  heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
  bias = config.use_qkv_bias
  attention.num_heads, attention.num_key_value_heads = heads, groups
  attention.q_proj = nn.Linear(width, heads * size, bias=bias)
  attention.k_proj = nn.Linear(width, groups * size, bias=bias)
  attention.v_proj = nn.Linear(width, groups * size, bias=bias)
  attention.o_proj = nn.Linear(heads * size, width, bias=False)
"""
RESIZE = {
  "gpt_neox": RESIZE_NEOX,
  "helium": RESIZE_HELIUM,
  "olmoe": RESIZE_OLMOE,
  "stablelm": RESIZE_STABLELM,
}
RESIZE_FUNCTION = """
def resize(layer, sizes, config):
  \"""Puts right what the class makes of the sizes of one layer.\"""
"""
# What a layer is made with, where its class refuses fewer heads.
MADE_WITH = {
  "stablelm": "LayerConfig(sizes, {n: getattr(config, n) for n in HEADS})"
}
# Layers may have a gated delta net instead.
NO_DELTA = """

class NoDelta(nn.Module):
  \"""In place of a gated delta net without heads.\"""

  def forward(self, hidden_states, **others):
    return torch.zeros_like(hidden_states)
"""
COUNT_DELTA = """\
  if config.layer_types[index] == "linear_attention":
    heads = sizes.linear_num_key_heads
"""
TAKE_OUT_DELTA = """\
    if hasattr(layer, "linear_attn"):
      layer.linear_attn = NoDelta()
    else:
  """
# Classes of two kinds of attention ask for the sizes of a kind.
ALIKE = """

@contextlib.contextmanager
def layers_alike(config):
  \"""Layers of a kind are equal, as the class wants them while it is made.\"""
  layers, own = config.per_layer_config, config.to_dict()["per_layer_config"]
  sizes = [{"head_dim": layers[i].head_dim} for i in range(len(layers))]
  config.per_layer_config = dict(enumerate(sizes))
  try:
    yield copy.copy(config)
  finally:
    config.per_layer_config = own
"""
MADE_ALIKE = """\
    with layers_alike(config) as alike:
  """
KEPT_ALIKE = """\
    self.rotary_emb.config = alike
"""
# Of halves that read one norm, either may be there without the other.
DROP_ONE_NORM = """\
  if not heads and not width:
    drop(layer, {})
"""
TAKE_OUT_MLP = """\
layer.{mlp} = NoMlp(layer.{mlp})
    drop(layer, {norms})"""
# An expert that all tokens see goes on without the others.
NO_EXPERTS = """

class NoExperts(nn.Module):
  \"""In place of experts without channels.\"""

  def forward(self, hidden_states, *others):
    return torch.zeros_like(hidden_states)


class NoRouter(nn.Module):
  \"""In place of theirs.\"""

  def forward(self, hidden_states):
    return None, None, None
"""
TAKE_OUT_EXPERTS = "layer.{}, layer.{} = NoExperts(), NoRouter()"
# One class of a family may make layers with experts and without (Gemma 4).
TAKE_OUT_EITHER = """\
if config.enable_moe_block:
      {}
    else:
      {}"""
EITHER_WIDTH = (
  '"moe_intermediate_size" if config.enable_moe_block else "intermediate_size"'
)
MARKS = (CONFIG, MANIFEST)  # by which a directory is one of a model


def save(
  config: ModelConfig,
  params: Params,
  path: str | os.PathLike,
  *,
  source: str | os.PathLike | None = None,
  format: str = "hf",
  overwrite: bool = False,
  shard_bytes: int = 5 * 10**9,
  facts: dict[str, Any] | None = None,
  say: Callable[[str], None] = print,
) -> None:
  """Writes the model to the directory `path`.

  Args:
    config, params: the model; each parameter is written in its dtype (see
      `formats.dtypes`).
    source: the parent's directory: tokenizer, generation config and licence
      come from there.
    format: "hf": layers as they are; where they differ, Transformers opens it
      with `trust_remote_code=True`. "hf_uniform": zero-padded to one size, the
      same function, opens everywhere.
    overwrite: replace the model that is at `path`.
    shard_bytes: a file of weights is at most this large.
    facts: for the model card, as in a run's summary.json.
    say: gets a line of text about what is missing or costs something.

  Raises:
    UserError: `path` exists or cannot be written, or the format cannot express
      the model.
  """
  path, source = to_path(path), Path(source) if source is not None else None
  if format not in FORMATS:
    raise UserError(
      f"format {format} is not one of {', '.join(FORMATS)}"
      f"{nearest(format, FORMATS)}"
    )
  config, params = without_empty_layers(config, params)
  get = weights.getter(params)
  written, written_get, notes = config, get, []
  if format == "hf_uniform":
    written = uniform.pad_config(config)
    written_get = uniform.padded_getter(config, written, get)
    notes = uniform.cost(config, written, (facts or {}).get("params_before"))
  raw = config_json.write(written)
  usual = weights.usual_dtype(config, params)
  raw |= {"torch_dtype": str(usual), "dtype": str(usual)}
  raw |= parent_files.tokenizer_fields(source)
  with directory(path, overwrite) as folder:
    more = agreement.on_writer(
      lambda: _write_around(folder, raw, written, source)
    )
    notes += more or []
    for note in notes if folder is not None else ():
      say(note)
    kinds = weights.tensor_dtypes(written, params, usual)
    given, told = written_get, None
    if jax.process_count() > 1:
      given, told = weights.remembering(written_get, kinds, written)
    sums = weights.write(folder, written, given, kinds, shard_bytes)
    reopen.compare(config, get, written, written_get, kinds, folder, told)
    if folder is not None:
      card.write(folder, config, written, source, facts or {}, notes, sums)


def _write_around(
  folder: Path, raw: dict[str, Any], config: ModelConfig, source: Path | None
) -> list[str]:
  """Writes all but the weights and the card; says what is missing."""
  json_files.write_json(folder / CONFIG, raw, sort_keys=True)
  if not layers.is_stock(config):
    _write_classes(folder, config)
  missing = parent_files.copy_all(source, folder)
  return missing + parent_files.compare_tokenizers(source, folder)


def without_empty_layers(
  config: ModelConfig, params: Params
) -> tuple[ModelConfig, Params]:
  """Leaves out the layers that pass their input on.

  Raises:
    UserError: all of them do.
  """
  full = [i for i in range(config.num_layers) if layer_names(config, i)]
  if len(full) == config.num_layers:
    return config, params
  if not full:
    raise UserError("the model has no layer left: there is nothing to write")
  kept = {n: x for n, x in params.items() if not n.startswith("layer_")}
  for new, old in enumerate(full):
    kept[axes.layer_name(new)] = params[axes.layer_name(old)]
  return config.with_layers(full), kept


@contextlib.contextmanager
def directory(path: Path, overwrite: bool) -> Iterator[Path | None]:
  """A directory that is renamed to `path` at the end; None if not the writer.

  Nothing is left at `path` if anything is raised inside.

  Args:
    overwrite: replace what is there, if it is empty or a model.

  Raises:
    UserError: `path` may not be replaced or cannot be written.
  """
  with contextlib.ExitStack() as stack:

    def begin() -> Path:
      publish.require_free(path, overwrite, MARKS)
      return stack.enter_context(publish.directory(path, replace=overwrite))

    yield agreement.on_writer(begin)
    agreement.all_agree(True)


def _write_classes(folder: Path, config: ModelConfig) -> None:
  """The file by which Transformers opens unequal layers."""
  family = FAMILIES[config.family]
  norms = {
    half: [
      family.tensors[name].removesuffix(".weight")
      for name in (f"{half}_norm", f"{half}_post_norm")
      if name in layer_names(config)
    ]
    for half in ("attn", "mlp")
  }
  attention, o = family.module_of("o").rsplit(".", 1)
  mlp, down = family.module_of("down").rsplit(".", 1)
  no_mlp = TAKE_OUT_MLP.format(mlp=mlp, norms=norms["mlp"])
  width = f'"{family.renamed.get("intermediate_size", "intermediate_size")}"'
  # Of two rows of one type, that with experts: one class makes layers of both.
  name = family.model_type or config.family
  either = next((f for f in FAMILIES.values() if f.model_type == name), None)
  if either:
    lines = (_no_experts(either), no_mlp)
    no_mlp = TAKE_OUT_EITHER.format(*(x.replace("\n", "\n  ") for x in lines))
    width = EITHER_WIDTH
  elif config.experts:
    mlp = family.module_of("router").split(".")[0]
    no_mlp = TAKE_OUT_MLP.format(mlp=mlp, norms=norms["mlp"])
    no_mlp = _no_experts(family) if config.shared_width else no_mlp
  resize = RESIZE.get(config.family)
  names = {
    "module": family.module,
    "prefix": family.prefix,
    "config_class": family.config_class,
    "model_class": family.model_class,
    "body": family.body,
    "layer_class": f"{family.prefix}{family.layer}",
    "made_with": MADE_WITH.get(config.family, "sizes"),
    "resize": "  resize(layer, sizes, config)\n" * bool(resize),
    "resize_function": f"{RESIZE_FUNCTION}{resize}\n" if resize else "",
    "more_heads": "".join(f', "{n}"' for n in kinds.SIZES * family.delta),
    "no_delta": NO_DELTA * family.delta,
    "count_delta": COUNT_DELTA * family.delta,
    "take_out_delta": TAKE_OUT_DELTA * family.delta,
    "more_imports": "import contextlib\nimport copy\n" * family.wide,
    "alike": ALIKE * family.wide,
    "made_alike": MADE_ALIKE * family.wide,
    "kept_alike": KEPT_ALIKE * family.wide,
    "no_experts": NO_EXPERTS * bool(config.shared_width or either),
    "take_out_mlp": no_mlp,
    "attention": attention,
    "o": o,
    "mlp": mlp,
    "down": down,
    # What else an MLP returns, where it is not the only thing.
    "beside": ", None" * (config.family == "gpt_oss"),
    "cut_mlp": "not config.enable_moe_block" if either else not config.experts,
    "width": width,
    "attention_norms": [] if config.has_one_norm() else norms["attn"],
    "mlp_norms": norms["mlp"],
    "no_half": DROP_ONE_NORM.format(norms["attn"]) * config.has_one_norm(),
  }
  heads = [
    _filled("head", **names, task=task, head_class=family.head_class(task))
    for task in family.heads
  ]
  made = _filled("modeling", **names, heads="\n".join(heads))
  file = folder / f"modeling_pruned_{name}.py"
  file.write_text(made, "utf-8")


def _no_experts(family: Family) -> str:
  """The lines that take out experts, their router and their norms."""
  names = family.tensors | family.own
  experts = names["moe_down"].removesuffix(".down_proj")
  router = names["router"].removesuffix(".weight").removesuffix(".proj")
  norms = [
    names[name].removesuffix(".weight")
    for name in ("moe_norm", "moe_post_norm")
    if name in names
  ]
  line = TAKE_OUT_EXPERTS.format(experts, router)
  return line + f"\n    drop(layer, {norms})" * bool(norms)


def _filled(template: str, **names: Any) -> str:
  text = Path(__file__).with_name(f"{template}.py.template").read_text("utf-8")
  return string.Template(text).substitute(names)
