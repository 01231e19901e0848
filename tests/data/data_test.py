"""Sources, tokenising, packing, order: every byte that a model learns from."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from adapt_pruner_jax.config import Calibration, Data
from adapt_pruner_jax.data import packing, sources, token_store
from adapt_pruner_jax.data.calibration import calibration_data
from adapt_pruner_jax.data.tokenizer import check_ids, load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models import decoder, model_config
from adapt_pruner_jax.models.rope import Rope

WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
V = len(SPECIALS) + len(WORDS)
EOS = SPECIALS.index("</s>")
BOS = SPECIALS.index("<s>")

# As Qwen's, with Transformers' tag around what the assistant says.
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n"
  "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ids_of(*words):
  return [len(SPECIALS) + int(w[1:]) for w in words]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A directory with a tokenizer that has a token a word."""
  folder = tmp_path_factory.mktemp("tokenizer")
  vocab = {word: i for i, word in enumerate(SPECIALS + WORDS)}
  vocab |= {"user": V, "assistant": V + 1}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.add_special_tokens(SPECIALS)
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", BOS)]
  )
  backend.enable_truncation(8)  # as some published files have
  backend.enable_padding(length=16)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": TEMPLATE,
      }
    )
  )
  return folder


@pytest.fixture(scope="session")
def words(folder):
  return load_tokenizer(folder)


def write(path, content):
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif isinstance(content, str):
    path.write_text(content)
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
  return path


def contents(spec):
  return [
    d.content
    for source in sources.parse_sources(spec, "data.source")
    for d in sources.read_documents(source)
  ]


def error(match):
  """The block raises a UserError, of one line, that matches."""
  return pytest.raises(UserError, match=r"^(?!.*\n)(?s:.*)" + match)


# ---- Tokenizer ---------------------------------------------------------------


def test_tokenizer_ids(words):
  assert (words.bos_id, words.eos_id) == (BOS, EOS)
  assert words.encode("w1 w2") == [BOS, *ids_of("w1", "w2")]
  assert words.encode_plain("w1 w2") == ids_of("w1", "w2")
  assert words.encode_batch(["w1", ""]) == [[BOS, *ids_of("w1")], [BOS]]


def test_tokenizer_neither_truncates_nor_pads(words):
  assert len(words.encode_plain("w3 " * 50)) == 50
  assert len(words.encode_plain("w3 " * 3)) == 3


def test_tokenizer_as_transformers(folder, words):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  text = "w1 w2 </s> w3"
  assert words.encode(text) == theirs(text)["input_ids"]
  assert words.bos_id == theirs.bos_token_id
  chat = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
  ]
  assert words.encode_chat(chat) == theirs.apply_chat_template(
    chat, return_dict=False
  )


def test_tokenizer_ids_from_model_config(folder, tmp_path):
  """Without a tokenizer_config.json, config.json says what the end is."""
  write(tmp_path / "tokenizer.json", (folder / "tokenizer.json").read_text())
  write(tmp_path / "config.json", '{"eos_token_id": [2, 4], "bos_token_id": 1}')
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS, EOS)
  assert tokenizer.chat_template is None


def test_tokenizer_is_converted(tmp_path):
  """A directory with GPT-2's files only."""
  pytest.importorskip("transformers")
  vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġab": 5}
  write(tmp_path / "vocab.json", json.dumps(vocab))
  write(tmp_path / "merges.txt", "#version: 0.2\na b\nĠ ab\n")
  write(
    tmp_path / "tokenizer_config.json",
    '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}',
  )
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode("ab ab") == [3, 5]
  assert tokenizer.eos_id == 0


def test_tokenizer_errors(folder, tmp_path):
  with error("no such directory"):
    load_tokenizer(tmp_path / "missing")
  with error("has no tokenizer"):
    load_tokenizer(tmp_path)
  write(tmp_path / "tokenizer.json", "{")
  with error("tokenizer.json cannot be read"):
    load_tokenizer(tmp_path)
  write(tmp_path / "tokenizer.json", (folder / "tokenizer.json").read_text())
  write(tmp_path / "tokenizer_config.json", "{")
  with error("tokenizer_config.json is damaged, it is not JSON"):
    load_tokenizer(tmp_path)


