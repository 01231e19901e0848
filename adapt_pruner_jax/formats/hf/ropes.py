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


def read(raw: Raw, path: str) -> dict[str, Rope | None]:
  """`rope` and `local_rope`; Transformers lets rope_scaling win."""
  theta, context = raw["rope_theta"], raw["max_position_embeddings"]
  share = raw.get("partial_rotary_factor", 1.0)
  new = mapping(raw, "rope_parameters", path)
  old = mapping(raw, "rope_scaling", path)
  if "rope_local_base_freq" not in raw:
    rope = _rope(old or new, theta, share, context, path)
    return {"rope": rope, "local_rope": None}
  local = mapping(new, SLIDING, path)
  full = {**mapping(new, FULL, path), **old}
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


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
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
