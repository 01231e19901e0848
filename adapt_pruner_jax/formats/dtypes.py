"""In which dtype each parameter is written: as in its parent, or as asked.

Arithmetic has a dtype of its own; this one is that of files. It differs from
tensor to tensor: norms are often float32 among matrices in bfloat16.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.formats import orbax
from adapt_pruner_jax.formats.gguf import directory
from adapt_pruner_jax.formats.hf import (
  config_json,
  cut_vocabulary,
  tensors,
  text_part,
  weights,
)
from adapt_pruner_jax.formats.hf.files import CONFIG, read_object
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Cast:
  """A parameter on its way to a file where it has another dtype."""

  array: Any
  dtype: np.dtype

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """On the host; if it is spread over processes, all of them have to ask,
    and those that `weights.on_host` gives nothing get None."""
    array = self.array
    if isinstance(array, jax.Array):
      array = weights.on_host(array)
    if array is None:
      return None
    array = np.asarray(array).astype(self.dtype)
    return array.astype(dtype or self.dtype, copy=False)


def for_export(
  config: ModelConfig, params: Params, source: str | Path | None, asked: str
) -> Params:
  """The parameters, each with the dtype in which it is to be written.

  Args:
    config, params: the model, in whatever dtype it is computed with; its
      layers have the numbers that they have in `source`.
    source: the directory that it comes from.
    asked: one dtype for all of them; "" = each as it is stored in `source`, and
      new ones as most of the others. Where no weights are, as they are.

  Returns:
    A tree like `params`, for `convert.write`.

  Raises:
    UserError: the weights in `source` cannot be read.
  """
  stored = {}
  if not asked and source is not None:
    stored = _stored(config, Path(source))
  if not asked and not stored:
    return params
  usual = asked or Counter(stored.values()).most_common(1)[0][0]

  def one(name: str, layer: int | None, array: Any) -> Any:
    dtype = np.dtype(stored.get((layer, name), usual))
    return array if array.dtype == dtype else Cast(array, dtype)

  return axes.map_named(one, params)


def rounded(params: Params, written: Params) -> Params:
  """The parameters with the values that they have in their files.

  Args:
    written: what `for_export` makes of them.
  """
  return jax.tree.map(
    lambda x, w: x.astype(w.dtype).astype(x.dtype), params, written
  )


def _stored(
  config: ModelConfig, source: Path
) -> dict[tuple[int | None, str], str]:
  """The dtype of each parameter in a directory, by layer and name."""
  source = cut_vocabulary.source_of(source) or source
  if orbax.is_orbax(str(source)):
    return orbax.stored_dtypes(source)
  repeats = 1
  if gguf := directory.checkpoint(source):
    kinds = gguf.dtypes
  elif any(source.glob("*.safetensors")):
    kinds = text_part.checkpoint(source).dtypes
    repeats = config_json.repeats(read_object(source / CONFIG))
  else:
    return {}
  config = dataclasses.replace(config, residual=())  # SliceGPT's are new
  return {
    key: kinds[tensor]
    for key, place in tensors.places(config, repeats).items()
    if (tensor := place.tensor.replace("*", "0")) in kinds
  }
