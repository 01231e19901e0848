"""Cut vocabularies against the tokenizers that they were cut from."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from adapt_pruner_jax.data import vocabulary
from adapt_pruner_jax.data.sources import Source, embedded_text
from adapt_pruner_jax.data.tokenizer import Tokenizer, load_tokenizer
from adapt_pruner_jax.errors import UserError

SHARES = (0.9, 0.5, 0.2)  # of what may go, that stays
STRINGS = (
  "def f(x):\n\treturn x ** 2  # naïve café",
  "日本語 and 🙂🙂, “quotes” — 12345",
  "a\u0301\u200bb <|im_end|></s><s> [INST]",
)


def unigram(folder, byte_fallback=False):
  """A unigram tokenizer, learned from the embedded text."""
  model = tokenizers.Tokenizer(models.Unigram())
  model.normalizer = normalizers.NFKC()
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Metaspace()
  special = ["<unk>", "<s>", "</s>"]
  if byte_fallback:
    special += [f"<0x{i:02X}>" for i in range(256)]
  trainer = trainers.UnigramTrainer(
    vocab_size=700, special_tokens=special, unk_token="<unk>"
  )
  model.train_from_iterator(
    embedded_text("train")[:200000].split("\n"), trainer
  )
  content = json.loads(model.to_str())
  if byte_fallback:  # the trainer cannot
    content["model"]["byte_fallback"] = True
    content["added_tokens"] = content["added_tokens"][:3]
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content["decoder"] = {
      "type": "Sequence",
      "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}],
    }
  (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(
  scope="module",
  params=(
    pytest.param("tokenizers/gpt2", marks=pytest.mark.slow),
    "tokenizers/minimind",
    "tokenizers/storyllamas-4096",
    "models/stories260K",
    "models/babyllama-char105-930K",
    "models/babyllama-char361-960K",
    "unigram",
    "unigram bytes",
  ),
)
def opened(request, tmp_path_factory):
  """(tokenizer.json, tokenizer) of each kind."""
  folder = tmp_path_factory.mktemp("tokenizer")
  if request.param.startswith("unigram"):
    unigram(folder, "bytes" in request.param)
  else:
    source = request.getfixturevalue("shared_data") / request.param
    backend = load_tokenizer(source).backend
    (folder / "tokenizer.json").write_text(backend.to_str())
    for file in source.glob("tokenizer_config.json"):
      (folder / file.name).write_bytes(file.read_bytes())
  return vocabulary.read(folder), load_tokenizer(folder)


def cut(opened, share, text):
  """The kept ids and the tokenizer of them."""
  content, tokenizer = opened
  size = max(vocabulary.tokens_of(content)) + 1
  count_V = np.bincount(tokenizer.encode_plain(text), minlength=size)
  always = vocabulary.necessary(content, tokenizer, ())
  least = len(vocabulary.closure(always, vocabulary.parts_of(content)))
  keep = least + int(share * (size - least))
  kept = vocabulary.choose(count_V / count_V.sum(), content, always, keep)
  assert len(kept) == keep
  assert always <= {*kept}
  made = vocabulary.cut(content, kept)
  return kept, tokenizers.Tokenizer.from_str(json.dumps(made))


def texts(seed=0):
  """Words of the held-out text, and strings of characters of all kinds."""
  words = embedded_text("heldout").split(" ")
  draw = random.Random(seed)
  found = [*STRINGS, *(" ".join(draw.choices(words, k=4)) for _ in range(150))]
  alphabet = [*"abcdeö  \n\t0129.,(<s>|", "é", "日", "🙂", "▁", "Ġ"]
  found += ["".join(draw.choices(alphabet, k=12)) for _ in range(150)]
  return found + draw.choices(words, k=600)


@pytest.mark.parametrize("share", SHARES)
def test_same_pieces_wherever_only_kept_tokens_are_used(opened, share):
  """And where they are not, a text that decodes to the same."""
  _, tokenizer = opened
  kept, small = cut(opened, share, embedded_text("train")[:100000])
  new = {int(old): i for i, old in enumerate(kept)}
  same = 0
  for text in texts():
    ids, found = tokenizer.backend.encode(text).ids, small.encode(text).ids
    if {*ids} <= new.keys():
      assert found == [new[i] for i in ids], text
      same += 1
    decode = lambda t, ids: t.decode(ids, skip_special_tokens=False)
    assert decode(small, found) == decode(tokenizer.backend, ids), text
  assert same > 20


def test_a_token_stays_with_what_it_is_merged_from(opened):
  content, _ = opened
  kept, small = cut(opened, 0.3, embedded_text("train")[:100000])
  parts, left = vocabulary.parts_of(content), {*kept.tolist()}
  assert all({*parts.get(i, ())} <= left for i in left)
  tokens, model = vocabulary.tokens_of(content), small.model
  for i in sorted(parts.keys() & left)[-500:]:  # alone, it is made again
    assert [t.value for t in model.tokenize(tokens[i])] == [tokens[i]]


def test_the_rarest_goes_first_and_counts_for_its_parts():
  """By hand: ab is used 5 times, abc 2, cd 3; a b c d are bytes."""
  vocab = {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "abc": 5, "cd": 6}
  merges = [["a", "b"], ["ab", "c"], ["c", "d"]]
  content = {
    "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    "added_tokens": [],
  }
  count_V = np.array([0, 0, 0, 0, 1, 2, 3, 0.0])  # the last row has no token
  choose = lambda keep: vocabulary.choose(count_V, content, {0, 1, 2, 3}, keep)
  assert choose(7).tolist() == [0, 1, 2, 3, 4, 5, 6]
  assert choose(6).tolist() == [0, 1, 2, 3, 4, 6]  # ab: 1 and the 2 of abc
  assert choose(5).tolist() == [0, 1, 2, 3, 4]  # a tie: cd is of a later merge
  with pytest.raises(UserError, match="keep_tokens at least 4"):
    choose(3)


def test_words_of_the_chat_template_stay(shared_data):
  folder = shared_data / "tokenizers" / "minimind"
  content, tokenizer = vocabulary.read(folder), load_tokenizer(folder)
  kept, small = cut((content, tokenizer), 0, "a")
  new = {int(old): i for i, old in enumerate(kept)}
  chat = [{"role": r, "content": ""} for r in ("system", "user", "assistant")]
  ids = tokenizer.encode_chat(chat)
  text = tokenizer.render_chat(chat)
  assert small.encode(text).ids == [new[i] for i in ids]


def test_bad_input(tmp_path, shared_data):
  with pytest.raises(UserError, match="has no tokenizer"):
    vocabulary.read(tmp_path)
  pieces = {"[UNK]": 0, "a": 1}
  backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
  backend.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(
    UserError, match=r"is a WordPiece tokenizer.* cannot be cut"
  ):
    vocabulary.read(tmp_path)
  (tmp_path / "text.txt").write_text("日本語のテキスト" * 9)
  chars = load_tokenizer(shared_data / "models" / "babyllama-char105-930K")
  corpus = [Source("text", str(tmp_path / "text.txt"))]
  with pytest.raises(UserError, match="are <unk>: it does not fit"):
    vocabulary.frequencies(corpus, chars, 105)
  assert isinstance(chars, Tokenizer)
  # Those with bytes know no unknown token; characters come in pieces.
  pieces = load_tokenizer(shared_data / "models" / "stories260K")
  with pytest.raises(UserError, match="are no whole character: it does not"):
    vocabulary.frequencies(corpus, pieces, 512)
