"""config.json <-> `ModelConfig`: `read` and `write` are inverses."""

from typing import Any

from adapt_pruner_jax.errors import UserError, nearest
from adapt_pruner_jax.formats.hf import fields
from adapt_pruner_jax.formats.hf.families import (
  FAMILIES,
  REQUIRED,
  SUPPORTED,
  Family,
)
from adapt_pruner_jax.formats.hf.fields import (
  FIELDS,
  NONE,
  NUMBER,
  Raw,
  require,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope

PRUNED = "pruned_"  # begins the model_type of an export whose layers differ
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# Fields of such an export: sizes by layer, and the modules below a layer that
# have a bias that the family's class has not.
OWN = ("per_layer_config", "extra_biases")
EXTRA_BIASES = {"self_attn.o_proj": "o_bias", "mlp.down_proj": "down_bias"}
# Larger ones are damage, and would fill the memory before it shows.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1
FULL, SLIDING = "full_attention", "sliding_attention"


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
  fields.check(raw, {*family.fields, *OWN, "hidden_act"}, path)
  missing = [
    f for f, v in family.fields.items() if v is REQUIRED and f not in raw
  ]
  if missing:
    raise UserError(f"{path}: the field {missing[0]} is missing")
  raw = {**family.fields, **raw}
  if "sliding_window" in ignored and "sliding_window" in raw:
    raw["sliding_window"] = None  # absent would be the family's default
  values = {
    FIELDS[f].name: fields.value(raw, f, path)
    for f in family.fields
    if f in FIELDS
  }
  values |= _read_sizes(raw, path) | _read_biases(raw)
  values |= _read_ropes(raw, path)
  values["window"] = _read_windows(raw, family, len(values["kv_groups"]), path)
  if name.startswith("gemma"):
    values["embed_scale"] = values["hidden_size"] ** 0.5
  return ModelConfig(**{"family": name, **values, **family.fixed})


def repeats(raw: Raw) -> int:
  """How often in a row each stored layer runs (MobileLLM's layer sharing)."""
  shared = raw["model_type"] == "mobilellm" and raw.get("layer_sharing")
  return 2 if shared else 1


def is_stock(config: ModelConfig) -> bool:
  """Whether the family's class in Transformers can hold the model."""
  even = len({*config.kv_groups}) == len({*config.ffn_widths}) == 1
  if (
    not even
    or not config.kv_groups[0]
    or not config.ffn_widths[0]
    or extra_biases(config)
  ):
    return False
  heads = config.kv_groups[0] * config.queries_per_group
  return not FAMILIES[config.family].divides or config.hidden_size % heads == 0


def extra_biases(config: ModelConfig) -> list[str]:
  """Modules below a layer with a bias that the family's class has not."""
  stock = _read_biases(_write_biases(config))
  return [
    module
    for module, name in EXTRA_BIASES.items()
    if getattr(config, name) and not stock[name]
  ]


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
  stock = is_stock(config)
  raw = {
    "model_type": config.family if stock else PRUNED + config.family,
    "architectures": [f"{family.prefix}ForCausalLM"],
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": max(config.kv_groups) * config.queries_per_group,
    "num_key_value_heads": max(config.kv_groups),
    "intermediate_size": max(config.ffn_widths),
    "head_dim": config.head_dim,
  }
  for name in family.fields:
    if name in FIELDS:
      field = FIELDS[name]
      raw[name] = field.write(getattr(config, field.name))
  raw |= _write_biases(config) | _write_ropes(config, family)
  raw |= _write_windows(config, family)
  if not stock:
    raw |= _write_pruned(config, family)
  if read(raw) != config:
    raise UserError(f"config.json cannot express this model: {config}")
  return raw


def _family(raw: Raw, path: str) -> tuple[str, Raw]:
  """The row of `FAMILIES`, and the fields in its terms."""
  kind = raw.get("model_type")
  name = str(kind).removeprefix(PRUNED)
  if name not in SUPPORTED:
    raise UserError(
      f"{path}: model_type {kind} is not supported{nearest(name, SUPPORTED)}; "
      f"supported: {', '.join(SUPPORTED)}"
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


def _read_sizes(raw: Raw, path: str) -> dict[str, Any]:
  """K, F, G and H, of which the first two differ by layer."""
  raw = dict(raw)
  if raw["num_key_value_heads"] is None:
    raw["num_key_value_heads"] = raw["num_attention_heads"]
  for name in ("num_hidden_layers", "hidden_size", *SIZES):
    require(raw[name], (int,), name, path)
    largest = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
    if not 1 <= raw[name] <= largest:
      raise UserError(
        f"{path}: {name}={raw[name]} must be from 1 to {largest:,}"
      )
  layers = [{n: raw[n] for n in SIZES} for _ in range(raw["num_hidden_layers"])]
  for key, sizes in _mapping(raw, "per_layer_config", path).items():
    if not str(key).isdecimal() or int(key) >= len(layers):
      raise UserError(f"{path}: per_layer_config has no layer {key}")
    require(sizes, (dict,), f"per_layer_config.{key}", path)
    for name, size in sizes.items():
      if name not in SIZES:
        raise UserError(
          f"{path}: per_layer_config.{key}.{name} is not supported; "
          f"{', '.join(SIZES)} are"
        )
      require(size, (int,), f"per_layer_config.{key}.{name}", path)
    layers[int(key)] |= sizes
  heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
  for i, layer in enumerate(layers):
    if (
      layer["num_attention_heads"] * groups
      != (layer["num_key_value_heads"] * heads)
      or heads % groups
    ):
      raise UserError(
        f"{path}: layer {i} has {layer['num_attention_heads']} heads on "
        f"{layer['num_key_value_heads']} key/value heads; each key/value head "
        "must serve the same number of heads, in all layers"
      )
  head_dim = raw["head_dim"]
  if head_dim is None:
    head_dim = raw["hidden_size"] // heads
  require(head_dim, (int,), "head_dim", path)
  if not 1 <= head_dim <= MAX_SIZE:
    raise UserError(f"{path}: head_dim={head_dim} must be at least 1")
  return {
    "kv_groups": tuple(layer["num_key_value_heads"] for layer in layers),
    "ffn_widths": tuple(layer["intermediate_size"] for layer in layers),
    "queries_per_group": heads // groups,
    "head_dim": head_dim,
  }


def _write_pruned(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Sizes by layer, and where the classes are that read them."""
  digits = len(str(config.num_layers - 1))  # so that the keys sort
  sizes = {
    str(i).zfill(digits): dict(
      zip(SIZES, (K * config.queries_per_group, K, F), strict=True)
    )
    for i, (K, F) in enumerate(
      zip(config.kv_groups, config.ffn_widths, strict=True)
    )
  }
  kind = PRUNED + config.family
  return {
    "per_layer_config": sizes,
    "extra_biases": extra_biases(config),
    "architectures": [f"Pruned{family.prefix}ForCausalLM"],
    "auto_map": {
      "AutoConfig": f"configuration_{kind}.Pruned{family.config_class}",
      "AutoModel": f"modeling_{kind}.Pruned{family.model_class}",
      "AutoModelForCausalLM": (
        f"modeling_{kind}.Pruned{family.prefix}ForCausalLM"
      ),
    },
  }


def _read_biases(raw: Raw) -> dict[str, bool]:
  attention = bool(raw.get("attention_bias"))
  mlp = bool(raw.get("mlp_bias"))
  extra = raw.get("extra_biases") or ()
  return {
    "qkv_bias": attention,
    "o_bias": attention or "self_attn.o_proj" in extra,
    "gate_up_bias": mlp,
    "down_bias": mlp or "mlp.down_proj" in extra,
  }


def _write_biases(config: ModelConfig) -> dict[str, bool]:
  known = FAMILIES[config.family].fields
  biases = {
    "attention_bias": config.qkv_bias,
    "mlp_bias": config.gate_up_bias,
  }
  return {name: on for name, on in biases.items() if name in known}


def _read_ropes(raw: Raw, path: str) -> dict[str, Rope | None]:
  """`rope` and `local_rope`; Transformers lets rope_scaling win."""
  theta, context = raw["rope_theta"], raw["max_position_embeddings"]
  share = raw.get("partial_rotary_factor", 1.0)
  new = _mapping(raw, "rope_parameters", path)
  old = _mapping(raw, "rope_scaling", path)
  if "rope_local_base_freq" not in raw:
    rope = _rope(old or new, theta, share, context, path)
    return {"rope": rope, "local_rope": None}
  local = _mapping(new, SLIDING, path)
  full = {**_mapping(new, FULL, path), **old}
  for name in new:
    if name not in (FULL, SLIDING):
      raise UserError(
        f"{path}: rope_parameters.{name} is not supported; {FULL} and "
        f"{SLIDING} are"
      )
  return {
    "rope": _rope(full, theta, share, context, path),
    "local_rope": _rope(
      local, raw["rope_local_base_freq"], share, context, path
    ),
  }


def _mapping(raw: Raw, name: str, path: str) -> dict[str, Any]:
  """A field that is an object, or is absent or null."""
  found = raw.get(name)
  if found is None:
    return {}
  require(found, (dict,), name, path)
  return found


def _rope(
  raw: Raw, theta: float, share: float, context: int, path: str
) -> Rope:
  """One rotary embedding; `theta` and `share` if it does not say itself."""
  kind = raw.get("rope_type", raw.get("type", "default"))
  if kind not in ("default", "linear", "llama3"):
    raise UserError(
      f"{path}: rope type {kind} is not supported; default, linear and llama3 "
      "are"
    )
  names = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
    "rope_theta": "theta",
    "partial_rotary_factor": "partial",
  }
  for name, found in raw.items():
    if name not in (*names, "rope_type", "type") and found is not None:
      raise UserError(f"{path}: the rope field {name} is not supported")
  needed = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
  }[kind]
  raw = {"rope_theta": theta, "partial_rotary_factor": share, **raw}
  used = (*needed, "rope_theta", "partial_rotary_factor")
  for name in used:
    if name not in raw:
      raise UserError(f"{path}: rope type {kind} needs the field {name}")
    require(raw[name], NUMBER, name, path)
  values = {names[name]: float(raw[name]) for name in used}
  if kind == "llama3":
    original = raw.get("original_max_position_embeddings", context)
    require(original, NUMBER, "original_max_position_embeddings", path)
    values["original_context"] = original
  return Rope(kind=kind, **values)


def _write_ropes(config: ModelConfig, family: Family) -> dict[str, Any]:
  rope, local = config.rope, config.local_rope
  new = _rope_parameters(rope)
  old = {n: v for n, v in new.items() if n != "rope_theta"}
  raw = {
    "rope_theta": fields.tidy(rope.theta),
    "rope_scaling": None if old == {"rope_type": "default"} else old,
    "rope_parameters": new,
  }
  if "partial_rotary_factor" in family.fields:
    raw["partial_rotary_factor"] = rope.partial
    raw["original_max_position_embeddings"] = config.context
  if local is not None:
    raw["rope_parameters"] = {FULL: new, SLIDING: _rope_parameters(local)}
    raw["rope_local_base_freq"] = fields.tidy(local.theta)
  return raw


def _rope_parameters(rope: Rope) -> dict[str, Any]:
  raw: dict[str, Any] = {
    "rope_type": rope.kind,
    "rope_theta": fields.tidy(rope.theta),
  }
  if rope.kind != "default":
    raw["factor"] = rope.factor
  if rope.kind == "llama3":
    raw["low_freq_factor"] = rope.low_freq_factor
    raw["high_freq_factor"] = rope.high_freq_factor
    raw["original_max_position_embeddings"] = rope.original_context
  if rope.partial != 1:
    raw["partial_rotary_factor"] = rope.partial
  return raw


def _read_windows(
  raw: Raw, family: Family, L: int, path: str
) -> tuple[int, ...]:
  """Keys that each layer sees; () if all layers see all."""
  if not family.windows:
    return ()
  size = raw["sliding_window"]
  require(size, (int, NONE), "sliding_window", path)
  if not raw.get("use_sliding_window", True):
    size = None
  if family.windows == "all":
    slides = [True] * L
  elif raw["layer_types"] is not None:
    slides = _slides(raw["layer_types"], L, path)
  elif family.windows == "last":
    slides = [i >= raw["max_window_layers"] for i in range(L)]
  else:
    period = raw.get("_sliding_window_pattern") or raw.get(
      "sliding_window_pattern", 2
    )
    slides = [bool((i + 1) % period) for i in range(L)]
  if family.windows == "pattern" and any(slides) and not size:
    raise UserError(f"{path}: sliding_window={size} must be at least 1")
  windows = tuple((size or 0) * slide for slide in slides)
  return windows if any(windows) else ()


def _slides(types: Any, L: int, path: str) -> list[bool]:
  good = isinstance(types, list) and set(types) <= {FULL, SLIDING}
  if not good or len(types) < L:
    raise UserError(
      f"{path}: layer_types must name {L} layers, each {FULL} or {SLIDING}"
    )
  return [kind == SLIDING for kind in types[:L]]


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
  if not family.windows:
    return {}
  windows = config.window or (0,) * config.num_layers
  size = max(windows) or None
  if family.windows == "all":
    return {"sliding_window": size}
  raw: dict[str, Any] = {
    "layer_types": [SLIDING if window else FULL for window in windows],
    "sliding_window": size,
  }
  if family.windows == "last":
    first = next((i for i, w in enumerate(windows) if w), config.num_layers)
    raw |= {"use_sliding_window": bool(size), "max_window_layers": first}
  elif not size:  # Transformers wants a number even if no layer uses it
    raw["sliding_window"] = family.fields["sliding_window"]
  return raw
