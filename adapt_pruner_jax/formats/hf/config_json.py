"""config.json <-> `ModelConfig`: `read` and `write` are inverses."""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import (
  carried,
  fields,
  fp8,
  kinds,
  layers,
  mxfp4,
  ropes,
  text_part,
  windows,
)
from adapt_pruner_jax.formats.hf.defaults import REQUIRED
from adapt_pruner_jax.formats.hf.families import FAMILIES, SUPPORTED
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import FIELDS, Raw, require
from adapt_pruner_jax.formats.hf.files import quant_method
from adapt_pruner_jax.models.model_config import ModelConfig

# Began the model_type of an export whose layers differ, before 0.2.
OLD_PRUNED = "pruned_"
# Known in all families: the last counts in some kinds of rope only.
ALWAYS = ("hidden_act", "layer_types", ropes.ORIGINAL)
INTERNLM = {  # defaults that are not LLaMA's
  "num_key_value_heads": 2,
  "head_dim": 128,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-5,
  "pad_token_id": 2,
}
UNWRAP = (
  'python -c "import transformers as t; '
  "m = t.AutoModelForImageTextToText.from_pretrained('MODEL', dtype='auto'); "
  "x = t.AutoModelForCausalLM.from_config(m.config.text_config); "
  "x.model, x.lm_head = m.model.language_model, m.lm_head; "
  "x.to(m.dtype).save_pretrained('TEXT')\""
)


def read(
  raw: Raw, ignore_fields: str = "", path: str = "config.json"
) -> ModelConfig:
  """The `ModelConfig` of a parsed config.json.

  Args:
    ignore_fields: fields to act as if they were absent, separated by commas.
    path: for error messages.

  Raises:
    UserError: not a causal LM, an unsupported family, or a field that changes
      the function and is not supported.
  """
  ignored = {name.strip() for name in ignore_fields.split(",")}
  raw = text_part.config_of(raw, path)
  raw = {name: found for name, found in raw.items() if name not in ignored}
  method = quant_method(raw.get("quantization_config"))
  if method in (fp8.METHOD, mxfp4.METHOD):
    del raw["quantization_config"]  # weights are dequantised on the way in
  name, raw = _family(raw, path)
  family = FAMILIES[name]
  if name == "gemma" and raw.get("hidden_activation") == "gelu_pytorch_tanh":
    raw = {k: v for k, v in raw.items() if k != "hidden_activation"}
  raw = _usual_names(raw, family)
  if raw.get("mlp_only_layers", ...) is None:
    raw["mlp_only_layers"] = []
  known = {*family.fields, *family.passed, *layers.OWN, *ALWAYS}
  fields.check(raw, known, family.anyway, path)
  missing = [
    f for f, v in family.fields.items() if v is REQUIRED and f not in raw
  ]
  if missing:
    name = family.renamed.get(missing[0], missing[0])
    raise UserError(f"{path}: the field {name} is missing")
  raw = {**family.fields, **raw}
  for field, only in family.must.items():
    if raw[field] != only:
      raise UserError(
        f"{path}: {field}={raw[field]} is not supported in {name}; "
        f"{field}={only} is"
      )
  if name == "gemma" and raw["hidden_act"] == "gelu":
    raw["hidden_act"] = "gelu_pytorch_tanh"  # what its class means by it
  if "sliding_window" in ignored and "sliding_window" in raw:
    raw["sliding_window"] = None  # absent would be the family's default
  raw = kinds.with_wide(layers.with_sizes(raw, path), family, path)
  values = {
    FIELDS[f].name: fields.value(raw, f, path)
    for f in family.fields
    if f in FIELDS
  }
  if values["activation"] == "xielu" and "xielu_eps" not in family.tensors:
    raise UserError(f"{path}: {name} models have no activation xielu")
  layers.check_biases(raw, family, path)
  values |= layers.read_sizes(raw, family, path)
  values |= carried.read(raw, family, values, path)
  values |= layers.read_biases(raw, family)
  layers.check_experts(values, path)
  size, wide = values["head_dim"], values["wide_heads"]
  values |= ropes.read(raw, family, size, path, wide and wide.head_dim)
  L = len(values["kv_groups"])
  values["nope"] = ropes.read_nope(raw, family, L, path)
  window = values["window"] = windows.read(raw, family, values["nope"], L, path)
  if (still := ropes.nope_of_full(raw, family, window, L)) is not None:
    values["nope"] = still
  if name.startswith("gemma"):
    values["embed_scale"] = values["hidden_size"] ** 0.5
  return ModelConfig(**{"family": name, **values, **family.fixed})


