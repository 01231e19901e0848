"""Opens a written directory again and compares it with the model.

Parameters are compared block by block. Where logits are compared too, both
models are run side by side layer by layer in float32, so that only one layer,
or a part of the vocabulary, is held a second time.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf import load, tensors, weights
from adapt_pruner_jax.formats.hf.tensors import Key
from adapt_pruner_jax.formats.hf.weights import Get, getter
from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder
from adapt_pruner_jax.models.layer import (
  attention_inputs,
  place,
  run_layer,
  stream,
)
from adapt_pruner_jax.models.model_config import (
  ModelConfig,
  layer_names,
  outer_names,
)

TOKENS = 16
VOCABULARY_PART = 8192
TOLERANCE = 1e-4  # of the largest value


def compare(
  config: ModelConfig,
  get: Get,
  written: ModelConfig,
  written_get: Get,
  dtypes: dict[str, np.dtype],
  folder: Path | None,
  told: dict[Key, str] | None = None,
) -> None:
  """Compares what a directory gives when it is opened with the model.

  Every parameter must be finite and come back bit for bit. Under the same
  config that is the same function, for all inputs, which logits of a few tokens
  would not show; they are computed, and compared, where another config comes
  back, as after padding.

  Args:
    config, get: the model; all processes take part in each `get`.
    written, written_get: what was written of it, padded or not.
    dtypes: of each tensor in the files.
    folder: what was written; None on processes that did not.
    told: digests of what was written, by which it is compared without asking
      for it again; None = there are none.

  Raises:
    UserError: a parameter is NaN or infinite, or one of those logits is.
    RuntimeError: they differ.
  """
  opened = agreement.on_writer(lambda: load.stored(folder))
  found, tree = opened or (config, None)
  _agree(_wrong_parameter(written, written_get, dtypes, tree, told))
  if not agreement.all_agree(found == config):
    _agree(_wrong_logits(config, get, found, tree))


def _agree(wrong: Exception | None) -> None:
  if not agreement.all_agree(wrong is None):
    raise wrong or UserError("process 0 refused the export; see its message")


def _wrong_parameter(
  config: ModelConfig,
  get: Get,
  dtypes: dict[str, np.dtype],
  tree: Params | None,
  told: dict[Key, str] | None,
) -> Exception | None:
  """What is wrong with the first parameter that is not as in `tree`.

  Both are compared in the layout of the file: equal there, they are equal.
  """
  wrong = None
  for key, stored in tensors.places(config).items():
    expected = None if told is not None else get(key)
    if tree is None or wrong is not None:
      continue  # only take part
    layer, name = key
    where = name if layer is None else f"{name} of layer {layer}"
    dtype, found = dtypes[stored.tensor], getter(tree)(key)
    shape = axes.shape(name, config.sizes(layer))
    if (found.shape, found.dtype) != (shape, dtype):
      wrong = RuntimeError(f"{where} comes back as {found.dtype}{found.shape}")
      continue
    if told is None:
      finite, same = _compared(name, expected, found, dtype)
    else:
      finite = _finite(found)
      same = weights.digest(name, found, dtype) == told[key]
    if not finite:
      wrong = UserError(
        f"the model is not written: {where} has NaN or infinite values"
      )
    elif not same:
      wrong = RuntimeError(f"{where} does not come back as it was written")
  return wrong


def _compared(
  name: str, expected: np.ndarray, found: np.ndarray, dtype: np.dtype
) -> tuple[bool, bool]:
  """Whether what was written is finite, and what came back is the same."""
  finite, same = True, True
  one, two = (tensors.to_hf(name, array) for array in (expected, found))
  for rows, block in tensors.blocks(one, dtype):
    finite &= _finite(block)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    same &= np.array_equal(block.view(unsigned), two[rows].view(unsigned))
  return finite, same


def _finite(array: np.ndarray) -> bool:
  """By the exponent's bits, which every type here has."""
  unsigned = np.dtype(f"u{array.dtype.itemsize}")
  infinity = np.array(np.inf, array.dtype).view(unsigned)
  return not array.size or (array.view(unsigned) & infinity).max() != infinity