def test_tokenizer_never_runs_code_of_the_directory(tmp_path):
  pytest.importorskip("transformers")
  write(tmp_path / "vocab.json", "{}")
  write(tmp_path / "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
  write(
    tmp_path / "tokenizer_config.json",
    '{"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", null]}}',
  )
  with error("cannot be converted"):
    load_tokenizer(tmp_path)
  assert not (tmp_path / "ran").exists()


def test_ids_outside_the_vocabulary(words):
  check_ids(np.array([0, 5]), 6, "here")
  check_ids(np.array([], np.int64), 6, "here")
  with error(r"here: token id 6 \('w1'\) is outside .* vocabulary of 6"):
    check_ids(np.array([0, 6]), 6, "here", words)
  with error("token id -1 "):
    check_ids(np.array([-1]), 6, "here")
  with error("token id 44 "):
    packing.heldout_tokens("w0 w39", words, V - 1)


# ---- Chats -------------------------------------------------------------------

CHAT = [
  {"role": "user", "content": "w1 w2"},
  {"role": "assistant", "content": "w3"},
  {"role": "user", "content": "w4"},
  {"role": "assistant", "content": "w5 w6"},
]
START, END, USER, ASSISTANT = 3, 4, V, V + 1


def test_chat_masks(words):
  ids, said = words.encode_chat_said(CHAT)
  turns = [
    ([START, USER, *ids_of("w1", "w2"), END], 0),
    ([START, ASSISTANT], 0),
    ([*ids_of("w3"), END], 1),
    ([START, USER, *ids_of("w4"), END], 0),
    ([START, ASSISTANT], 0),
    ([*ids_of("w5", "w6"), END], 1),
  ]
  assert ids == [i for turn, _ in turns for i in turn]
  assert said.tolist() == [bool(s) for turn, s in turns for _ in turn]
  assert words.encode_chat(CHAT) == ids


def test_chat_prompt_that_opens_a_thought(words):
  """The turn starts where the prompt and the turn part (DeepSeek-R1)."""
  template = TEMPLATE.replace("assistant\n{% endif", "assistant\nw9{% endif")
  thinker = dataclasses.replace(words, chat_template=template)
  _, said = thinker.encode_chat_said(CHAT[:2])
  assert said.tolist() == [False] * 7 + [True] * 2  # w3 shares its w with w9


def test_chat_errors(words):
  def render(template, chat=CHAT):
    return dataclasses.replace(words, chat_template=template).encode_chat_said(
      chat
    )

  with error("has no chat template"):
    render(None)
  with error("cannot render the chat: no system"):
    render("{{ raise_exception('no system') }}")
  with error("cannot render the chat"):
    render("{% for %}")
  with error("cannot render the chat"):  # the sandbox holds
    render("{{ ''.__class__.__mro__ }}")
  with error("turn 2 in another way"):
    render("{{ messages | length }}")


def test_chat_does_not_depend_on_the_date(words):
  dated = dataclasses.replace(words, chat_template="{{ strftime_now('%Y') }}")
  assert dated._apply_template(CHAT) == "26 Jul 2024"


# ---- Sources -----------------------------------------------------------------


def test_parse_sources():
  parse = lambda spec: sources.parse_sources(spec, "data.source")
  assert parse("embedded") == [sources.Source("embedded")]
  assert parse("text:a, b.txt") == [sources.Source("text", "a, b.txt")]
  assert parse("text:a.txt,weight=0.7,jsonl:b=1.jsonl,loss=assistant") == [
    sources.Source("text", "a.txt", weight=0.7),
    sources.Source("jsonl", "b=1.jsonl", loss="assistant"),
  ]
  assert parse("hf:org/name,subset=en,split=train[:5%],limit=7") == [
    sources.Source("hf", "org/name", subset="en", split="train[:5%]", limit=7)
  ]


@pytest.mark.parametrize(
  ("spec", "match"),
  [
    ("", "'' is not a kind of source"),
    ("txt:a", r"'txt' is not a kind of source \(did you mean text\?\)"),
    ("text", "text should be text:NAME"),
    ("embedded:x", "should be embedded"),
    ("text:a,wieght=1", r"no option 'wieght' \(did you mean weight\?\)"),
    ("text:a,loss=all", "no option 'loss'"),
    ("text:a,weight=x", "weight=x is not a number > 0"),
    ("text:a,weight=0", "weight=0 is not a number > 0"),
    ("text:a,weight=nan", "not a number > 0"),
    ("text:a,limit=-1", "limit=-1 is not a number > 0"),
    ("jsonl:a,loss=user", "loss=user is not one of all, assistant"),
    ("embedded,split=test", "split=test is not one of train, heldout"),
    ("npy:a,text:b", "npy:FILE cannot be mixed"),
  ],
)
def test_parse_sources_errors(spec, match):
  with error(match):
    sources.parse_sources(spec, "data.source")


def test_embedded():
  train, heldout = contents("embedded"), contents("embedded,split=heldout")
  assert not set(train) & set(heldout)
  size = sum(map(len, train))
  assert size > 300_000
  assert 0.03 < sum(map(len, heldout)) / size < 0.25
  assert sources.embedded_text("heldout") == "\n\n".join(heldout)
  assert len(contents("embedded,limit=3")) == 3


def test_text(tmp_path):
  path = write(tmp_path / "a.txt", "one\ntwo\n\n<|endoftext|>\nthree\n")
  assert contents(f"text:{path}") == ["one\ntwo", "three"]
  write(path, b"\xef\xbb\xbfone\r\ntwo\r\n")
  assert contents(f"text:{path}") == ["one\ntwo"]
  assert sources.read_text(path) == "one\ntwo\n"


def test_long_text_is_cut_at_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 6)
  path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
  assert contents(f"text:{path}") == ["one\ntwo", "three"]


