"""Sliding windows in config.json: which layers have one, and its size."""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import (
  FULL,
  NONE,
  SLIDING,
  Raw,
  by_period,
  require,
)
from adapt_pruner_jax.models.model_config import ModelConfig


def read(
  raw: Raw, family: Family, nope: tuple[int, ...], L: int, path: str
) -> tuple[int, ...]:
  """Keys that each layer sees; () if all layers see all.

  Args:
    nope: the layers without rotary embeddings, of `ModelConfig`.
    L: how many layers there are.

  Raises:
    UserError: a size or kind of window, or a kind of layer, that is not
      supported.
  """
  if family.windows == "kinds":
    _check_kinds(raw["layer_types"], L, path)
  if family.windows in ("", "kinds"):
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
  elif family.windows == "nope":
    slides = list(map(bool, nope or (0,) * L))
  else:
    name = "sliding_window_pattern"
    slides = by_period(raw.get(name, family.period), name, L, path)
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


def _check_kinds(types: Any, L: int, path: str) -> None:
  """Refuses all kinds of layers but full attention, by name."""
  if not isinstance(types, list) or len(types) < L:
    raise UserError(
      f"{path}: layer_types={types} must name the kinds of {L} layers; without "
      "it they are recurrent ones, which are not supported"
    )
  for i, kind in enumerate(types[:L]):
    if kind not in (FULL, "attention"):
      raise UserError(
        f"{path}: layer {i} is of the kind {kind}, which is not supported; "
        f"{FULL} is"
      )


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The family's fields of windows."""
  if not family.windows:
    return {}
  if family.windows == "kinds":
    return {"layer_types": [FULL] * config.num_layers}
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
  elif family.windows == "nope":
    raw["use_sliding_window"] = bool(size)
  elif family.nope == "full" and not any(config.nope):
    raw["sliding_window"] = size
  elif not size:  # Transformers wants a number even if no layer uses it
    raw["sliding_window"] = family.fields["sliding_window"]
  return raw
