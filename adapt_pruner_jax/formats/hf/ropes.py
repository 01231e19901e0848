"""Rotary embeddings in config.json, in the spelling of Transformers 4 and 5."""

from typing import Any

from absl import logging

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import fields
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import (
  FULL,
  NUMBER,
  SLIDING,
  Raw,
  mapping,
  require,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope, rotated_channels

ORIGINAL = "original_max_position_embeddings"
# What Transformers calls the numbers of a rope, and what we do.
NAMES = {
  "rope_theta": "theta",
  "partial_rotary_factor": "partial",
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  ORIGINAL: "original_context",
  "attention_factor": "attention_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "mscale": "mscale",
  "mscale_all_dim": "mscale_all_dim",
  "truncate": "truncate",
  "short_factor": "short",
  "long_factor": "long",
  "llama_4_scaling_beta": "query_growth",
}
# Of each kind, fields that it needs and others that it has.
KINDS = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ()),
  "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
  "yarn": (
    (),
    (
      *("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
      *("mscale", "mscale_all_dim", "truncate"),
    ),
  ),
  "longrope": (
    ("short_factor", "long_factor"),
    ("factor", ORIGINAL, "attention_factor"),
  ),
  "proportional": ((), ("factor", "partial_rotary_factor")),
}
# Kinds whose original context is a field, by default the model's context.
STRETCHED = ("llama3", "yarn", "longrope")
# No class reads these there; or not of text, whose axes are alike (mrope).
PASSED = ("attn_factor", "mrope_section", "mrope_interleaved", "finetuned")
PASSED += ("max_position_embeddings",)
# Left over from other kinds without harm.
ANYWHERE = ("rope_type", "type", *list(NAMES)[:6])


def read(
  raw: Raw,
  family: Family,
  head_dim: int,
  path: str,
  wide_dim: int | None = None,
) -> dict[str, Rope | None]:
  """`rope` and `local_rope`; as in Transformers, rope_scaling wins.

  Args:
    head_dim: H.
    wide_dim: of layers with heads of another size, which turn by `rope`.

  Raises:
    UserError: a kind of rope that is not supported, or not in this family.
  """
  theta = {"rope_theta": raw["rope_theta"]}
  new = mapping(raw, "rope_parameters", path)
  if family.local_rope:
    new = new or family.rope
  old = mapping(raw, "rope_scaling", path)
  share = {}
  if "partial_rotary_factor" in family.fields:
    share = {"partial_rotary_factor": raw["partial_rotary_factor"]}
  args = raw, family, head_dim, path
  if not family.local_rope:
    original = {ORIGINAL: raw[ORIGINAL]} if raw.get(ORIGINAL) else {}
    found = (old or new or family.rope) | original
    if family.rope_alpha:
      found = _stretched({**theta, **found}, head_dim, path)
    return {"rope": _rope({**theta, **share, **found}, *args)}
  for name in new:
    if name not in (FULL, SLIDING):
      raise UserError(
        f"{path}: rope_parameters.{name} is not supported; {FULL} and "
        f"{SLIDING} are"
      )
  full = {**theta, **mapping(new, FULL, path), **old}
  # OLMo 3's class takes the given theta for the full layers alone.
  local = {"rope_theta": family.fields["rope_theta"]}
  if "rope_local_base_freq" in raw:
    local = {"rope_theta": raw["rope_local_base_freq"]}
  local |= mapping(new, SLIDING, path)
  if FULL in family.rope:  # its class reads `rope_parameters` alone
    full, local = mapping(new, FULL, path), mapping(new, SLIDING, path)
  # Where there are two ropes, `truncate` is looked for beside them.
  full, local = ({**rope, "truncate": None} for rope in (full, local))
  wide = raw, family, wide_dim or head_dim, path
  return {"rope": _rope(full, *wide), "local_rope": _rope(local, *args)}


