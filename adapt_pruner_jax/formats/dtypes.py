"""In which dtype each parameter is stored: as in its parent, or as asked.

Arithmetic has a dtype of its own; this one is that of files. It is a tree like
the parameters, since files mix them: norms are often float32 among matrices in
bfloat16.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapt_pruner_jax.formats import orbax
from adapt_pruner_jax.formats.hf import tensors
from adapt_pruner_jax.formats.hf.files import Checkpoint
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig

Dtypes = dict[str, Any]  # a tree like the parameters, with dtypes in it


def of_params(params: Params) -> Dtypes:
  """The dtypes that the parameters have."""
  return jax.tree.map(lambda x: np.dtype(x.dtype), params)


def for_export(
  config: ModelConfig, params: Params, source: str | Path | None, asked: str
) -> Dtypes:
  """The dtypes in which a model is to be written.

  Args:
    config, params: the model, in whatever dtype it is computed with; its
      layers have the numbers that they have in `source`.
    source: the directory that it comes from.
    asked: one dtype for all of them; "" = each as it is stored in `source`, and
      new ones as most of the others. Where no weights are, as they are.

  Raises:
    UserError: the weights in `source` cannot be read.
  """
  if asked:
    return jax.tree.map(lambda _: np.dtype(asked), params)
  stored = _stored(config, Path(source)) if source is not None else {}
  if not stored:
    return of_params(params)
  usual = Counter(stored.values()).most_common(1)[0][0]

  def one(name: str, layer: int | None, _: Any) -> np.dtype:
    return np.dtype(stored.get((layer, name), usual))

  return axes.map_named(one, params)


def _stored(
  config: ModelConfig, source: Path
) -> dict[tuple[int | None, str], str]:
  """The dtype of each parameter in a directory, by layer and name."""
  if orbax.is_orbax(str(source)):
    return orbax.stored_dtypes(source)
  if not any(source.glob("*.safetensors")):
    return {}
  kinds = Checkpoint(source).dtypes
  return {
    key: kinds[place.tensor]
    for key, place in tensors.places(config).items()
    if place.tensor in kinds
  }


def rounded(params: Params, dtypes: Dtypes) -> Params:
  """The parameters with the values that they will have in their files."""
  return jax.tree.map(lambda x, d: x.astype(d).astype(x.dtype), params, dtypes)
