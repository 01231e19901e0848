"""Opens a written directory again and compares it with the model.

Both are run side by side layer by layer in float32, so that only one layer, or
a part of the vocabulary, is held a second time.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax import workdir
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.hf import load, tensors
from adapt_pruner_jax.hf.files import Checkpoint
from adapt_pruner_jax.hf.tensors import Key
from adapt_pruner_jax.hf.weights import Get
from adapt_pruner_jax.model import (
  Block,
  Decoder,
  ModelConfig,
  attention_mask,
  layer_names,
  rope_tables,
)

TOKENS = 16
VOCABULARY_PART = 8192
TOLERANCE = 1e-4  # of the largest value


def compare(config: ModelConfig, get: Get, folder: Path | None) -> None:
  """Compares logits, and on the way the residual stream after each layer.

  Args:
    config, get: the model; all processes take part in `get`.
    folder: what was written; None on processes that did not.

  Raises:
    UserError: the model computes NaN or infinity.
    RuntimeError: they differ.
  """
  length = min(TOKENS, config.context)
  ids = np.random.default_rng(0).integers(config.V, size=(1, length))
  found = None
  if folder is not None:
    found = walk(load.read_config(folder), _reader(folder), ids)
  wrong = None
  for where, expected in walk(config, get, ids):
    if found is None or wrong is not None:
      continue  # only take part in the gathering
    _, other = next(found)
    largest = np.abs(expected).max()
    if not np.isfinite(largest):
      wrong = UserError(
        f"the model is not written: {where} has NaN or infinite values"
      )
    elif not np.abs(other - expected).max() <= TOLERANCE * max(1, largest):
      difference = np.abs(other - expected).max()
      wrong = RuntimeError(
        f"what was written is another function than the model: {where} differs "
        f"by {difference:.2g}"
      )
  if not workdir.all_agree(wrong is None):
    raise wrong or UserError("process 0 refused the export; see its message")


def walk(
  config: ModelConfig, get: Get, ids_BT: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
  """The residual stream of one row after each layer, then its logits."""
  positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
  ropes = rope_tables(config, positions_BT)

  def weights(layer: int | None, names: list[str]) -> dict:
    return {n: jnp.asarray(get((layer, n)), jnp.float32) for n in names}

  outer = weights(None, ["final_norm"])
  rows_TD = get((None, "embedding"))[ids_BT[0]]
  x_BTD = _outside(config, outer, rows_TD, np.arange(len(rows_TD))[None])
  for i in range(config.L):
    window = config.window[i] if config.window else 0
    mask = attention_mask(positions_BT, None, jnp.int32(window))
    one = dataclasses.replace(
      config, K=config.K[i : i + 1], F=config.F[i : i + 1], window=()
    )
    rope = ropes[config.rope_ids()[i]]
    x_BTD = _layer(one, weights(i, layer_names(config, i)), x_BTD, rope, mask)
    yield f"the output of layer {i}", np.asarray(x_BTD)
  if config.tied:
    matrix_VD = get((None, "embedding"))
  else:
    matrix_VD = get((None, "lm_head")).T
  logits = [
    _outside(config, outer, matrix_VD[i : i + VOCABULARY_PART], x_BTD)
    for i in range(0, config.V, VOCABULARY_PART)
  ]
  yield "logits", np.concatenate(logits, axis=-1)


def _outside(config, outer, rows_VD, inputs):
  """What the embedding makes of ids, or the output matrix of x_BTD.

  Either knows the rows `rows_VD` only.
  """
  config = dataclasses.replace(
    config, V=len(rows_VD), tied=True, K=(), F=(), window=()
  )
  params = outer | {"embedding": jnp.asarray(rows_VD, jnp.float32)}
  method = "embed" if inputs.ndim == 2 else "head"
  return Decoder(config).apply({"params": params}, inputs, method=method)


@partial(jax.jit, static_argnums=0)
def _layer(config, weights, x_BTD, rope, mask_BNTS):
  block = Block(config, config.K[0], config.F[0])
  return block.apply({"params": weights}, x_BTD, rope, mask_BNTS)


def _reader(folder: Path) -> Get:
  checkpoint = Checkpoint(folder)
  config = load.read_config(folder)
  load.check_tensors(checkpoint, config)
  places = tensors.places(config)

  def get(key: Key) -> np.ndarray:
    sizes = config.sizes(key[0])
    array = load.read_parameter(checkpoint, key[1], places[key], sizes, None)
    return np.asarray(array)

  return get
