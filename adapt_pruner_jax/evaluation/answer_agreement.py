"""How alike a model and the dense one answer, on the dense one's answers."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.evaluation.finite import not_finite
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import losses, output_loss, output_matrix

Model = tuple[ModelConfig, Params]


def answer_agreement(
  dense: Model,
  model: Model,
  answers: Sequence[dict],
  batch: int,
  mesh: Mesh | None = None,
) -> dict[str, float | int]:
  """Compares what two models say next, at every token of given answers.

  Both read the prompt and the answer so far, as the dense model wrote it.

  Args:
    dense: whose answers these are.
    model: of the same vocabulary.
    answers: rows of `evaluation/answers.py`.
    batch: answers at a time; rounded up to what the mesh divides.

  Returns:
    "answer_kl", KL(dense || model) in nats a token; "answer_agreement", the
    share of tokens where both find the same one the likeliest; "answer_tokens",
    over how many.

  Raises:
    UserError: a logit is not finite.
  """
  mesh = sharding.one_device() if mesh is None else mesh
  shards = placement.batch_shards(mesh)
  batch = -(-min(batch, len(answers)) // shards) * shards
  ids = [row["prompt_tokens"] + row["answer_tokens"] for row in answers]
  firsts = [len(row["prompt_tokens"]) for row in answers]
  order = np.argsort([len(row) for row in ids], kind="stable")
  total = np.zeros(3)
  for i in range(0, len(order), batch):
    group = order[i : i + batch]
    T = generate.padded_length(max(len(ids[row]) for row in group))
    rows_BT = np.zeros((batch, T), np.int32)
    weights_BT = np.zeros((batch, T - 1), np.float32)
    for at, row in enumerate(group):
      rows_BT[at, : len(ids[row])] = ids[row]
      weights_BT[at, firsts[row] - 1 : len(ids[row]) - 1] = 1
    total += _compared(
      *((dense[0], model[0]), mesh, (dense[1], model[1])),
      *(placement.place_rows(x, mesh) for x in (rows_BT, weights_BT)),
    )
  kl, same, tokens = map(float, total)
  if not math.isfinite(kl):
    raise not_finite("the logits on the dense model's answers", model[1])
  return {
    "answer_kl": kl / tokens,
    "answer_agreement": same / tokens,
    "answer_tokens": round(tokens),
  }


@partial(jax.jit, static_argnames=("configs", "mesh"))
def _compared(
  configs: tuple[ModelConfig, ModelConfig],
  mesh: Mesh,
  params: tuple[Params, Params],
  rows_BT: jax.Array,
  weights_BT: jax.Array,
) -> jax.Array:
  """Summed KL, how often both agree, and the number of tokens: float32 [3]."""

  def end(config, params):
    x_BTD = embed(config, params, rows_BT, mesh)
    x_BTD = Decoder(config).apply({"params": params}, x_BTD, method="hidden")
    return x_BTD[:, :-1]

  matrices = [
    output_matrix.place(config, head_matrix(config, one), mesh)
    for config, one in zip(configs, params, strict=True)
  ]

  def chunk(weights_BT, *ends):
    dense_BTV, model_BTV = (
      output_matrix.logits(config, mesh, matrix, x_BTD)
      for config, matrix, x_BTD in zip(configs, matrices, ends, strict=True)
    )
    kl, tokens = losses.distillation(
      model_BTV, dense_BTV, weights_BT, temperature=1.0
    )
    same_BT = dense_BTV.argmax(-1) == model_BTV.argmax(-1)
    return jnp.stack([kl, (same_BT * weights_BT).sum(), tokens]), ()

  ends = map(end, configs, params)
  found, _ = output_loss.over_chunks(
    chunk, configs[0].vocab_size, mesh, weights_BT, *ends
  )
  return sharding.whole(found, mesh)
