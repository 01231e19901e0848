"""A smaller vocabulary: which tokens stay, and the tokenizer of them alone.

The tokens that stay are closed under the tokenizer's merges: what a token was
merged from stays with it, so that any text of which the original makes these
tokens alone becomes the same tokens again. Any other text becomes smaller
pieces, in the end characters or bytes, which always stay.
"""

import heapq
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from adapt_pruner_jax.data.sources import Source
from adapt_pruner_jax.data.token_store import tokenise
from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.storage import json_files

Content = dict[str, Any]  # of a tokenizer.json
KINDS = ("BPE", "Unigram")
BYTES = frozenset(f"<0x{i:02X}>" for i in range(256))
SPACE = "▁"  # SentencePiece's; as bytes it would not become a space again
MARKS = ("continuing_subword_prefix", "end_of_word_suffix")  # of words
# Of a corpus's tokens, the most that may be unknown to the tokenizer, and the
# most that may be a few bytes of a character that it has no token for.
UNKNOWN_SHARE, BROKEN_SHARE = 0.1, 0.5
PIECE = 1 << 22  # tokens that are counted at a time
# What a chat template is asked to lay out, so that its words can be kept.
CHATS = (
  ("system", "user", "assistant", "user"),
  ("user", "assistant", "user"),
  ("user",),
)


def read(folder: Path) -> Content:
  """The tokenizer.json of a directory, if its vocabulary can be cut.

  Raises:
    UserError: there is none, or it is of a kind that cannot.
  """
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise UserError(
      f"vocab: {folder} has no tokenizer.json, and no other kind of tokenizer "
      "can be cut: save it once with Transformers' AutoTokenizer, or leave "
      "--config.vocab out"
    )
  content = json_files.read_json(file)
  model = content["model"]
  kind = model.get("type")
  marked = [name for name in MARKS if model.get(name)]
  if kind not in KINDS or marked:
    marks = f" with {marked[0]}" if marked else ""
    raise UserError(
      f"vocab: {file} is a {kind} tokenizer{marks}, which cannot be cut; "
      f"{' and '.join(KINDS)} without marks of words can: leave --config.vocab "
      "out"
    )
  return content


# ---- Which tokens ------------------------------------------------------------


def frequencies(
  sources: Sequence[Source],
  tokenizer: Tokenizer,
  vocab_size: int,
  cache_dir: Path | None = None,
  say: Callable[[str], None] | None = None,
) -> np.ndarray:
  """How often a corpus has each token, as a share of all, float64 [V].

  Args:
    sources: of the corpus, by their weights.
    tokenizer: the model's.
    vocab_size: V; larger ids are an error.
    cache_dir, say: see `tokenise`.

  Raises:
    UserError: a source cannot be read, or is not of the tokenizer's language.
  """
  share_V = np.zeros(vocab_size)
  total = sum(source.weight for source in sources)
  for source in sources:
    tokens = tokenise(source, tokenizer, vocab_size, cache_dir, say).tokens
    count_V = np.zeros(vocab_size, np.int64)
    for first in range(0, len(tokens), PIECE):
      piece = tokens[first : first + PIECE]
      count_V += np.bincount(piece, minlength=vocab_size)
    share_V += source.weight / total * count_V / len(tokens)
    _check_known(count_V, tokenizer, source)
  return share_V


def _check_known(
  count_V: np.ndarray, tokenizer: Tokenizer, source: Source
) -> None:
  """Raises a UserError for a corpus that the tokenizer mostly cannot read."""
  backend = tokenizer.backend
  unknown = getattr(backend.model, "unk_token", None)
  used = np.flatnonzero(count_V)
  texts = backend.decode_batch([[i] for i in used], skip_special_tokens=False)
  broken = [i for i, x in zip(used, texts, strict=True) if "\ufffd" in x]
  known = [i for i in used if backend.id_to_token(i) != unknown]
  for number, most, what in (
    (count_V.sum() - count_V[known].sum(), UNKNOWN_SHARE, unknown),
    (count_V[broken].sum(), BROKEN_SHARE, "no whole character"),
  ):
    share = number / count_V.sum()
    if share > most:
      raise UserError(
        f"vocab.source: {share:.0%} of the tokens of {source} are {what}: it "
        "does not fit the model's tokenizer; give text as the model was made "
        "for"
      )