def test_text_errors(tmp_path):
  path = tmp_path / "a.txt"
  for read in (sources.read_text, lambda p: contents(f"text:{p}")):
    with error("a.txt: No such file"):
      read(path)
    with error("Is a directory"):
      read(tmp_path)
    write(path, "")
    with error("a.txt is empty"):
      read(path)
    write(path, " \n\n")
    with error("a.txt is empty"):
      read(path)
    write(path, "né\n".encode() + b"ab\xe9\n")
    with error("not UTF-8: byte 0xe9 at offset 6"):
      read(path)
    path.unlink()


def test_jsonl(tmp_path):
  rows = [{"text": "one"}, {"messages": CHAT}, {"text": ""}, {"text": "two"}]
  path = write(tmp_path / "a.jsonl", rows)
  assert contents(f"jsonl:{path}") == ["one", CHAT, "two"]
  write(path, [{"body": "one"}])
  assert contents(f"jsonl:{path},column=body") == ["one"]


@pytest.mark.parametrize(
  ("row", "match"),
  [
    ("{", "a.jsonl line 2 is not valid JSON"),
    ("[]", "line 2 is not an object"),
    ('{"body": "x"}', "line 2 has no text or messages; it has body; .*column"),
    ('{"text": 3}', "line 2: text is int, not a string or a list"),
    ('{"messages": ["x"]}', r"line 2: messages\[0\] is not an object"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no string 'con"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at offset 26"),
  ],
)
def test_jsonl_errors(tmp_path, row, match):
  row = row if isinstance(row, bytes) else row.encode()
  path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + row + b"\n")
  with error(match):
    contents(f"jsonl:{path}")


def test_jsonl_assistant_needs_chats(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "one"}])
  with error("line 2 is plain text, and loss=assistant needs chats"):
    contents(f"jsonl:{path},loss=assistant")


def test_broken_chat_names_its_row(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 2)
  raiser = "{{ raise_exception('no system') }}"
  tokenizer = dataclasses.replace(words, chat_template=raiser)
  source = sources.Source("jsonl", str(path))
  with error("a.jsonl line 1: .*no system"):
    token_store.tokenise(source, tokenizer, V + 2)


