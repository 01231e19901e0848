"""The pair as a model of lm-eval.

All choices of a question are scored in one row: the context once, and behind
it the choices as branches that see the context and themselves, not each other.
The row's logits are only made where a choice is. Every process does the same
requests with the rows cut over the mesh, so results are the same on every host.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.distributed import placement, sharding, stopping
from adapt_pruner_jax.distributed.embedding import embed
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import generate, scoring_rows
from adapt_pruner_jax.evaluation.finite import not_finite
from adapt_pruner_jax.evaluation.lm_eval_words import WordsLM
from adapt_pruner_jax.evaluation.phases import Phase, Phases, silent
from adapt_pruner_jax.evaluation.scoring_rows import QUERIES
from adapt_pruner_jax.models import layer
from adapt_pruner_jax.models.axes import Params
from adapt_pruner_jax.models.decoder import Decoder, head_matrix
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.training import output_loss, output_matrix

AHEAD = 2  # batches that are sent before the answers of the first are taken
FULL_BATCH = 128  # tokens a row up to which as many rows as asked are scored
MAX_NEW_TOKENS = 256  # as lm-eval's HF model, where the task does not say


class JaxLM(WordsLM):
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
    eos_ids: Sequence[int] | None = None,
    phase: Phases = silent,
  ) -> None:
    """Takes a model and how it is to be asked.

    Args:
      batch: rows at a time, rounded up to what the mesh divides; of rows longer
        than `FULL_BATCH` tokens as many less.
      eos_ids: ids that end an answer, beside the tokenizer's own; default the
        config's. See `formats.hf.generation_config.end_tokens`.
      phase: shows how many of the requests are answered.
    """
    super().__init__(config, tokenizer)
    if mesh is None:
      mesh = sharding.one_device()
    shards = placement.batch_shards(mesh)
    self.params, self.mesh, self.shards = params, mesh, shards
    self.batch = -(-batch // shards) * shards
    self.eos_ids = config.eos_ids if eos_ids is None else tuple(eos_ids)
    self.phase = phase
    self.truncated = collections.Counter()

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

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = True
  ) -> list[float]:
    """Log-likelihoods of whole texts, in disjoint windows of the context."""
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
    scored = self.score(windows, "windows")
    for owner, (total, _) in zip(owners, scored, strict=True):
      totals[owner] += total
    return totals

  def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
    """Text up to, and without, the first of the stop strings."""
    answers: dict[int, str] = {}
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(repr(request.args[1]), []).append(i)
    with self.phase("tasks: generate", len(requests), "requests") as phase:
      for members in groups.values():
        for some, texts in self._generated(requests, members):
          answers |= zip(some, texts, strict=True)
          phase.update(len(answers))
    return [answers[i] for i in range(len(requests))]

  def _generated(
    self, requests: Sequence[Instance], members: list[int]
  ) -> Iterator[tuple[list[int], list[str]]]:
    """Batches of requests with the same settings, and their answers."""
    settings = normalize_gen_kwargs(
      requests[members[0]].args[1], MAX_NEW_TOKENS
    )
    prompts = {
      i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
      for i in members
    }
    number, longest = self._room(settings)
    lengths = [len(prompts[i]) for i in members]
    self._note_truncated([requests[i] for i in members], lengths, longest)
    members = sorted(members, key=lambda i: -len(prompts[i]))
    for start in range(0, len(members), self.batch):
      stopping.moment()
      some = members[start : start + self.batch]
      ends = [prompts[i][-longest:] for i in some]
      yield some, self._continue(ends, number, settings)

  def score(
    self, pairs: scoring_rows.Pairs, unit: str = "requests"
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy would say it.

    An empty continuation is certain: (0.0, True).

    Args:
      pairs: (context, continuation) as token ids. What is longer than the
        model's context loses tokens from the left, see `scoring_rows.fit`.
      unit: what a pair is called where progress is shown.

    Raises:
      UserError: an id is outside the vocabulary, or a log-likelihood is not
        finite.
    """
    # A memory cannot go on in several ways within a row.
    shared = not any(self.model_config.delta)
    rows = scoring_rows.make_rows(pairs, self.model_config.context, shared)
    ids = [
      t for row in rows for t in (*row.tokens, *scoring_rows.targets_of(row))
    ]
    _check_vocabulary(ids, self.model_config.vocab_size)
    totals, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    with self.phase("tasks: score", len(pairs), unit) as phase:
      for some, log_probs_BQ, hits_BQ in self._scored(rows, phase):
        for b, row in enumerate(some):
          owners = [owner for _, _, owner in row.queries]
          new_Q = log_probs_BQ[b, : len(owners)].astype(float)
          np.add.at(totals, owners, new_Q)
          np.logical_and.at(greedy, owners, hits_BQ[b, : len(owners)])
    bad = np.count_nonzero(~np.isfinite(totals))
    if bad:
      what = f"{bad} of {len(pairs)} log-likelihoods"
      raise not_finite(what, self.params)
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))

  def _scored(
    self, rows: list[scoring_rows.Row], phase: Phase
  ) -> Iterator[tuple[list[scoring_rows.Row], np.ndarray, np.ndarray]]:
    """Batches of rows with their log-probabilities and hits, [B, Q].

    The devices are always given work before answers are waited for.
    """
    sent, done = collections.deque(), 0
    batches = self._batches(rows)
    while True:
      stopping.moment()
      for some, T, Q in itertools.islice(batches, AHEAD - len(sent)):
        sent.append((some, self._send(some, T, Q)))
      if not sent:
        return
      some, found = sent.popleft()
      yield some, *map(np.asarray, found)
      done += sum(row.number for row in some)
      phase.update(done)

  def _batches(
    self, rows: list[scoring_rows.Row]
  ) -> Iterator[tuple[list[scoring_rows.Row], int, int]]:
    """Rows of about the same length, their padded length and queries."""
    for T, members in scoring_rows.by_length(rows, 2 * self.batch):
      # Rows of a batch are to have about as many queries, see `_score`.
      members.sort(key=lambda row: len(row.queries))
      longest = generate.padded_length(len(members[-1].queries))
      B = self._rows_at_once(T)
      for start in range(0, len(members), B):
        some = members[start : start + B]
        yield some, T, scoring_rows.whole_blocks(longest)

  def _send(self, some: list[scoring_rows.Row], T: int, Q: int) -> Any:
    """Starts `_score` of a batch."""
    arrays = scoring_rows.pack(some, self._rows_at_once(T), T, Q)
    placed = [placement.place_rows(array, self.mesh) for array in arrays]
    number = scoring_rows.whole_blocks(len(some[-1].queries)) // QUERIES
    return _score(
      self.model_config, self.mesh, self.params, *placed, np.int32(number)
    )

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
    number, context = settings["max_gen_toks"], self.model_config.context
    if number >= context:
      raise UserError(
        f"the task generates {number} tokens, which leaves no room for a "
        f"prompt in the model's context of {context}"
      )
    return number, context - number

  def _continue(
    self, prompts: list[list[int]], number: int, settings: Mapping[str, Any]
  ) -> list[str]:
    until = [stop for stop in settings["until"] if stop]

    def text(tokens):
      return self.words.backend.decode(tokens, skip_special_tokens=True)

    found = generate.generate(
      self.model_config,
      self.params,
      prompts + [[0]] * (self.batch - len(prompts)),
      number,
      _sampling(settings),
      eos_ids=self._end_tokens(until),
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

  def _end_tokens(self, until: Sequence[str]) -> tuple[int, ...]:
    """Ids that end an answer. Special tokens among the stop strings are: they
    are not in the text that is searched for the others."""
    added = self.words.backend.get_added_tokens_decoder()
    stops = [i for i, t in added.items() if t.special and t.content in until]
    own = self.words.eos_id
    own = () if own is None else (own,)
    return tuple(sorted({*self.eos_ids, *own, *stops}))


def _sampling(settings: Mapping[str, Any]) -> generate.Sampling:
  if not settings["do_sample"]:
    return generate.Sampling()
  return generate.Sampling(
    settings.get("temperature", 1.0),
    settings.get("top_k", 0),
    settings.get("top_p", 1.0),
  )


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
  inputs = layer.attention_inputs(config, positions_BT, branches_BT)
  apply = partial(Decoder(config).apply, {"params": params})
  x_BTD, _ = apply(
    embed(config, params, tokens_BT, mesh),
    dataclasses.replace(inputs, prefix=True),
    method="residual",
  )

  x_BTD = apply(x_BTD, method="normed")
  matrix = output_matrix.place(config, head_matrix(config, params), mesh)

  def block(i, found):
    def part(x_BQ):
      return jax.lax.dynamic_slice_in_dim(x_BQ, i * QUERIES, QUERIES, axis=1)

    columns_BC, targets_BC = part(columns_BQ), part(targets_BQ)
    x_BCD = jnp.take_along_axis(x_BTD, columns_BC[..., None], axis=1)
    new = output_loss.token_log_probs(config, mesh, matrix, x_BCD, targets_BC)
    return [
      jax.lax.dynamic_update_slice_in_dim(all_BQ, new_BC, i * QUERIES, axis=1)
      for all_BQ, new_BC in zip(found, new, strict=True)
    ]

  shape = columns_BQ.shape
  found = [jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)]
  found = jax.lax.fori_loop(0, blocks, block, found)
  return sharding.whole(tuple(found), mesh)


def _check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
  high = max(ids, default=0)
  if high >= vocab_size:
    raise UserError(
      f"token id {high} is outside the model's vocabulary of {vocab_size}: the "
      "tokenizer is not this model's"
    )
