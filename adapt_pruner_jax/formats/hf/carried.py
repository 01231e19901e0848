"""What layers are told of tokens, and keys and values that they share.

Of Gemma 4 E2B and E4B: an embedding with a part for each layer, and last layers
that use the keys and values of the last one of their kind before them. Their
MLPs may be twice as wide.
"""

from typing import Any

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.family import Family
from adapt_pruner_jax.formats.hf.fields import Raw, require
from adapt_pruner_jax.formats.hf.kinds import MOST
from adapt_pruner_jax.models.model_config import ModelConfig

TOLD, VOCABULARY = "hidden_size_per_layer_input", "vocab_size_per_layer_input"
SHARING, DOUBLE = "num_kv_shared_layers", "use_double_wide_mlp"
MOST_LAYERS = 10_000


def reuses(raw: Raw, family: Family, path: str) -> tuple[int, ...]:
  """1 for each layer without keys and values of its own; () if all have them.

  Args:
    raw: from `kinds.with_wide`.

  Raises:
    UserError: all layers are without, or all of one kind.
  """
  if not _may(family):
    return ()
  last, L = raw[SHARING], raw["num_hidden_layers"]
  require(last, (int,), SHARING, path)
  if not 0 <= last < L:
    raise UserError(
      f"{path}: {SHARING}={last} is not supported; 0 to {L - 1} of {L} layers "
      "may use the keys and values of others"
    )
  kinds = raw["layer_types"]
  for kind in {*kinds[L - last :]} - {*kinds[: L - last]}:
    raise UserError(
      f"{path}: {SHARING}={last} leaves no layer of the kind {kind} with keys "
      "and values of its own"
    )
  return (0,) * (L - last) + (1,) * last if last else ()


def _may(family: Family) -> bool:
  """Whether its layers may share, and be told something."""
  return TOLD in family.fields and TOLD not in family.must


def width(raw: Raw, reuse: tuple[int, ...], layer: int, name: str) -> int:
  """The width of a layer's MLP, where the layer does not say it itself.

  Args:
    reuse: from `reuses`.
    name: the field with the width of the whole model.
  """
  double = bool(reuse) and reuse[layer] and raw[DOUBLE]
  return raw[name] * 2 if double else raw[name]


def unread(raw: Raw) -> tuple[str, ...]:
  """Tensors that some files have and no class reads, as of `Family.unread`.

  Args:
    raw: config.json, of a wrapper too.
  """
  text = raw.get("text_config")
  raw = text if isinstance(text, dict) else raw
  last, L = raw.get(SHARING) or 0, raw.get("num_hidden_layers") or 0
  if type(last) is not int or type(L) is not int:
    return ()
  names = "k_proj", "v_proj", "k_norm"
  return tuple(
    f"*.layers.{i}.self_attn.{name}.weight"
    for i in range(max(L - last, 0), min(L, MOST_LAYERS))
    for name in names
  )


def read(
  raw: Raw, family: Family, sizes: dict[str, Any], path: str
) -> dict[str, Any]:
  """The fields of `ModelConfig` that say so.

  Args:
    sizes: those fields of the layers' sizes.

  Raises:
    UserError: a size is impossible, layers that share have other sizes, or
      layers share and are told nothing.
  """
  if not _may(family):
    return {}
  require(raw[TOLD], (int,), TOLD, path)
  require(raw[DOUBLE], (bool,), DOUBLE, path)
  if not 0 <= raw[TOLD] <= MOST:
    raise UserError(f"{path}: {TOLD}={raw[TOLD]} must be from 0 to {MOST:,}")
  if raw[TOLD] and raw[VOCABULARY] != raw["vocab_size"]:
    raise UserError(
      f"{path}: {VOCABULARY}={raw[VOCABULARY]} is not supported; "
      f"vocab_size={raw['vocab_size']} is"
    )
  reuse = reuses(raw, family, path)
  values = {"told": raw[TOLD], "reuses": reuse}
  if raw[TOLD]:
    values["told_layers"] = raw["num_hidden_layers"]
  if reuse:
    groups = [*zip(sizes["kv_groups"], sizes["wide"], strict=True)]
    first = reuse.index(1)
    last = {kind: own for own, kind in groups[:first]}
    sharing = {kind for _, kind in groups[first:]}
    shared = [last[kind] if kind in sharing else 0 for kind in (0, 1)]
    for i, (own, kind) in enumerate(groups[first:], first):
      if own != shared[kind] or not own:
        raise UserError(
          f"{path}: layer {i} has {own} KV groups and uses those of a layer "
          f"with {shared[kind]}; it must have as many"
        )
    for i, (own, kind) in enumerate(groups[:first]):
      if shared[kind] and own > shared[kind]:  # nothing holds these apart
        raise UserError(
          f"{path}: layer {i} has {own} KV groups, more than the "
          f"{shared[kind]} of the layer whose keys and values others use"
        )
    values["reused_groups"] = tuple(shared)
  if reuse and not raw[TOLD]:  # its class takes apart what there is not
    raise UserError(
      f"{path}: {SHARING}={raw[SHARING]} is supported with {TOLD} above 0"
    )
  return values


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The inverse of `read`."""
  if not _may(family):
    return {}
  fields = {TOLD: config.told, SHARING: sum(config.reuses)}
  if config.told:
    fields[VOCABULARY] = config.vocab_size
  if config.reuses:
    fields[DOUBLE] = is_double(config)
  return fields


def is_double(config: ModelConfig) -> bool:
  """Whether MLPs have one width, and those of layers that share twice that."""
  pairs = {*zip(config.ffn_widths, config.reuses, strict=False)}
  first = config.ffn_widths[0]
  return bool(first) and pairs == {(first, 0), (2 * first, 1)}