def test_hf(tmp_path):
  datasets = pytest.importorskip("datasets")
  rows = datasets.Dataset.from_dict({"text": ["one", "", "two"]})
  rows.save_to_disk(tmp_path / "one")
  assert contents(f"hf:{tmp_path}/one") == ["one", "two"]
  chats = datasets.Dataset.from_dict({"messages": [CHAT[:2]]})
  both = datasets.DatasetDict({"train": rows, "chat": chats})
  both.save_to_disk(tmp_path / "both")
  assert contents(f"hf:{tmp_path}/both") == ["one", "two"]
  assert contents(f"hf:{tmp_path}/both,split=chat") == [CHAT[:2]]
  with error("split=test.* cannot be loaded"):
    contents(f"hf:{tmp_path}/both,split=test")
  with error("row 0 has no body; it has text; .*column=NAME"):
    contents(f"hf:{tmp_path}/one,column=body")
  with error("no such directory"):
    contents(f"hf:{tmp_path}/missing")
  (tmp_path / "empty").mkdir()
  with error("cannot be loaded"):
    contents(f"hf:{tmp_path}/empty")


def test_hf_limit_streams(tmp_path):
  """A directory of data files, as on the hub, read no further than asked."""
  pytest.importorskip("datasets")
  write(tmp_path / "train.jsonl", [{"text": w} for w in WORDS])
  assert contents(f"hf:{tmp_path},limit=3") == WORDS[:3]


def test_hf_without_network(monkeypatch):
  datasets = pytest.importorskip("datasets")

  def offline(*args, **kwargs):
    raise ConnectionError("Couldn't reach the hub\nfor many reasons")

  monkeypatch.setattr(datasets, "load_dataset", offline)
  with error("Couldn't reach the hub; without network, give a directory"):
    contents("hf:org/name")


def test_tfds(monkeypatch):
  """A stand-in of tfds.data_source, which hands strings out as bytes."""

  def data_source(name, split):
    if split != "train":
      raise ValueError(f"Unknown split {split!r}")
    return [{"text": t, "label": 1} for t in ("oné".encode(), b"", b"\xff")]

  package = types.SimpleNamespace(data_source=data_source)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", package)
  assert contents("tfds:lm1b,limit=1") == ["oné"]
  with error("tfds:lm1b row 2 is not UTF-8"):
    contents("tfds:lm1b")
  with error("split=test.* cannot be loaded: Unknown split 'test'"):
    contents("tfds:lm1b,split=test")
  with error("no such directory"):
    contents("tfds:./missing")


@pytest.mark.parametrize(
  ("spec", "package", "extra"),
  [
    ("hf:org/name", "datasets", "data"),
    ("tfds:lm1b", "tensorflow_datasets", "tfds"),
  ],
)
def test_missing_package_names_its_extra(monkeypatch, spec, package, extra):
  monkeypatch.setitem(sys.modules, package, None)
  with error(rf"pip install 'adapt_pruner_jax\[{extra}\]'"):
    contents(spec)


# ---- Streams -----------------------------------------------------------------


def test_stream(tmp_path, words):
  rows = [{"text": "w1 w2"}, {"messages": CHAT[:2]}, {"text": "w3 </s>"}]
  path = write(tmp_path / "a.jsonl", rows)
  source = sources.Source("jsonl", str(path))
  stream = token_store.tokenise(source, words, V + 2)
  chat = words.encode_chat(CHAT[:2])  # closed by its own template
  parts = [
    [BOS, *ids_of("w1", "w2"), EOS],
    chat,
    [BOS, *ids_of("w3"), EOS],  # closed once
  ]
  assert stream.tokens.tolist() == [i for part in parts for i in part]
  assert stream.tokens.dtype == np.int32
  assert stream.starts.tolist() == [0, 4, 4 + len(chat)]
  assert stream.trained is None


