"""A model of which only some tokens are left, as a directory of its own.

The directory has the tokenizer of these tokens, all files that name tokens by
id, and a link to the original model, of whose embedding and output matrix the
kept rows are read: no weights are copied. It is opened like any model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import carried, generation_config, text_part
from adapt_pruner_jax.formats.hf.families import FAMILIES
from adapt_pruner_jax.formats.hf.files import (
  ALL,
  CONFIG,
  LICENCES,
  read_object,
)
from adapt_pruner_jax.formats.hf.tensor_names import OUTER
from adapt_pruner_jax.storage import json_files, publish
from adapt_pruner_jax.storage.confinement import confined

KEPT = "kept_tokens.json"  # ids in the original model
SOURCE = ".source"  # a link to its directory
TEXTS = (
  *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
  *("additional_chat_templates/*.jinja", "README.md", *LICENCES),
)
# Of generation_config.json, beside *_token_id: lists of ids.
LISTS = ("suppress_tokens", "begin_suppress_tokens")
ROWS = frozenset(  # tensors with a row a token
  names[name]
  for names in (OUTER, *(family.outer for family in FAMILIES.values()))
  for name in ("embedding", "lm_head", "lm_head_bias", "told")
  if name in names
)


def write(
  source: Path,
  folder: Path,
  kept: np.ndarray,
  tokenizer: dict[str, Any],
  tied: bool,
) -> None:
  """Writes the directory of a model with some of its tokens.

  Args:
    source: the original model's directory.
    folder: what is written.
    kept: ids in the original, sorted; the new ones are their places.
    tokenizer: tokenizer.json of these.
    tied: whether the original's output matrix is its embedding.

  Raises:
    UserError: `folder` cannot be written, or a file of the original not read.
  """
  new = {int(old): number for number, old in enumerate(kept)}
  folder.parent.mkdir(parents=True, exist_ok=True)
  with publish.directory(folder) as made:
    whole = read_object(source / CONFIG)
    raw = text_part.config_of(whole, str(source / CONFIG))
    if raw is not whole:  # of tying the wrapper had the say
      raw = {**raw, "tie_word_embeddings": tied}
    raw = {**raw, "vocab_size": len(kept)}
    if carried.VOCABULARY in raw:
      raw[carried.VOCABULARY] = len(kept)
    json_files.write_json(made / CONFIG, _renumbered(raw, new))
    json_files.write_json(made / "tokenizer.json", tokenizer)
    for name, change in (
      (generation_config.FILE, _renumbered),
      ("tokenizer_config.json", _with_decoder),
      ("added_tokens.json", _numbers),
    ):
      if (source / name).is_file():
        content = change(read_object(source / name), new)
        json_files.write_json(made / name, content)
    for file in _found(source, TEXTS):
      copy = made / file.relative_to(source)
      copy.parent.mkdir(exist_ok=True)
      copy.write_bytes(confined(file, source).read_bytes())
    json_files.write_json(made / KEPT, kept.tolist())
    (made / SOURCE).symlink_to(source.resolve())


def read_from(source: Path) -> list[Path]:
  """What `write` makes a directory of, but for the weights."""
  changed = CONFIG, generation_config.FILE, "tokenizer_config.json"
  return _found(source, (*changed, "added_tokens.json", *TEXTS))


def _found(source: Path, names: Sequence[str]) -> list[Path]:
  return [f for n in names for f in sorted(source.glob(n)) if f.is_file()]


def named_ids(source: Path) -> set[int]:
  """Token ids that a model's config and generation config name."""
  found = set()
  for name in (CONFIG, generation_config.FILE):
    raw = read_object(source / name) if (source / name).is_file() else {}
    raw = text_part.config_of(raw, str(source / name))
    for field, value in raw.items():
      if field.endswith("_token_id"):
        found |= {*_ids(value)}
  return found


def _ids(value: Any) -> list[int]:
  values = value if isinstance(value, list) else [value]
  return [i for i in values if isinstance(i, int) and i >= 0]


def _renumbered(raw: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
  """A config with the new ids; one that the model has no row of is left out."""
  raw = dict(raw)
  for field, value in raw.items():
    if field.endswith("_token_id") and _ids(value):
      found = [new[i] for i in _ids(value) if i in new]
      alone = found[0] if found else None
      raw[field] = found if isinstance(value, list) else alone
    elif field in LISTS and isinstance(value, list):
      raw[field] = [new[i] for i in value if i in new]
    elif field == "bad_words_ids" and isinstance(value, list):
      words = [word for word in value if {*word} <= new.keys()]
      raw[field] = [[new[i] for i in word] for word in words] or None
  return raw


def _with_decoder(
  raw: dict[str, Any], new: Mapping[int, int]
) -> dict[str, Any]:
  """tokenizer_config.json with the new ids of added tokens."""
  decoder = raw.get("added_tokens_decoder")
  if not isinstance(decoder, dict):
    return raw
  kept = {str(new[int(i)]): t for i, t in decoder.items() if int(i) in new}
  return raw | {"added_tokens_decoder": kept}


def _numbers(raw: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
  """added_tokens.json, ids by token, with the new ids."""
  return {token: new[i] for token, i in raw.items() if i in new}


# ---- Opened again ------------------------------------------------------------


def source_of(folder: Path) -> Path | None:
  """The original model's directory; None of a directory that `write` did not
  make.

  Raises:
    UserError: it is gone.
  """
  link = folder / SOURCE
  if not link.is_symlink() or not (folder / KEPT).is_file():
    return None
  if not link.is_dir():
    raise UserError(
      f"{link.readlink()}, the model whose vocabulary was cut, is gone: put it "
      "back"
    )
  return link.resolve()


class Checkpoint:
  """The tensors of the original with the rows of the kept tokens.

  Attributes:
    folder, shapes, dtypes: as of `files.Checkpoint`.
  """

  def __init__(self, folder: Path, inner: Any):
    """Takes the checkpoint of the original model."""
    self.folder, self.dtypes, self._inner = folder, inner.dtypes, inner
    self._kept = np.array(json_files.read_json(folder / KEPT), np.int64)
    self.shapes = {
      tensor: (len(self._kept), *shape[1:]) if tensor in ROWS else shape
      for tensor, shape in inner.shapes.items()
    }

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor; of those with a row a token a copy of kept ones."""
    if tensor not in ROWS:
      return self._inner.array(tensor, rows)
    kept = self._kept[rows]  # in order
    first, stop = (kept[0], kept[-1] + 1) if len(kept) else (0, 0)
    return self._inner.array(tensor, slice(first, stop))[kept - first]
