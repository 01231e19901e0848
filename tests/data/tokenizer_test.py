"""Text to token ids, as the tokenizer's own programs make them."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from adapt_pruner_jax.data import packing
from adapt_pruner_jax.data.tokenizer import check_ids, load_tokenizer
from tests.data.words import BOS, EOS, SPECIALS, V, error, ids_of, write


def test_tokenizer_ids(words):
  assert (words.bos_id, words.eos_id) == (BOS, EOS)
  assert words.encode("w1 w2") == [BOS, *ids_of("w1", "w2")]
  assert words.encode_plain("w1 w2") == ids_of("w1", "w2")
  found = [ids.tolist() for ids in words.encode_batch(["w1", ""])]
  assert found == [[BOS, *ids_of("w1")], [BOS]]


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
  write(tmp_path / "config.json", '{"eos_token_id": 2, "bos_token_id": -1}')
  assert load_tokenizer(tmp_path).bos_id is None


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


# ---- The begin token ---------------------------------------------------------


def template(single, *tokens):
  return processors.TemplateProcessing(
    single=single, special_tokens=[(t, SPECIALS.index(t)) for t in tokens]
  )


@pytest.mark.parametrize(
  ("post_processor", "begin"),
  [
    (template("<s> $A", "<s>"), "<s>"),  # LLaMA 2, Mistral, Gemma
    (template("<s> $A </s>", "<s>", "</s>"), "<s>"),
    (  # LLaMA 3
      processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template("<s> $A", "<s>")]
      ),
      "<s>",
    ),
    (template("$A </s>", "</s>"), None),
    (processors.ByteLevel(trim_offsets=False), None),  # GPT-2, Qwen
    (None, None),
  ],
)
def test_begin_token_is_what_transformers_puts_first(
  folder, tmp_path, post_processor, begin
):
  transformers = pytest.importorskip("transformers")
  backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  if post_processor is None:
    backend = json.loads(backend.to_str()) | {"post_processor": None}
    write(tmp_path / "tokenizer.json", json.dumps(backend))
  else:
    backend.post_processor = post_processor
    backend.save(str(tmp_path / "tokenizer.json"))
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  write(tmp_path / "tokenizer_config.json", json.dumps(settings))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  first = theirs("w1 w2")["input_ids"][0]
  ours = load_tokenizer(tmp_path)
  assert ours.begin_token == begin
  assert ours.begin_id == (first if first == BOS else None)
  assert load_tokenizer(tmp_path, "none").begin_id is None


def test_begin_token_choices(folder):
  with error("bos=yes is not one of auto, none"):
    load_tokenizer(folder, "yes")


# ---- As others read it -------------------------------------------------------

TEXTS = [
  "Hello world",
  " two  spaces\n\nand 1234567 numbers, 3.14",
  "tab\there é ü 中文 🙂 <s> x </s> y <|im_start|>user",
  "",
  "  ",
  "I'm can't WON'T",
]


@pytest.mark.parametrize(
  "name",
  [
    "tokenizers/gpt2",
    "tokenizers/minimind",
    "tokenizers/storyllamas-4096",
    "models/babyllama-char105-930K",
    "models/babyllama-char361-960K",
    "models/stories260K",
  ],
)
def test_real_tokenizers_as_transformers(shared_data, name):
  transformers = pytest.importorskip("transformers")
  path = shared_data / name
  ours = load_tokenizer(path)
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  want = [theirs(text)["input_ids"] for text in TEXTS]
  assert [ours.encode(text) for text in TEXTS] == want
  assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == want
  plain = [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
  assert [ours.encode_plain(text) for text in TEXTS] == plain
  assert (ours.bos_id, ours.eos_id) == (
    theirs.bos_token_id,
    theirs.eos_token_id,
  )
  file = path / "tokenizer.json"
  if file.is_file():
    backend = tokenizers.Tokenizer.from_file(str(file))
    assert [backend.encode(text).ids for text in TEXTS] == want


def test_where_transformers_5_reads_something_else(shared_data, tmp_path):
  """docs/data.md says so: then `tokenizers` decides here."""
  transformers = pytest.importorskip("transformers")
  if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("4.57 reads what tokenizers reads")
  for file in (shared_data / "models" / "stories260K").glob("tok*.json"):
    write(tmp_path / file.name, file.read_text())
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  settings["tokenizer_class"] = "LlamaTokenizer"
  write(tmp_path / "tokenizer_config.json", json.dumps(settings))
  write(tmp_path / "config.json", '{"model_type": "llama"}')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  ours = load_tokenizer(tmp_path)
  for text in TEXTS:
    assert ours.encode(text) == backend.encode(text).ids
  differ = [t for t in TEXTS if ours.encode(t) != theirs(t)["input_ids"]]
  assert differ == [TEXTS[1], TEXTS[2], TEXTS[4]]  # spaces