def tokens_of(content: Content) -> dict[int, str]:
  """Every token of a tokenizer by its id, added ones too."""
  vocab = content["model"]["vocab"]
  if content["model"]["type"] == "Unigram":
    found = {i: piece for i, (piece, _) in enumerate(vocab)}
  else:
    found = {i: token for token, i in vocab.items()}
  return found | {t["id"]: t["content"] for t in content["added_tokens"]}


def parts_of(content: Content) -> dict[int, tuple[int, int]]:
  """The two tokens that each token is merged from; unigrams have none.

  It is the last merge when the token stands alone. Beside others it comes about
  by the same merges, in the same order: none of them reaches out of it.
  """
  model = content["model"]
  if model["type"] == "Unigram":
    return {}
  ids, ranks = model["vocab"], {}
  added = {token["content"] for token in content["added_tokens"]}
  for rank, merge in enumerate(model["merges"]):
    ranks.setdefault(_pair(merge), rank)
  found = {}
  for token in ids.keys() - added:
    symbols, last = list(token), None
    while len(symbols) > 1:
      pairs = list(itertools.pairwise(symbols))
      best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], 1 << 60))
      if pairs[best] not in ranks:
        break
      last = pairs[best]
      symbols[best : best + 2] = ["".join(last)]
    if last and len(symbols) == 1:
      found[ids[token]] = (ids[last[0]], ids[last[1]])
  return found


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
  left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
  return left, right


def necessary(
  content: Content, tokenizer: Tokenizer, named: Collection[int]
) -> set[int]:
  """The ids that stay whatever the corpus: what any text can be written in,
  special and added tokens, and the words of the chat template.

  Args:
    content: of tokenizer.json.
    tokenizer: the same, opened.
    named: ids that the model's files name, as the end of a text.
  """
  model, tokens = content["model"], tokens_of(content)
  found = {token["id"] for token in content["added_tokens"]} | {*named}
  found |= {*tokenizer.encode("")} | _chat_ids(tokenizer)
  fallback = bool(model.get("byte_fallback")) and {*tokens.values()} >= BYTES
  for number, token in tokens.items():
    always = token in BYTES or token == SPACE if fallback else len(token) == 1
    if always or token == model.get("unk_token"):
      found.add(number)
  if model["type"] == "Unigram":
    # What an unknown character costs follows from the least score.
    scores = [score for _, score in model["vocab"]]
    found.add(int(np.argmin(scores)))
    found |= {model["unk_id"]} - {None}
  return found


def _chat_ids(tokenizer: Tokenizer) -> set[int]:
  """Tokens of the chat template's own texts, and of the roles between them."""
  texts = []
  for template in (tokenizer.chat_template, tokenizer.tool_template):
    if template is not None:
      texts += _literals(template)
  if tokenizer.chat_template is not None:
    for roles in CHATS:
      chat = [{"role": role, "content": ""} for role in roles]
      try:
        texts.append(tokenizer.render_chat(chat, prompt=True))
        break
      except UserError:  # a template may refuse the order of the roles
        continue
  return {i for text in texts for i in tokenizer.encode_plain(text)}


def _literals(template: str) -> list[str]:
  """What a Jinja template says itself: text outside of its marks, strings."""
  try:
    lexed = list(jinja2.Environment(autoescape=False).lex(template))
  except jinja2.TemplateError:
    return []
  texts = [text for _, kind, text in lexed if kind == "data"]
  for _, kind, text in lexed:
    if kind == "string":  # with its quotes
      texts.append(re.sub(r"\\n", "\n", text[1:-1]))
  return texts


def closure(
  ids: Collection[int], parts: Mapping[int, tuple[int, int]]
) -> set[int]:
  """These tokens, and all that they are merged from."""
  found, waiting = set(), [*ids]
  while waiting:
    number = waiting.pop()
    if number not in found:
      found.add(number)
      waiting += parts.get(number, ())
  return found