def _wrong_logits(
  config: ModelConfig, get: Get, found: ModelConfig, tree: Params | None
) -> Exception | None:
  """How far the logits are apart, if they are, or the output of a layer."""
  wrong = None
  length = min(TOKENS, config.context)
  ids = np.random.default_rng(0).integers(config.vocab_size, size=(1, length))
  if not agreement.is_writer():
    for key in _walked(config):
      get(key)
    return None
  other = None if tree is None else walk(found, getter(tree), ids)
  for where, expected in walk(config, get, ids):
    if other is None or wrong is not None:
      continue
    difference = np.abs(next(other)[1] - expected).max()
    largest = np.abs(expected).max()
    if not np.isfinite(largest):
      wrong = UserError(
        f"the model is not written: {where} has NaN or infinite values"
      )
    elif not difference <= TOLERANCE * max(1, largest):
      wrong = RuntimeError(
        f"what was written is another function than the model: {where} differs "
        f"by {difference:.2g}"
      )
  return wrong


def _walked(config: ModelConfig) -> Iterator[Key]:
  """What `walk` asks for, in its order."""
  yield from ((None, name) for name in _around(config))
  yield from ((None, name) for name in _tables(config))
  for i in range(config.num_layers):
    yield from ((i, name) for name in layer_names(config, i))
  yield None, "embedding" if config.tied else "lm_head"


def _around(config: ModelConfig) -> list[str]:
  """Parameters outside the layers that have no dim of the residual stream and
  the vocabulary both."""
  matrices = ("embedding", "lm_head", "told")
  return [name for name in outer_names(config) if name not in matrices]


def walk(
  config: ModelConfig, get: Get, ids_BT: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
  """The residual stream of one row after each layer, then its logits."""

  def weights(i: int | None, names: list[str]) -> dict:
    return {n: jnp.asarray(get((i, n)), jnp.float32) for n in names}

  outer = weights(None, _around(config))
  bias_V = outer.pop("lm_head_bias", None)
  rows = {n: get((None, n))[ids_BT[0]] for n in _tables(config)}
  x_BTD = _outside(config, outer, rows, np.arange(ids_BT.shape[1])[None])
  for i in range(config.num_layers):
    names = layer_names(config, i)
    x_BTD = _layer(config, weights(i, names), place(config, i), x_BTD)
    # Not what it carries, which a later layer may replace before it is used.
    yield f"the output of layer {i}", np.asarray(stream(config, x_BTD))
  if config.tied:
    matrix_VD = get((None, "embedding"))
  else:
    matrix_VD = get((None, "lm_head")).T
  logits = []
  for i in range(0, config.vocab_size, VOCABULARY_PART):
    part = slice(i, i + VOCABULARY_PART)
    if bias_V is not None:
      outer["lm_head_bias"] = bias_V[part]
    rows = {"embedding": matrix_VD[part]}
    logits.append(_outside(config, outer, rows, stream(config, x_BTD)))
  yield "logits", np.concatenate(logits, axis=-1)


def _tables(config: ModelConfig) -> list[str]:
  """Parameters with a row for each id."""
  return [name for name in ("embedding", "told") if name in outer_names(config)]


def _outside(config, outer, rows, inputs):
  """What the embedding makes of ids, or the output matrix of x_BTD.

  Either knows the rows in `rows` only.
  """
  if "told" not in rows:  # which the output matrix does not read
    config = dataclasses.replace(config, told=0, reused_groups=(0, 0))
    outer = {n: x for n, x in outer.items() if n not in axes.TOLD_OUTER}
  config = dataclasses.replace(
    config,
    vocab_size=len(rows["embedding"]),
    tied=True,
    kv_groups=(),
    ffn_widths=(),
    window=(),
    nope=(),
    reuses=(),
    head_bias="lm_head_bias" in outer,
  )
  rows = {n: jnp.asarray(x, jnp.float32) for n, x in rows.items()}
  params = outer | rows
  method = "embed" if inputs.ndim == 2 else "head"
  return Decoder(config).apply({"params": params}, inputs, method=method)


@partial(jax.jit, static_argnums=(0, 2))
def _layer(config, weights, place, x_BTD):
  inputs = attention_inputs(config, x_BTD.shape[1])
  return run_layer(config, weights, place, inputs, x_BTD)[0]
