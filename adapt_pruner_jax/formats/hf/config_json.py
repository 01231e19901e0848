"""config.json <-> `ModelConfig`: `read` and `write` are inverses."""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import fields, layers, ropes, windows
from adapt_pruner_jax.formats.hf.families import FAMILIES, REQUIRED, SUPPORTED
from adapt_pruner_jax.formats.hf.fields import FIELDS, Raw, require
from adapt_pruner_jax.models.model_config import ModelConfig

# Began the model_type of an export whose layers differ, before 0.2.
OLD_PRUNED = "pruned_"
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
  raw = {name: found for name, found in raw.items() if name not in ignored}
  name, raw = _family(raw, path)
  family = FAMILIES[name]
  if name == "gemma" and raw.get("hidden_activation") == "gelu_pytorch_tanh":
    raw = {k: v for k, v in raw.items() if k != "hidden_activation"}
  fields.check(raw, {*family.fields, *layers.OWN, "hidden_act"}, path)
  missing = [
    f for f, v in family.fields.items() if v is REQUIRED and f not in raw
  ]
  if missing:
    raise UserError(f"{path}: the field {missing[0]} is missing")
  raw = {**family.fields, **raw}
  if name == "gemma" and raw["hidden_act"] == "gelu":
    raw["hidden_act"] = "gelu_pytorch_tanh"  # what its class means by it
  if "sliding_window" in ignored and "sliding_window" in raw:
    raw["sliding_window"] = None  # absent would be the family's default
  values = {
    FIELDS[f].name: fields.value(raw, f, path)
    for f in family.fields
    if f in FIELDS
  }
  values |= layers.read_sizes(raw, path) | layers.read_biases(raw)
  values |= ropes.read(raw, family, path)
  values["window"] = windows.read(raw, family, len(values["kv_groups"]), path)
  if name.startswith("gemma"):
    values["embed_scale"] = values["hidden_size"] ** 0.5
  return ModelConfig(**{"family": name, **values, **family.fixed})


def repeats(raw: Raw) -> int:
  """How often in a row each stored layer runs (MobileLLM's layer sharing)."""
  shared = raw["model_type"] == "mobilellm" and raw.get("layer_sharing")
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
    "model_type": config.family,
    "architectures": [f"{family.prefix}ForCausalLM"],
    "num_hidden_layers": config.num_layers,
    "head_dim": config.head_dim,
    **layers.write_sizes(config),
  }
  for name in family.fields:
    if name in FIELDS:
      field = FIELDS[name]
      raw[name] = field.write(getattr(config, field.name))
  raw |= layers.write_biases(config) | ropes.write(config, family)
  raw |= windows.write(config, family)
  if not layers.is_stock(config):
    raw |= layers.write_classes(family, config.family)
  if read(raw) != config:
    raise UserError(f"config.json cannot express this model: {config}")
  return raw


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
    raise UserError(
      f"{path}: model_type {kind} is not supported; supported: "
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
    raw = dict(raw, num_hidden_layers=raw.get("num_hidden_layers", 0))
    raw["num_hidden_layers"] *= repeats(raw)
    raw["tie_word_embeddings"] = bool(
      raw.pop("share_embedding", False) or raw.get("tie_word_embeddings")
    )
    raw.pop("layer_sharing", None)
    name = "llama"
  return name, raw