def test_stream_does_not_depend_on_groups(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
  source = sources.Source("jsonl", str(path))
  whole = token_store.tokenise(source, words, V)
  monkeypatch.setattr(token_store, "GROUP_CHARS", 7)
  grouped = token_store.tokenise(source, words, V)
  np.testing.assert_array_equal(whole.tokens, grouped.tokens)
  np.testing.assert_array_equal(whole.starts, grouped.starts)
  assert whole.fingerprint == grouped.fingerprint


def test_stream_error_names_row_and_id(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": "w1 w39"}])
  with error(r"a.jsonl line 2: token id 44 \('w39'\) is outside"):
    token_store.tokenise(sources.Source("jsonl", str(path)), words, V - 1)


def test_cache(tmp_path, words, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
  source = sources.Source("jsonl", str(path), loss="assistant")
  cache = tmp_path / "cache"
  plain = token_store.tokenise(source, words, V + 2)
  written = token_store.tokenise(source, words, V + 2, cache)

  def unread(_):
    raise AssertionError("was tokenised again")

  with monkeypatch.context() as patch:
    patch.setattr(token_store, "read_documents", unread)
    again = token_store.tokenise(source, words, V + 2, cache)
    with error("token id 46 .*is outside"):  # still checked
      token_store.tokenise(source, words, V + 1, cache)
  for stream in (written, again):
    for field in ("tokens", "starts", "trained"):
      np.testing.assert_array_equal(
        getattr(plain, field), getattr(stream, field)
      )
    assert stream.fingerprint == plain.fingerprint

  # A changed file, another tokenizer and another loss are other streams.
  other = dataclasses.replace(words, chat_template="w1 " + TEMPLATE)
  assert len(token_store.tokenise(source, other, V + 2, cache).tokens) > len(
    plain.tokens
  )
  write(path, [{"messages": CHAT}] * 4)
  assert len(token_store.tokenise(source, words, V + 2, cache).starts) == 4
  everything = dataclasses.replace(source, loss="all")
  assert token_store.tokenise(everything, words, V + 2, cache).trained is None
  assert len(list(cache.iterdir())) == 4


def test_cache_written_by_two_processes(tmp_path, words):
  """The second to finish uses what the first wrote."""
  source = sources.Source("text", str(write(tmp_path / "a.txt", "w1 w2")))
  folder = tmp_path / "cache" / "text-1"
  for _ in range(2):
    token_store._write_cache(folder, {}, token_store._chunks(source, words, V))
  assert token_store._read_cache(folder)[0][0].tolist() == [
    BOS,
    *ids_of("w1", "w2"),
    EOS,
  ]
  assert [p.name for p in folder.parent.iterdir()] == ["text-1"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damaged_cache_is_made_again(tmp_path, words, damage):
  path = write(tmp_path / "a.txt", "w1 w2 w3")
  source = sources.Source("text", str(path))
  whole = np.array(
    token_store.tokenise(source, words, V, tmp_path / "c").tokens
  )
  [folder] = (tmp_path / "c").iterdir()
  file = folder / "tokens.bin"
  raw = file.read_bytes()
  if damage == "flip":
    file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
  elif damage == "truncate":
    file.write_bytes(raw[:-4])
  elif damage == "delete":
    file.unlink()
  else:
    (folder / "manifest.json").write_text("{")
  again = token_store.tokenise(source, words, V, tmp_path / "c")
  np.testing.assert_array_equal(whole, again.tokens)
  assert [p.name for p in (tmp_path / "c").iterdir()] == [folder.name]


def test_interrupted_cache_leaves_nothing(tmp_path, words):
  path = write(tmp_path / "a.jsonl", '{"text": "w1"}\n{')
  with error("not valid JSON"):
    token_store.tokenise(
      sources.Source("jsonl", str(path)), words, V, tmp_path / "cache"
    )
  assert not list((tmp_path / "cache").iterdir())


def test_cache_that_cannot_be_written(tmp_path, words):
  path = write(tmp_path / "a.txt", "w1 w2")
  with error("cannot write"):
    token_store.tokenise(sources.Source("text", str(path)), words, V, path)


# ---- Calibration -------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
  """A text that is w0 w1 ... w39."""
  return f"text:{write(tmp_path / 'numbered.txt', ' '.join(WORDS))}"


def calibration(source, samples=6, seq_len=5):
  return Calibration(source=source, samples=samples, seq_len=seq_len)


def test_calibration_windows(words, numbered):
  config = calibration(numbered)
  windows = calibration_data(config, words, V, seed=0)
  stream = np.array([*words.encode(" ".join(WORDS)), EOS])
  for step in range(20):
    batch = windows.batch(step)
    assert batch.shape == (6, 5)
    assert batch.dtype == np.int32
    starts = [int(np.flatnonzero(stream == row[0])[0]) for row in batch]
    assert len(set(starts)) == 6  # no window twice
    for start, row in zip(starts, batch, strict=True):
      np.testing.assert_array_equal(row, stream[start : start + 5])


def test_calibration_is_fresh_and_restartable(words, numbered):
  config = calibration(numbered)
  windows = calibration_data(config, words, V, 0)
  first = [windows.batch(step) for step in range(6)]
  assert len({b.tobytes() for b in first}) == 6
  resumed = calibration_data(config, words, V, 0)
  np.testing.assert_array_equal(resumed.batch(4), first[4])
  np.testing.assert_array_equal(resumed.batch(5), first[5])
  other = calibration_data(config, words, V, 1)
  assert (other.batch(0) != first[0]).any()


def test_calibration_mixture(tmp_path, words):
  low = write(tmp_path / "low.txt", " ".join(WORDS[:20] * 3))
  high = write(tmp_path / "high.txt", " ".join(WORDS[20:] * 3))
  config = calibration(f"text:{low},weight=1,text:{high},weight=3", samples=8)
  batch = calibration_data(config, words, V, 0).batch(0)
  assert batch.shape == (8, 5)
  # One inner token a window, so that neither <s> nor </s> is in the way.
  assert (batch[:, 2] >= ids_of("w20")[0]).sum() == 6


def test_calibration_too_short(words, numbered):
  # 40 words, <s> and </s>.
  calibration_data(calibration(numbered, 6, 37), words, V, 0).batch(0)
  with error("has 42 tokens, and 6 different windows of 38 need 43"):
    calibration_data(calibration(numbered, 6, 38), words, V, 0)
  with error("No such file"):  # now, not at the first step
    calibration_data(calibration("text:none"), words, V, 0)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint8])
def test_calibration_npy(tmp_path, dtype):
  given_ids = np.arange(24).reshape(2, 3, 4).astype(dtype)
  np.save(tmp_path / "a.npy", given_ids)
  config = calibration(f"npy:{tmp_path}/a.npy")
  given = calibration_data(config, None, 24, 0)
  for step in range(2):
    batch = given.batch(step)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, given_ids[step])
  with error("has samples for 2 pruning steps, and step 3 is asked for"):
    given.batch(2)


@pytest.mark.parametrize(
  ("array", "match"),
  [
    (np.zeros((2, 3), np.int32), r"shape \(2, 3\); it must be \[steps"),
    (np.zeros((0, 3, 4), np.int32), "none empty"),
    (np.zeros((1, 3, 1), np.int32), "at least 2 tokens"),
    (np.zeros((1, 3, 4), np.float32), "dtype float32"),
    (np.full((2, 3, 4), 24, np.int32), "step 0: token id 24 is outside"),
    (np.full((2, 3, 4), -1, np.int32), "token id -1 is outside"),
    (np.array([[[{}]]]), "not a plain .npy array"),
  ],
)
def test_calibration_npy_errors(tmp_path, array, match):
  np.save(tmp_path / "a.npy", array, allow_pickle=True)
  with error(match):
    calibration_data(calibration(f"npy:{tmp_path}/a.npy"), None, 24, 0)


def test_calibration_npy_is_never_unpickled(tmp_path):
  path = tmp_path / "a.npy"
  open_ = lambda: calibration_data(calibration(f"npy:{path}"), None, 24, 0)
  with error("No such file"):
    open_()
  for content in (b"", b"\x80\x04N.", b"\x93NUMPY\x01\x00v\x00{'descr'"):
    write(path, content)
    with error("not a plain .npy array"):
      open_()
  np.savez(tmp_path / "b.npz", np.zeros((1, 2, 3), np.int32))
  path.write_bytes((tmp_path / "b.npz").read_bytes())
  with error("shape None"):
    open_()


# ---- Packing -----------------------------------------------------------------


def stream_of(documents, trained=None):
  lengths = np.array([len(d) for d in documents])
  return token_store.Stream(
    tokens=np.concatenate(documents).astype(np.int32),
    starts=np.cumsum(lengths) - lengths,
    trained=trained,
    fingerprint="",
  )


def test_packing_by_hand():
  rows = packing.PackedRows(stream_of([[10, 11, 12], [20, 21, 22, 23, 24]]), 4)
  expected = [
    {
      "tokens_BT": [10, 11, 12, 20],
      "targets_BT": [11, 12, 20, 21],
      "segments_BT": [1, 1, 1, 2],
      "positions_BT": [0, 1, 2, 0],
      "weights_BT": [1, 1, 0, 1],
    },
    {
      "tokens_BT": [21, 22, 23, 0],
      "targets_BT": [22, 23, 24, 0],
      "segments_BT": [1, 1, 1, 0],
      "positions_BT": [0, 1, 2, 0],
      "weights_BT": [1, 1, 1, 0],
    },
  ]
  assert len(rows) == 2
  for row, want in zip(rows, expected, strict=False):
    assert {name: column.tolist() for name, column in row.items()} == want


def test_packing_learns_what_the_assistant_says():
  said = np.array([0, 1, 1, 0, 1, 1], bool)
  rows = packing.PackedRows(stream_of([[1, 2, 3], [4, 5, 6]], said), 5)
  assert rows[0]["weights_BT"].tolist() == [1, 1, 0, 1, 1]
  none = np.zeros(6, bool)
  rows = packing.PackedRows(stream_of([[1, 2, 3], [4, 5, 6]], none), 5)
  assert not rows[0]["weights_BT"].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(2, 9))