def repeats(raw: Raw) -> int:
  """How often in a row each stored layer runs (MobileLLM's layer sharing)."""
  shared = raw.get("model_type") == "mobilellm" and raw.get("layer_sharing")
  return 2 if shared else 1


def write(config: ModelConfig) -> dict[str, Any]:
  """config.json of the model, without dtype and versions.

  Rope fields are written in the spelling of Transformers 4 and of 5: each
  version silently passes over the other's.

  Raises:
    UserError: an HF directory cannot express the model.
  """
  family = FAMILIES[config.family]
  if config.residual:
    raise UserError(
      "a model cut by SliceGPT has layers of unequal residual width, which "
      "Transformers cannot express: write it with --format=orbax"
    )
  raw = {
    "model_type": family.model_type or config.family,
    "architectures": [f"{family.prefix}ForCausalLM"],
    "num_hidden_layers": config.num_layers,
    "head_dim": config.head_dim,
    **layers.write_sizes(config),
  }
  for name in family.fields:
    if name in FIELDS:
      field = FIELDS[name]
      raw[name] = field.write(getattr(config, field.name))
      own = family.fields[name]  # of several names of an activation
      if field is fields.ACTIVATION and field.read(own) == config.activation:
        raw[name] = own
  raw |= layers.write_biases(config) | ropes.write(config, family)
  raw |= windows.write(config, family) | ropes.write_nope(config, family)
  raw |= kinds.write(config, family) | carried.write(config, family)
  raw |= family.must | family.written
  for usual, own in family.renamed.items():
    raw[own] = raw.pop(usual)
  if not layers.is_stock(config):
    raw |= layers.write_classes(family, config.family)
  if read(raw) != config:
    raise UserError(f"config.json cannot express this model: {config}")
  return raw


def _usual_names(raw: Raw, family: Family) -> Raw:
  """The fields under the names that most families have for them."""
  own = {theirs: usual for usual, theirs in family.renamed.items()}
  if "num_experts" in family.fields:  # one name or the other, by version
    own["num_local_experts"] = "num_experts"
  unread = {*family.renamed} - {*own}  # the family's class passes over these
  return {own.get(f, f): v for f, v in raw.items() if f not in unread}


def _family(raw: Raw, path: str) -> tuple[str, Raw]:
  """The row of `FAMILIES`, and the fields in its terms."""
  kind = raw.get("model_type")
  name = str(kind).removeprefix(OLD_PRUNED)
  if name not in SUPPORTED:
    text = raw.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if inner in SUPPORTED:
      raise UserError(
        f"{path}: a model of type {kind} holds a language model of type "
        f"{inner} among other parts; save that by itself, and its tokenizer "
        f"beside it: {UNWRAP}"
      )
    found = [raw.get(f) for f in ("layer_types", "layers_block_type")]
    found = {
      str(k) for kinds in found if isinstance(kinds, list) for k in kinds
    }
    others = sorted(found - {fields.FULL, fields.SLIDING})
    having = f", with layers {', '.join(others)}," * bool(others)
    raise UserError(
      f"{path}: model_type {kind}{having} is not supported; supported: "
      f"{', '.join(SUPPORTED)}"
    )
  made_for = raw.get("architectures") or ["ForCausalLM"]
  require(made_for, (list,), "architectures", path)
  if not any(str(a).endswith("ForCausalLM") for a in made_for):
    raise UserError(
      f"{path}: {made_for[0]} is not a causal language model; one is needed, "
      "such as LlamaForCausalLM"
    )
  if name == "mobilellm":
    layers = raw.get("num_hidden_layers")
    require(layers, (int,), "num_hidden_layers", path)
    raw = dict(raw, num_hidden_layers=layers * repeats(raw))
    raw["tie_word_embeddings"] = bool(
      raw.pop("share_embedding", False) or raw.get("tie_word_embeddings")
    )
    raw.pop("layer_sharing", None)
    name = "llama"
  if name == "gemma4_text" and raw.get("enable_moe_block"):
    name = "gemma4_moe_text"
  if name == "internlm3":
    name, raw = "llama", _of_internlm(raw, path)
  return name, raw


def _of_internlm(raw: Raw, path: str) -> Raw:
  """InternLM 3's fields as LLaMA's, whose implementation it has."""
  raw = {**INTERNLM, **raw}
  own = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}
  raw = {own.get(name, name): found for name, found in raw.items()}
  one, two = (bool(raw.get(name)) for name in own.values())
  if one != two:
    raise UserError(
      f"{path}: qkv_bias={one} and bias={two} must be alike in internlm3"
    )
  return raw