def _stretched(rope: dict[str, Any], head_dim: int, path: str) -> Raw:
  """A dynamic rope with an alpha (Hunyuan) as a default one of larger theta.

  Its other fields are not read then, as in Transformers.
  """
  alpha = rope.get("alpha")
  kind = rope.get("rope_type", rope.get("type"))
  if not alpha or kind != "dynamic":
    return {name: found for name, found in rope.items() if name != "alpha"}
  require(alpha, NUMBER, "alpha", path)
  theta = rope["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
  return {"rope_type": "default", "rope_theta": theta}


def _rope(
  rope: Raw, raw: Raw, family: Family, head_dim: int, path: str
) -> Rope:
  """One rotary embedding, of the fields `rope` of the config `raw`."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  require(kind, (str,), "rope_type", path)
  kind = family.rope_aliases.get(kind, kind)
  if kind not in family.ropes:
    raise UserError(
      f"{path}: rope type {kind} is not supported in {family.module}; "
      f"{' and '.join(family.ropes)} {'are' if family.ropes[1:] else 'is'}"
    )
  needed, others = KINDS[kind]
  others += ("llama_4_scaling_beta",) * family.query_growth
  _check(rope, kind, {*needed, *others}, path)
  share = rope.get("partial_rotary_factor")
  if "partial_rotary_factor" in family.fields:
    needed += ("partial_rotary_factor",)
  elif kind not in ("default", "proportional") and share not in (None, 1):
    # In a default rope, classes of such families pass over it: so do we.
    raise UserError(
      f"{path}: partial_rotary_factor={share} with a rope of type {kind} is "
      f"more than {family.module} models can compute"
    )
  values: dict[str, Any] = {}
  for name in (*needed, "rope_theta", *others):
    found = rope.get(name)
    if found is None and name in others:
      continue
    if name not in rope:
      raise UserError(f"{path}: rope type {kind} needs the field {name}")
    values[NAMES[name]] = _number(found, name, path)
  context = raw["max_position_embeddings"]
  if kind == "dynamic" or kind in STRETCHED:
    values.setdefault("original_context", context)
  if kind in ("yarn", "longrope") and "factor" not in values:
    require(context, NUMBER, "max_position_embeddings", path)
    values["factor"] = context / values["original_context"]
  made = Rope(kind=kind, **values)
  _check_numbers(made, head_dim, path)
  return made


def _check(rope: Raw, kind: str, known: set[str], path: str) -> None:
  """Refuses fields that another kind has, or none."""
  for name, found in rope.items():
    if name in known or name in ANYWHERE or found is None:
      continue
    if name not in PASSED:
      raise UserError(
        f"{path}: the rope field {name} is not supported in a rope of type "
        f"{kind}"
      )
    if name == "attn_factor":
      logging.log_first_n(
        logging.WARNING,
        "%s: the rope field attn_factor=%s is passed over, as Transformers "
        "does; attention_factor would be read",
        *(1, path, found),
      )


def _number(found: Any, name: str, path: str) -> Any:
  """The value of a field in `Rope`'s type."""
  if name == "truncate":
    require(found, (bool,), name, path)
    return found
  if name in ("short_factor", "long_factor"):
    require(found, (list,), name, path)
    for number in found:
      require(number, NUMBER, f"a number of {name}", path)
    return tuple(map(float, found))
  require(found, NUMBER, name, path)
  return found if name == ORIGINAL else float(found)


def _check_numbers(rope: Rope, head_dim: int, path: str) -> None:
  """Raises a UserError for numbers that nothing can be computed with."""
  rotated = rotated_channels(rope, head_dim)
  if not 0 < rotated <= head_dim or rotated % 2:
    raise UserError(
      f"{path}: rotary embeddings of {rotated} of a head's {head_dim} channels "
      "are not supported; an even number from 2 on is"
    )
  for name in ("short", "long") * (rope.kind == "longrope"):
    found = getattr(rope, name)
    if len(found) != rotated // 2 or 0 in found:
      raise UserError(
        f"{path}: {name}_factor has {len(found)} numbers; {rotated // 2} are "
        "needed, none of them 0"
      )
  stretched = rope.kind == "dynamic" or rope.kind in STRETCHED
  good = rope.factor > 0 and rope.theta > 0
  good &= not stretched or rope.original_context > 0
  good &= rope.kind != "dynamic" or rotated > 2
  if rope.kind == "llama3":
    good &= rope.low_freq_factor != rope.high_freq_factor
  if rope.kind == "yarn":
    good &= rope.theta > 1 and min(rope.beta_fast, rope.beta_slow) > 0
  if rope.kind == "longrope" and rope.factor > 1:
    good &= rope.original_context > 1
  if not good:
    raise UserError(f"{path}: a rope of these numbers makes no sense: {rope}")


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The fields in both spellings; each version passes over the other's."""
  rope, local = config.rope, config.local_rope
  new = _rope_parameters(rope, config.context)
  # Fields of their own, at the top.
  beside = {"rope_theta", "partial_rotary_factor"} & {*family.fields}
  old = {n: v for n, v in new.items() if n not in beside}
  if family.query_growth:
    old["llama_4_scaling_beta"] = rope.query_growth
    new["llama_4_scaling_beta"] = rope.query_growth
  raw: dict[str, Any] = {"rope_theta": fields.tidy(rope.theta)}
  if ORIGINAL in family.fields:
    stretched = rope.kind in STRETCHED
    raw[ORIGINAL] = rope.original_context if stretched else config.context
    # Version 4 wants these three fields of Phi 3 and no others.
    if {*old} == {"rope_type", ORIGINAL, "short_factor", "long_factor"}:
      old = {"type": old["rope_type"], **old}
      del old["rope_type"], old[ORIGINAL]
  raw["rope_scaling"] = None if old == {"rope_type": "default"} else old
  raw["rope_parameters"] = new
  if "partial_rotary_factor" in family.fields:
    raw["partial_rotary_factor"] = rope.partial
  if local is not None:
    both = {FULL: new, SLIDING: _rope_parameters(local, config.context)}
    raw["rope_parameters"] = both
    if FULL in family.rope:
      return {"rope_parameters": both}
    if "rope_local_base_freq" in family.fields:
      raw["rope_local_base_freq"] = fields.tidy(local.theta)
  return raw


def _rope_parameters(rope: Rope, context: int) -> dict[str, Any]:
  raw: dict[str, Any] = {
    "rope_type": rope.kind,
    "rope_theta": fields.tidy(rope.theta),
  }
  needed, others = KINDS[rope.kind]
  for name in (*needed, *others, "partial_rotary_factor"):
    found, default = (getattr(x, NAMES[name]) for x in (rope, Rope()))
    must = name in needed or name == ORIGINAL
    must |= name == "factor" and rope.kind == "yarn"
    if must or found != default:
      raw[name] = list(found) if isinstance(found, tuple) else found
  if rope.kind == "longrope" and rope.factor == context / rope.original_context:
    raw.pop("factor", None)
  return raw


# ---- Layers without rotary embeddings ----------------------------------------


def read_nope(raw: Raw, family: Family, L: int, path: str) -> tuple[int, ...]:
  """1 for each layer without rotary embeddings; () if there is none.

  Raises:
    UserError: a list that does not fit the layers.
  """
  if family.nope == "switch":
    kind = raw["position_embedding_type"]
    if kind not in ("rope", "nope", None):
      raise UserError(
        f"{path}: position_embedding_type={kind} is not supported; rope, nope "
        "and null are"
      )
    return () if kind == "rope" else (1,) * L
  if family.nope != "list":
    return ()
  given = raw["no_rope_layers"]
  if given is None:
    period = raw["no_rope_layer_interval"]
    require(period, (int,), "no_rope_layer_interval", path)
    if period < 1:
      raise UserError(
        f"{path}: no_rope_layer_interval={period} must be 1 or up"
      )
    given = [int((i + 1) % period != 0) for i in range(L)]
  good = isinstance(given, list) and {*map(str, given)} <= {"0", "1"}
  if not good or len(given) < L:
    raise UserError(
      f"{path}: no_rope_layers must name {L} layers, each 1 (with rotary "
      "embeddings) or 0"
    )
  return tuple(1 - turns for turns in given[:L]) if 0 in given[:L] else ()


def nope_of_full(
  raw: Raw, family: Family, window: tuple[int, ...], L: int
) -> tuple[int, ...] | None:
  """`nope` where it follows from the windows; None where it does not."""
  if family.nope not in ("full", "global"):
    return None
  if raw["sliding_window"] is None and family.nope == "full":
    return ()
  still = tuple(int(not size) for size in window or (0,) * L)
  return still if any(still) else ()


def write_nope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The family's fields of them: each layer's, never a pattern."""
  if family.nope == "switch":
    return {"position_embedding_type": None if any(config.nope) else "rope"}
  if family.nope != "list":
    return {}
  still = config.nope or (0,) * config.num_layers
  return {"no_rope_layers": [1 - layer for layer in still]}