def test_packing_properties(lengths, T):
  # Every token is a number of its own, a thousand a document.
  documents = [1000 * d + np.arange(n) for d, n in enumerate(lengths, 1)]
  stream = stream_of(documents)
  if len(stream.tokens) < 2:
    return
  packed = packing.PackedRows(stream, T)
  rows = [packed[i] for i in range(len(packed))]
  flat = {n: np.stack([r[n] for r in rows]) for n in rows[0]}
  real = flat["segments_BT"] > 0
  # No token is lost, doubled or moved; the last one is only a target.
  np.testing.assert_array_equal(flat["tokens_BT"][real], stream.tokens[:-1])
  np.testing.assert_array_equal(flat["targets_BT"][real], stream.tokens[1:])
  # Learnt is everything but the first token of each document, once.
  learnt = flat["targets_BT"][flat["weights_BT"] > 0]
  np.testing.assert_array_equal(
    learnt, np.concatenate([d[1:] for d in documents])
  )
  for row in rows:
    inside = row["segments_BT"] > 0
    document = row["tokens_BT"][inside] // 1000
    segment = row["segments_BT"][inside]
    # A segment is a document, and numbers grow by one from 1.
    assert segment[0] == 1
    np.testing.assert_array_equal(np.diff(segment), np.diff(document) != 0)
    for s in np.unique(segment):
      positions = row["positions_BT"][inside][segment == s]
      np.testing.assert_array_equal(positions, np.arange(len(positions)))
    # Nothing is learnt across documents.
    counts = row["weights_BT"] > 0
    np.testing.assert_array_equal(
      row["tokens_BT"][counts] + 1, row["targets_BT"][counts]
    )
    for name, column in row.items():
      assert column.shape == (T,), name
      assert not column[~inside].any(), name


