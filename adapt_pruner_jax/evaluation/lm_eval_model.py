"""The pair as a model of lm-eval.

All choices of a question are scored in one row: the context once, and behind
it the choices as branches that see the context and themselves, not each other.
The row's logits are only made where a choice is. Every process does the same
requests with the rows cut over the mesh, so results are the same on every host.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.distributed import placement, sharding
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.models import decoder, layer
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import losses

FULL_BATCH = 128  # tokens a row up to which as many rows as asked are scored
QUERIES = 32  # scored tokens a row whose logits exist at a time
MAX_NEW_TOKENS = 256  # as lm-eval's HF model, where the task does not say


@dataclasses.dataclass
class Row:
  """A context and the continuations that are scored behind it."""

  tokens: list[int]
  positions: list[int]
  branches: list[int]  # 0 = context, else the number of the continuation
  # of each scored token: (column that predicts it, its id, request)
  queries: list[tuple[int, int, int]]


class JaxLM(TemplateLM):
  """lm-eval's view of a pair; the answers are those of its HF model.

  `truncated` counts, by task, the requests that were longer than the model's
  context and lost their beginning.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    batch: int = 8,
    mesh: Mesh | None = None,
  ) -> None:
    """`batch` is rows at a time, rounded up to what the mesh divides; of rows
    longer than `FULL_BATCH` tokens as many less."""
    super().__init__()
    if mesh is None:
      mesh = sharding.one_device()
    shards = placement.batch_shards(mesh)
    self.model_config, self.params, self.mesh = config, params, mesh
    self.words, self.shards = tokenizer, shards
    self.batch = -(-batch // shards) * shards
    self.truncated = collections.Counter()
    # Each question's context is encoded once for each of its choices.
    self._encode = functools.lru_cache(maxsize=8)(tokenizer.encode)

  @property
  def eot_token_id(self) -> int:
    ids = self.model_config.eos_ids
    found = self.words.eos_id
    found = ids[0] if found is None and ids else found
    return 0 if found is None else found

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is replaced by."""
    found = self.words.bos_id
    found = self.model_config.bos_id if found is None else found
    return self.eot_token_id if found is None else found

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    if add_special_tokens is None:
      bos = self.words.bos_token
      add_special_tokens = not (bos and string.startswith(bos))
    if add_special_tokens:
      return self._encode(string)
    return self.words.encode_plain(string)

  def loglikelihood(
    self, requests, disable_tqdm: bool = True
  ) -> list[tuple[float, bool]]:
    """As `score`, of (context, continuation) texts."""
    pairs = [self._pair(*request.args) for request in requests]
    # The last token is only predicted, not read.
    lengths = [len(prefix) + len(said) - 1 for prefix, said in pairs]
    self._note_truncated(requests, lengths, self.model_config.context)
    return self.score(pairs)

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    return self.score([(prefix, said) for _, prefix, said in requests])

  def _pair(self, context: str, said: str) -> tuple[list[int], list[int]]:
    """Token ids of both; an empty context is lm-eval's prefix token."""
    if context:
      return self._encode_pair(context, said)
    ids = self.tok_encode(said, add_special_tokens=False)
    if ids[0] == self.prefix_token_id:
      return ids[:1], ids[1:]
    return [self.prefix_token_id], ids

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = True
  ) -> list[float]:
    windows, owners = [], []
    for i, request in enumerate(requests):
      found = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.model_config.context,
        context_len=1,
      )
      windows += map(utils.make_disjoint_window, found)
      owners += [i] * (len(windows) - len(owners))
    totals = [0.0] * len(requests)
    for owner, (total, _) in zip(owners, self.score(windows), strict=True):
      totals[owner] += total
    return totals

  def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
    """Text up to, and without, the first of the stop strings."""
    answers: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(repr(request.args[1]), []).append(i)
    for members in groups.values():
      settings = requests[members[0]].args[1]
      prompts = {i: self.tok_encode(requests[i].args[0]) for i in members}
      number, longest = self._room(settings)
      lengths = [len(prompts[i]) for i in members]
      self._note_truncated([requests[i] for i in members], lengths, longest)
      members.sort(key=lambda i: -len(prompts[i]))
      for start in range(0, len(members), self.batch):
        some = members[start : start + self.batch]
        ends = [prompts[i][-longest:] for i in some]
        texts = self._continue(ends, number, settings)
        answers |= zip(some, texts, strict=True)
    return [answers[i] for i in range(len(requests))]

  def score(
    self, pairs: Sequence[tuple[list[int], list[int]]]
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy would say it.

    Args:
      pairs: (context, continuation) as token ids. What is longer than the
        model's context loses tokens from the left, see `fit`.

    Raises:
      UserError: an id is outside the vocabulary.
    """
    rows = make_rows(pairs, self.model_config.context)
    ids = [t for row in rows for t in (*row.tokens, *_targets(row))]
    _check_vocabulary(ids, self.model_config.vocab_size)
    sent = []
    for T, members in by_length(rows, 2 * self.batch):
      # Rows of a batch are to have about as many queries, see `_score`.
      members.sort(key=lambda row: len(row.queries))
      Q = _whole_blocks(generate.padded_length(len(members[-1].queries)))
      B = self._rows_at_once(T)
      for start in range(0, len(members), B):
        some = members[start : start + B]
        arrays = pack(some, B, T, Q)
        placed = [placement.place_rows(array, self.mesh) for array in arrays]
        blocks = np.int32(_whole_blocks(len(some[-1].queries)) // QUERIES)
        found = _score(
          self.model_config, self.mesh, self.params, *placed, blocks
        )
        sent.append((some, found))
    totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    for some, found in sent:  # all are queued by now
      log_probs_BQ, hits_BQ = map(np.asarray, found)
      for b, row in enumerate(some):
        owners = [owner for _, _, owner in row.queries]
        np.add.at(totals, owners, log_probs_BQ[b, : len(owners)].astype(float))
        np.logical_and.at(greedy, owners, hits_BQ[b, : len(owners)])
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))

  def _rows_at_once(self, length: int) -> int:
    """`batch` of rows of `FULL_BATCH` tokens, fewer of longer ones, in whole
    multiples of what the mesh divides: the memory of attention stays alike."""
    number = self.batch * FULL_BATCH // max(length, FULL_BATCH)
    return max(number // self.shards, 1) * self.shards

  def _note_truncated(
    self, requests: Sequence[Instance], lengths: Sequence[int], longest: int
  ) -> None:
    """Counts the requests longer than that by task, and says so."""
    by_task: dict[str, list[int]] = {}
    for request, length in zip(requests, lengths, strict=True):
      by_task.setdefault(str(request.task_name), []).append(length)
    for task, all_lengths in by_task.items():
      over = [length for length in all_lengths if length > longest]
      if over:
        self.truncated[task] += len(over)
        logging.warning(
          "task %s: %d of %d requests have up to %d tokens, more than the %d "
          "that the model's context leaves: they lose their beginning",
          *(task, len(over), len(all_lengths), max(over), longest),
        )

  def _room(self, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens that are generated, and those that a prompt may have."""
    number = settings.get("max_gen_toks", MAX_NEW_TOKENS)
    context = self.model_config.context
    if number >= context:
      raise UserError(
        f"the task generates {number} tokens, which leaves no room for a "
        f"prompt in the model's context of {context}"
      )
    return number, context - number

  def _continue(
    self, prompts: list[list[int]], number: int, settings: Mapping[str, Any]
  ) -> list[str]:
    c = self.model_config
    until = settings.get("until", [])
    until = [until] if isinstance(until, str) else until
    until = [stop for stop in until if stop]
    sample = settings.get("do_sample", False)

    def text(tokens):
      return self.words.backend.decode(tokens, skip_special_tokens=True)

    found = generate.generate(
      c,
      self.params,
      prompts + [[0]] * (self.batch - len(prompts)),
      number,
      temperature=settings.get("temperature", 1.0) if sample else 0.0,
      top_k=settings.get("top_k", 0) if sample else 0,
      top_p=settings.get("top_p", 1.0) if sample else 1.0,
      eos_ids={*c.eos_ids, self.eot_token_id},
      mesh=self.mesh,
      finished=lambda tokens: any(stop in text(tokens) for stop in until),
    )
    answers = []
    for tokens in found[: len(prompts)]:
      answer = text(tokens)
      for stop in until:
        answer = answer.split(stop)[0]
      answers.append(answer)
    return answers


def make_rows(
  pairs: Sequence[tuple[list[int], list[int]]], context: int
) -> list[Row]:
  """Rows that score all continuations; pairs with one context share a row."""
  rows: dict[tuple[int, ...], Row] = {}
  full = []
  for request, (prefix, said) in enumerate(pairs):
    prefix, said = fit(prefix, said, context)
    key = tuple(prefix)
    row = rows.get(key)
    if row is not None and len(row.tokens) + len(said) - 1 > context:
      full.append(rows.pop(key))
      row = None
    if row is None:
      n = len(prefix)
      row = rows[key] = Row(list(prefix), list(range(n)), [0] * n, [])
    _add_branch(row, len(prefix), said, request)
  return full + list(rows.values())


def fit(
  prefix: list[int], said: list[int], context: int
) -> tuple[list[int], list[int]]:
  """The end of a pair: `context` tokens to read and the last to predict.

  The prefix loses its beginning first, as in lm-eval's HF model. That model
  stops where the continuation alone is longer; here its end is scored, as
  lm-eval's ONNX model does.
  """
  tokens = (prefix + said)[-context - 1 :]
  number = min(len(said), context)
  return tokens[:-number], tokens[-number:]


def by_length(rows: Sequence[Row], least: int) -> list[tuple[int, list[Row]]]:
  """(padded length, its rows); less than `least` rows join longer ones, as each
  length is a compilation."""
  groups: dict[int, list[Row]] = {}
  for row in rows:
    T = generate.padded_length(len(row.tokens))
    groups.setdefault(T, []).append(row)
  found, carried, longest = [], [], max(groups, default=0)
  for T in sorted(groups):
    carried = carried + groups[T]
    if len(carried) >= least or longest == T:
      found.append((T, carried))
      carried = []
  return found


def _add_branch(row: Row, prefix: int, said: list[int], request: int) -> None:
  """Adds a continuation; its last token is only ever predicted."""
  start = len(row.tokens)
  branch = row.branches[-1] + 1
  row.tokens += said[:-1]
  row.positions += range(prefix, prefix + len(said) - 1)
  row.branches += [branch] * (len(said) - 1)
  columns = [prefix - 1, *range(start, start + len(said) - 1)]
  row.queries += [(c, t, request) for c, t in zip(columns, said, strict=True)]


def pack(rows: Sequence[Row], batch: int, T: int, Q: int) -> list[np.ndarray]:
  """Tokens, positions, branches [B, T], and columns, targets [B, Q] of queries.

  Padding is in branch -1, which no other sees.
  """
  tokens, positions, columns, targets = (
    np.zeros((batch, size), np.int32) for size in (T, T, Q, Q)
  )
  branches = np.full((batch, T), -1, np.int32)
  for b, row in enumerate(rows):
    n, q = len(row.tokens), len(row.queries)
    tokens[b, :n] = row.tokens
    positions[b, :n] = row.positions
    branches[b, :n] = row.branches
    columns[b, :q] = [column for column, _, _ in row.queries]
    targets[b, :q] = _targets(row)
  return [tokens, positions, branches, columns, targets]


@partial(jax.jit, static_argnames=("config", "mesh"))
def _score(
  config: ModelConfig,
  mesh: Mesh,
  params: Params,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  branches_BT: jax.Array,
  columns_BQ: jax.Array,
  targets_BQ: jax.Array,
  blocks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target, and whether none is likelier; [B, Q].

  Only the first `blocks` times `QUERIES` queries are answered.
  """
  params = sharding.whole_embedding(params, mesh)
  inputs = layer.attention_inputs(config, positions_BT, branches_BT)
  x_BTD, _ = decoder.Decoder(config).apply(
    {"params": params},
    tokens_BT,
    dataclasses.replace(inputs, prefix=True),
    method="residual",
  )

  def block(i, found):
    def part(x_BQ):
      return jax.lax.dynamic_slice_in_dim(x_BQ, i * QUERIES, QUERIES, axis=1)

    columns_BC, targets_BC = part(columns_BQ), part(targets_BQ)
    x_BCD = jnp.take_along_axis(x_BTD, columns_BC[..., None], axis=1)
    logits_BCV = generate.head(config, params, x_BCD)
    log_probs_BC, target_BC = losses.log_probs(logits_BCV, targets_BC)
    # As argmax == target, but for exact ties; on a CPU it is 20 times faster.
    hits_BC = target_BC >= logits_BCV.max(-1)
    return [
      jax.lax.dynamic_update_slice_in_dim(all_BQ, new_BC, i * QUERIES, axis=1)
      for all_BQ, new_BC in zip(found, (log_probs_BC, hits_BC), strict=True)
    ]

  shape = columns_BQ.shape
  found = [jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)]
  found = jax.lax.fori_loop(0, blocks, block, found)
  return sharding.whole(tuple(found), mesh)


def _whole_blocks(number: int) -> int:
  return -(-number // QUERIES) * QUERIES


def _targets(row: Row) -> list[int]:
  return [target for _, target, _ in row.queries]


def _check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
  high = max(ids, default=0)
  if high >= vocab_size:
    raise UserError(
      f"token id {high} is outside the model's vocabulary of {vocab_size}: the "
      "tokenizer is not this model's"
    )
