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
  layer_kinds,
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
  kinds = raw.get("layer_types")
  if family.windows == "kinds":
    layer_kinds(kinds, (FULL, "attention"), L, path)
  elif not (kinds is None or family.windows or family.delta):
    layer_kinds(kinds, (FULL,), L, path)  # its class does not ask
  if family.windows in ("", "kinds"):
    return ()
  size = raw["sliding_window"]
  require(size, (int, NONE), "sliding_window", path)
  if size is not None and size < 0:
    raise UserError(f"{path}: sliding_window={size} must be null or 0 or up")
  if not raw.get("use_sliding_window", True):
    if family.windows == "nope" and size and SLIDING in (kinds or ()):
      # Its class masks by the kind, and tells fast kernels of no window.
      raise UserError(
        f"{path}: layer_types has {SLIDING}, which use_sliding_window=False "
        "contradicts; set it to true, or name all layers " + FULL
      )
    size = None
  if kinds is not None:
    same = SLIDING if size else FULL  # in a class that does not ask
    allowed = (same,) if family.windows == "all" else (FULL, SLIDING)
    slides = [k == SLIDING for k in layer_kinds(kinds, allowed, L, path)]
  elif family.windows in ("all", "each"):
    slides = [True] * L
  elif family.windows == "last":
    first = raw["max_window_layers"] if size else L
    require(first, (int,), "max_window_layers", path)
    slides = [i >= first for i in range(L)]
  elif family.windows == "nope":
    slides = list(map(bool, nope or (0,) * L))
  else:
    name = "sliding_window_pattern"
    slides = by_period(raw.get(name, family.period), name, L, path)
  if family.windows == "pattern" and any(slides) and not size:
    raise UserError(f"{path}: sliding_window={size} must be at least 1")
  windows = tuple((size or 0) * slide for slide in slides)
  return windows if any(windows) else ()


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