def test_packed_documents_do_not_see_each_other():
  """Logits of a packed row are those of its documents alone."""
  config = model_config.ModelConfig(
    family="llama",
    vocab_size=V,
    hidden_size=16,
    queries_per_group=2,
    head_dim=4,
    kv_groups=(2, 1),
    ffn_widths=(24, 16),
    norm_eps=1e-5,
    rope=Rope(),
    context=64,
    tied=True,
  )
  params = decoder.init_params(config, jax.random.key(0))
  random = np.random.default_rng(0)
  documents = [random.integers(0, V, n) for n in (5, 3, 7, 2)]
  row = packing.PackedRows(stream_of(documents), 16)[0]
  apply = decoder.Decoder(config).apply
  packed, _ = apply(
    {"params": params},
    row["tokens_BT"][None],
    row["segments_BT"][None],
    row["positions_BT"][None],
  )
  assert row["segments_BT"].tolist() == [1] * 5 + [2] * 3 + [3] * 7 + [4]
  alone = [apply({"params": params}, d[None])[0][0] for d in documents]
  alone = np.concatenate(alone)[:16]  # the last token is only a target
  np.testing.assert_allclose(packed[0], alone, atol=1e-6)


# ---- Training data -----------------------------------------------------------


@pytest.fixture
def documents(tmp_path):
  """A source of 300 documents of different lengths, 24 rows of 128."""
  random = np.random.default_rng(0)
  rows = [
    {"text": " ".join(random.choice(WORDS, random.integers(1, 16)))}
    for _ in range(300)
  ]
  return f"jsonl:{write(tmp_path / 'documents.jsonl', rows)}"


