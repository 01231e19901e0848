"""Rotary embeddings in config.json, in the spelling of Transformers 4 and 5."""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import fields
from adapt_pruner_jax.formats.hf.families import Family
from adapt_pruner_jax.formats.hf.fields import (
  FULL,
  NUMBER,
  SLIDING,
  Raw,
  mapping,
  require,
)
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import Rope


def read(raw: Raw, family: Family, path: str) -> dict[str, Rope | None]:
  """`rope` and `local_rope`; as in Transformers, rope_scaling wins.

  Raises:
    UserError: a kind of rope that is not supported, or not in this family.
  """
  context = raw["max_position_embeddings"]
  theta = {"rope_theta": raw["rope_theta"]}
  new = mapping(raw, "rope_parameters", path)
  old = mapping(raw, "rope_scaling", path)
  share = {}
  if "partial_rotary_factor" in family.fields:
    share = {"partial_rotary_factor": raw["partial_rotary_factor"]}
  if "rope_local_base_freq" not in raw:
    rope = _rope({**theta, **share, **(old or new)}, family, context, path)
    return {"rope": rope, "local_rope": None}
  for name in new:
    if name not in (FULL, SLIDING):
      raise UserError(
        f"{path}: rope_parameters.{name} is not supported; {FULL} and "
        f"{SLIDING} are"
      )
  full = {**theta, **mapping(new, FULL, path), **old}
  local = {"rope_theta": raw["rope_local_base_freq"]}
  local |= mapping(new, SLIDING, path)
  return {
    "rope": _rope(full, family, context, path),
    "local_rope": _rope(local, family, context, path),
  }


# What Transformers calls the numbers of a rope, and what we do.
NAMES = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position_embeddings": "original_context",
  "rope_theta": "theta",
  "partial_rotary_factor": "partial",
}
NEEDED = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _rope(raw: Raw, family: Family, context: int, path: str) -> Rope:
  """One rotary embedding."""
  kind = raw.get("rope_type", raw.get("type", "default"))
  if kind not in family.ropes:
    raise UserError(
      f"{path}: rope type {kind} is not supported in {family.module}; "
      f"{' and '.join(family.ropes)} {'are' if family.ropes[1:] else 'is'}"
    )
  for name, found in raw.items():
    if name not in (*NAMES, "rope_type", "type") and found is not None:
      raise UserError(f"{path}: the rope field {name} is not supported")
  used = (*NEEDED[kind], "rope_theta")
  share = raw.get("partial_rotary_factor")
  if "partial_rotary_factor" in family.fields:
    used += ("partial_rotary_factor",)
  elif kind != "default" and share not in (None, 1):
    # In a default rope, classes of such families pass over it: so do we.
    raise UserError(
      f"{path}: partial_rotary_factor={share} with a rope of type {kind} is "
      f"more than {family.module} models can compute"
    )
  for name in used:
    if name not in raw:
      raise UserError(f"{path}: rope type {kind} needs the field {name}")
    require(raw[name], NUMBER, name, path)
  values = {NAMES[name]: float(raw[name]) for name in used}
  if kind == "llama3":
    original = raw.get("original_max_position_embeddings", context)
    require(original, NUMBER, "original_max_position_embeddings", path)
    values["original_context"] = original
  return Rope(kind=kind, **values)


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The fields in both spellings; each version passes over the other's."""
  rope, local = config.rope, config.local_rope
  new = _rope_parameters(rope)
  beside = ("rope_theta", "partial_rotary_factor")  # fields of their own
  old = {n: v for n, v in new.items() if n not in beside}
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