def choose(
  share_V: np.ndarray,
  content: Content,
  always: Collection[int],
  keep: int,
) -> np.ndarray:
  """The ids of the `keep` tokens that stay, sorted; closed under the merges.

  The rarest token that no other is merged from goes first, and its two parts
  are used as often in its place. Among tokens that the corpus does not have the
  highest id goes first: it was merged last. Rows of no token go before all.

  Args:
    share_V: how often each token is used.
    content: of tokenizer.json.
    always: ids that stay, see `necessary`.
    keep: how many stay.

  Raises:
    UserError: more than `keep` must stay.
  """
  size = len(share_V)
  parts = {i: p for i, p in parts_of(content).items() if i < size}
  stays = {i for i in closure(always, parts) if 0 <= i < size}
  if len(stays) > keep:
    raise UserError(
      f"vocab: {keep:,} tokens are too few: {len(stays):,} must stay (special "
      "and added tokens, the chat template's words, bytes or characters, and "
      f"what they are merged from); give --config.vocab.keep_tokens at least "
      f"{len(stays)}"
    )
  tokens, share = tokens_of(content), [float(x) for x in share_V]
  users = [0] * size
  for pair in parts.values():
    for part in pair:
      users[part] += 1

  def entry(number: int) -> tuple[float, int]:
    return share[number] if number in tokens else -1.0, -number

  leaves = [entry(i) for i in range(size) if not users[i] and i not in stays]
  heapq.heapify(leaves)
  left = np.ones(size, bool)
  for _ in range(size - keep):
    _, negative = heapq.heappop(leaves)
    left[-negative] = False
    for part in parts.get(-negative, ()):
      users[part] -= 1
      share[part] += share[-negative]
      if not users[part] and part not in stays:
        heapq.heappush(leaves, entry(part))
  return np.flatnonzero(left)


# ---- The tokenizer of them ---------------------------------------------------


def cut(content: Content, kept: np.ndarray) -> Content:
  """The tokenizer.json of the kept tokens, numbered from 0 in their order.

  Raises:
    UserError: the `tokenizers` package numbers them in another way.
  """
  new = {int(old): number for number, old in enumerate(kept)}
  model = dict(content["model"])
  if model["type"] == "Unigram":
    pieces = enumerate(model["vocab"])
    model["vocab"] = [piece for i, piece in pieces if i in new]
    if model["unk_id"] is not None:
      model["unk_id"] = new[model["unk_id"]]
  else:
    vocab = model["vocab"]
    left = {t: new[i] for t, i in vocab.items() if i in new}
    model["vocab"], model["merges"] = (
      left,
      [
        merge
        for merge in model["merges"]
        if {*_pair(merge), "".join(_pair(merge))} <= left.keys()
      ],
    )
  added = [t for t in content["added_tokens"] if t["id"] in new]
  result = content | {
    "model": model,
    "added_tokens": [t | {"id": new[t["id"]]} for t in added],
    "post_processor": _renumbered(content.get("post_processor"), new),
  }
  if padding := content.get("padding"):
    result["padding"] = padding | {"pad_id": new.get(padding["pad_id"], 0)}
  _check_numbers(result, content, kept)
  return result


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
  """A post-processor, which names special tokens by text and id."""
  if not isinstance(step, dict):
    return step
  step = dict(step)
  if "processors" in step:
    step["processors"] = [_renumbered(x, new) for x in step["processors"]]
  for name in ("sep", "cls"):
    if name in step:
      text, number = step[name]
      step[name] = [text, new[number]]
  if "special_tokens" in step:
    step["special_tokens"] = {
      name: token | {"ids": [new[i] for i in token["ids"]]}
      for name, token in step["special_tokens"].items()
    }
  return step


def _check_numbers(result: Content, content: Content, kept: np.ndarray) -> None:
  import tokenizers

  try:
    backend = tokenizers.Tokenizer.from_str(json.dumps(result))
  except Exception as error:  # the package raises bare Exception
    raise UserError(
      f"vocab: this tokenizer cannot be cut: {first_line(error)}"
    ) from error
  tokens = tokens_of(content)
  for number, old in enumerate(kept):
    token = tokens.get(int(old))
    if token is not None and backend.token_to_id(token) != number:
      raise UserError(
        f"vocab: this tokenizer cannot be cut: it numbers {token!r} "
        f"{backend.token_to_id(token)}, not {number}"
      )