def opened(source, words, batch=8, seq_len=128, seed=0, **kwargs):
  config = Data(source=source, seq_len=seq_len, batch=batch)
  return packing.train_data(config, words, V, seed, **kwargs)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def test_train_batches(words, documents):
  batch = opened(documents, words).batch(0)
  assert set(batch) == {
    "tokens_BT",
    "targets_BT",
    "segments_BT",
    "positions_BT",
    "weights_BT",
  }
  for name, array in batch.items():
    assert array.shape == (8, 128)
    assert array.dtype == (np.float32 if name == "weights_BT" else np.int32)


def test_train_epochs_are_permutations(words, documents):
  train = opened(documents, words, batch=1)
  stream = token_store.tokenise(
    sources.parse_sources(documents, "data.source")[0], words, V
  )
  packed = packing.PackedRows(stream, 128)
  rows = len(packed)
  want = sorted(packed[i]["tokens_BT"].tobytes() for i in range(rows))
  epochs = [
    [train.batch(e * rows + i)["tokens_BT"].tobytes() for i in range(rows)]
    for e in range(3)
  ]
  for epoch in epochs:
    assert sorted(epoch) == want
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert train.num_tokens == len(stream.tokens)


def test_train_resumes_at_any_step(words, documents):
  whole = opened(documents, words)
  run = [next(b) for b in [whole.batches(0)] for _ in range(10)]
  resumed = opened(documents, words).batches(7)
  for batch in run[7:]:
    assert_same(next(resumed), batch)


def test_train_seed(words, documents):
  a, b = (opened(documents, words, seed=s) for s in (0, 1))
  assert (a.batch(0)["tokens_BT"] != b.batch(0)["tokens_BT"]).any()
  assert a.fingerprint == b.fingerprint


def test_train_mixture(tmp_path, words):
  low = write(tmp_path / "low.txt", " ".join(WORDS[:20] * 30))
  high = write(tmp_path / "high.txt", " ".join(WORDS[20:] * 90))
  spec = f"text:{low},weight=0.7,text:{high},weight=0.3"
  train = opened(spec, words, batch=10, seq_len=16)
  batches = [train.batch(step) for step in range(100)]
  of_high = [(b["tokens_BT"] >= ids_of("w20")[0]).any(-1) for b in batches]
  assert np.mean(of_high) == pytest.approx(0.3, abs=0.01)
  # Not in blocks: every batch has its share.
  assert all(1 <= h.sum() <= 5 for h in of_high)
  assert_same(opened(spec, words, 10, 16).batch(99), batches[99])


def test_train_from_cache_is_the_same(tmp_path, words, documents):
  plain = opened(documents, words)
  for _ in range(2):
    cached = opened(documents, words, cache_dir=tmp_path / "cache")
    assert_same(plain.batch(3), cached.batch(3))
    assert plain.fingerprint == cached.fingerprint


def test_train_assistant_only(tmp_path, words):
  path = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 5)
  config = Data(f"jsonl:{path},loss=assistant", seq_len=64, batch=1)
  batch = packing.train_data(config, words, V + 2, 0).batch(0)
  learnt = batch["targets_BT"][batch["weights_BT"] > 0].tolist()
  turns = [*ids_of("w3"), END, *ids_of("w5", "w6"), END]
  assert len(learnt) > len(turns)
  assert set(learnt) == set(turns)


def test_train_errors(tmp_path, words, documents):
  with error("npy is for calibration only"):
    opened("npy:a.npy", words)
  path = write(tmp_path / "empty.jsonl", "\n")
  with error("is empty"):
    opened(f"jsonl:{path}", words)
  bare = dataclasses.replace(words, eos_token=None)
  path = write(tmp_path / "short.jsonl", [{"text": "w1"}])
  assert opened(f"jsonl:{path}", bare, 1, 4).batch(0)["weights_BT"].sum() == 1


def test_heldout_tokens(words):
  text = "w1 w2\nw3"
  got = packing.heldout_tokens(text, words, V)
  assert got.dtype == np.int32
  assert got.tolist() == [BOS, *ids_of("w1", "w2", "w3")]
  with error("eval.text has 1 tokens"):
    packing.heldout_tokens("", words, V)
