"""Tokenizers in GGUF files: what is written, and what is refused."""

import dataclasses
import json
import shutil

import gguf
import pytest

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import (
  pre_tokenizers,
  tokenizer_json,
  vocab,
  writer,
)
from adapt_pruner_jax.formats.gguf.reader import File
from adapt_pruner_jax.runs import tiny_model
from adapt_pruner_jax.storage.json_files import write_json
from tests import small
from tests.formats.gguf_test import UNEVEN

PROBES = (
  "Once upon a time",
  "It's 12,345 o'clock.\n\n  Two  spaces",
  "naïve café 中文 🙂 I'LL",
  "<|endoftext|>between<|endoftext|> and after",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A byte-level tokenizer; not to be changed."""
  folder = tmp_path_factory.mktemp("trained") / "tokenizer"
  tiny_model.train_tokenizer(folder, 300)
  return folder


def changed(trained, folder, change=lambda content: None, settings=None):
  """A copy of the tokenizer with another tokenizer.json."""
  shutil.copytree(trained, folder)
  content = json.loads((folder / "tokenizer.json").read_text())
  change(content)
  write_json(folder / "tokenizer.json", content)
  if settings:
    file = folder / "tokenizer_config.json"
    write_json(file, json.loads(file.read_text()) | settings)
  return folder


def written(source, out, size=320, **fields):
  """A file with the tokenizer of a folder, and what is in it."""
  config = dataclasses.replace(UNEVEN, vocab_size=size, **fields)
  writer.write(config, small.random_params(config), out, source=source)
  return File(out)


def read_back(file, folder):
  """The tokenizer of a file, by the reader."""
  folder.mkdir()
  write_json(folder / "tokenizer.json", tokenizer_json.make(file))
  settings = tokenizer_json.settings(file, 64)
  write_json(folder / "tokenizer_config.json", settings)
  return load_tokenizer(folder)


def as_meant(content, name):
  means = pre_tokenizers.MEANINGS[name]
  content["normalizer"] = means.normalizer
  content["pre_tokenizer"] = {
    "type": "Sequence",
    "pretokenizers": means.steps,
  }
  content["model"]["ignore_merges"] = means.ignore_merges


@pytest.mark.parametrize("name", pre_tokenizers.MEANINGS)
def test_each_pre_tokenizer_comes_back(name, trained, tmp_path):
  """Ids of the tokenizers package on what was written and on what is read."""
  source = changed(trained, tmp_path / "s", lambda c: as_meant(c, name))
  file = written(source, tmp_path / "model.gguf", bos_id=0, eos_ids=(0,))
  assert file.get("tokenizer.ggml.pre") == name
  found, wanted = read_back(file, tmp_path / "r"), load_tokenizer(source)
  for text in PROBES:
    assert found.encode(text) == wanted.encode(text), text
    assert found.backend.decode(found.encode(text)) == text.replace(
      "<|endoftext|>", ""
    )


def test_names_split_as_llama_cpp_documents_them():
  """Words by the tokenizers package against those written down by hand."""
  import tokenizers

  text = "I'LL pay 12345"
  words = {
    "gpt-2": "I|'|LL|Ġpay|Ġ12345",
    "smollm": "I|'|LL|Ġpay|Ġ|1|2|3|4|5",
    "llama-bpe": "I|'LL|Ġpay|Ġ|123|45",
    "qwen2": "I|'LL|Ġpay|Ġ|1|2|3|4|5",
  }
  for name, expected in words.items():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    content = json.loads(model.to_str())
    as_meant(content, name)
    split = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    found = [word for word, _ in split.pre_tokenize_str(text)]
    assert found == expected.split("|"), name


def _with(path, value):
  def change(content):
    *outer, last = path
    for name in outer:
      content = content[name]
    content[last] = value

  return change


BYTES = pre_tokenizers.byte_level(True)
BARE = pre_tokenizers.byte_level(False)


def sequence(*steps):
  return _with(
    ["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [*steps]}
  )


def split(pattern, **changes):
  step = {
    "type": "Split",
    "pattern": {"Regex": pattern},
    "behavior": "Isolated",
    "invert": False,
  }
  return step | changes


# Each splits or merges some text in another way than the name that it got
# when only a piece of its expression was looked at.
OTHERS = {
  "a space in front": _with(["pre_tokenizer", "add_prefix_space"], True),
  "lower case": _with(["normalizer"], {"type": "Lowercase"}),
  "NFKC": _with(["normalizer"], {"type": "NFKC"}),
  "strip": _with(
    ["normalizer"], {"type": "Strip", "strip_left": True, "strip_right": True}
  ),
  "whole numbers": sequence({"type": "Digits"}, BYTES),
  "punctuation apart": sequence(
    {"type": "Punctuation", "behavior": "Isolated"}, BYTES
  ),
  "without words": sequence(BARE),
  "llama-bpe that merges twice": sequence(split(pre_tokenizers.LLAMA3), BYTES),
  "llama-bpe after digits": sequence(
    pre_tokenizers.DIGITS, split(pre_tokenizers.LLAMA3), BARE
  ),
  "llama-bpe, removed": sequence(
    split(pre_tokenizers.LLAMA3, behavior="Removed"), BARE
  ),
  "llama-bpe, inverted": sequence(
    split(pre_tokenizers.LLAMA3, invert=True), BARE
  ),
  "llama-bpe with case": sequence(
    split(pre_tokenizers.LLAMA3.replace("(?i:", "(?:")), BARE
  ),
  "llama-bpe with pairs of digits": sequence(
    split(pre_tokenizers.LLAMA3.replace("{1,3}", "{1,2}")), BARE
  ),
  "qwen2 with marks": sequence(
    split(pre_tokenizers.QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")), BARE
  ),
  "gpt-2 that takes words whole": _with(["model", "ignore_merges"], True),
  "no pre-tokenizer": _with(["pre_tokenizer"], None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_that_split_otherwise_are_refused(name, trained, tmp_path):
  source = changed(trained, tmp_path / "s", OTHERS[name])
  with pytest.raises(UserError, match="no pre-tokenizer of") as said:
    written(source, tmp_path / "model.gguf")
  assert "--format=hf_uniform" in str(said.value)
  assert "\n" not in str(said.value)
  assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
  "change",
  [
    _with(["normalizer"], {"type": "NFKC"}),
    _with(["normalizer"], None),
    _with(["pre_tokenizer"], {"type": "Whitespace"}),
  ],
)
def test_other_sentencepiece_is_refused(change, shared_data, tmp_path):
  stories = shared_data / "models" / "stories260K"
  source = changed(stories, tmp_path / "s", change)
  with pytest.raises(UserError, match="SentencePiece"):
    written(source, tmp_path / "model.gguf", size=512)


def test_sentencepiece_comes_back(shared_data, tmp_path):
  source = shared_data / "models" / "stories260K"
  fields = {"bos_id": 1, "eos_ids": (2,)}
  file = written(source, tmp_path / "model.gguf", size=512, **fields)
  found, wanted = read_back(file, tmp_path / "r"), load_tokenizer(source)
  text = (shared_data / "text" / "tinystories_heldout.txt").read_text()[:20000]
  for probe in (*PROBES, " a<s> b", text):
    assert found.encode(probe) == wanted.encode(probe)
  assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, size",
  [("storyllamas-4096", 4099), ("gpt2", 50257), ("minimind", 6400)],
)
def test_real_tokenizers_come_back(name, size, shared_data, tmp_path):
  """Two of them have no tokenizer.json."""
  source = shared_data / "tokenizers" / name
  file = written(source, tmp_path / "model.gguf", size=size)
  assert file.get("tokenizer.ggml.model") == (
    "llama" if name == "storyllamas-4096" else "gpt2"
  )
  found, wanted = read_back(file, tmp_path / "r"), load_tokenizer(source)
  text = (shared_data / "text" / "books.txt").read_text()[:20000]
  for probe in (*PROBES, text):
    assert found.encode(probe) == wanted.encode(probe)
  assert found.chat_template == wanted.chat_template


TEMPLATE = {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}]}


@pytest.mark.parametrize(
  "content, special, space",
  [
    ({}, False, False),
    ({"post_processor": TEMPLATE}, True, False),
    # LLaMA 3
    (
      {"post_processor": {"processors": [{"type": "ByteLevel"}, TEMPLATE]}},
      True,
      False,
    ),
    ({"post_processor": {"single": [{"Sequence": {}}]}}, False, False),
    # LLaMA 2, by Transformers 4 and 5
    (
      {"normalizer": {"normalizers": [{"type": "Prepend"}]}},
      False,
      True,
    ),
    (
      {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}},
      False,
      True,
    ),
    (
      {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}},
      False,
      False,
    ),
  ],
)
def test_what_is_put_in_front_of_a_text(content, special, space):
  assert vocab.begins_with_special(content) == special
  assert vocab.begins_with_space(content) == space


@pytest.mark.parametrize("added", [True, False])
def test_tokens_that_the_model_does_not_have(added, tmp_path, caplog):
  """An added one is left out; of others there is something wrong."""
  folder = tmp_path / "tokenizer"
  tiny_model.train_tokenizer(folder, 300)
  file = folder / "tokenizer.json"
  content = json.loads(file.read_text())
  size = len(content["model"]["vocab"])
  if added:
    token = dict(content["added_tokens"][0], id=size, content="[PAD]")
    content["added_tokens"].append(token)
    file.write_text(json.dumps(content))
  config = dataclasses.replace(UNEVEN, vocab_size=size if added else size - 1)
  pair = config, small.random_params(config)
  out = tmp_path / "model.gguf"
  if added:
    writer.write(*pair, out, source=folder)
    assert out.stat().st_size > 1000
  else:
    with pytest.raises(UserError, match="more tokens than the model's"):
      writer.write(*pair, out, source=folder)
    assert not out.exists()


def test_a_token_that_takes_spaces_along_is_said(trained, tmp_path, caplog):
  flags = {"lstrip": True, "rstrip": True}
  change = lambda content: content["added_tokens"][0].update(flags)
  written(trained, tmp_path / "plain.gguf")
  assert "other ids" not in caplog.text
  written(changed(trained, tmp_path / "s", change), tmp_path / "model.gguf")
  assert "no lstrip and rstrip of a token" in caplog.text
  assert "<|endoftext|>" in caplog.text


@pytest.mark.parametrize(
  "generation, config_ids, settings, expected",
  [
    ({"eos_token_id": [5, 7, 9]}, (3,), {}, (5, 7, 9)),
    ({"eos_token_id": 5}, (3, 4), {}, (5,)),
    ({}, (3, 4), {}, (3, 4)),
    (None, (3, 4), {}, (3, 4)),
    ({"eos_token_id": None}, (), {"eos_token": "<|endoftext|>"}, (0,)),
    # The tokenizer's own is what a chat template means by eos_token.
    ({"eos_token_id": [5, 0]}, (3,), {"eos_token": "<|endoftext|>"}, (0, 5)),
    ({"eos_token_id": [5]}, (3,), {"eos_token": "<|endoftext|>"}, (5,)),
    ({"eos_token_id": [5, 7, 9, 11]}, (3,), {}, (5, 7, 9)),
    # Ids that are none, or that the model has not, take no place.
    ({"eos_token_id": [-1]}, (3,), {}, (3,)),
    ({"eos_token_id": [-1, 9999, 5, 7]}, (3,), {}, (5, 7)),
    (None, (-1,), {"eos_token": "<|endoftext|>"}, (0,)),
  ],
)
def test_end_tokens_are_those_of_generate(
  generation, config_ids, settings, expected, trained, tmp_path
):
  source = changed(trained, tmp_path / "s", settings={"eos_token": None})
  changed_settings = json.loads((source / "tokenizer_config.json").read_text())
  write_json(source / "tokenizer_config.json", changed_settings | settings)
  (source / "generation_config.json").unlink(missing_ok=True)
  if generation is not None:
    write_json(source / "generation_config.json", generation)
  file = written(source, tmp_path / "model.gguf", eos_ids=config_ids)
  roles = ("eos", "eot", "eom")
  ids = [file.get(f"tokenizer.ggml.{role}_token_id") for role in roles]
  assert tuple(x for x in ids if x is not None) == expected


def test_ids_of_minus_one_are_none(trained, tmp_path):
  ids = {"pad_id": -1, "bos_id": -1, "eos_ids": (0,)}
  file = written(trained, tmp_path / "model.gguf", **ids)
  assert file.get("tokenizer.ggml.padding_token_id") is None
  assert file.get("tokenizer.ggml.bos_token_id") is None
  assert file.get("tokenizer.ggml.eos_token_id") == 0


def test_special_tokens_and_chat_template_come_back(trained, tmp_path):
  template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
  settings = {"chat_template": template, "bos_token": "<|endoftext|>"}
  begin = {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {
      "<|endoftext|>": {
        "id": "<|endoftext|>",
        "ids": [0],
        "tokens": ["<|endoftext|>"],
      }
    },
  }
  change = _with(["post_processor"], begin)
  source = changed(trained, tmp_path / "s", change, settings)
  file = written(source, tmp_path / "model.gguf", eos_ids=(0,))
  found, wanted = read_back(file, tmp_path / "r"), load_tokenizer(source)
  assert found.encode("a b") == wanted.encode("a b")
  assert found.encode("a b")[0] == 0
  chat = [{"role": "user", "content": "Once upon"}]
  assert found.encode_chat(chat) == wanted.encode_chat(chat)


def test_a_template_is_not_taken_from_elsewhere(trained, tmp_path):
  """It would be copied into the file, whatever the link leads to."""
  source = changed(trained, tmp_path / "s")
  (tmp_path / "secret").write_text("years")
  (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
  with pytest.raises(UserError, match=r"is a link to .*secret, outside of"):
    written(source, tmp_path / "model.gguf")
  assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
  "name", ["continuing_subword_prefix", "end_of_word_suffix"]
)
def test_marks_of_words_are_refused(name, trained, tmp_path):
  """llama.cpp knows of none; CLIP's kind has the latter."""
  change = _with(["model", name], "</w>")
  source = changed(trained, tmp_path / "s", change)
  with pytest.raises(UserError, match="gguf files can hold plain BPE"):
    written(source, tmp_path / "model.gguf")


def unfinished(path, add):
  made = gguf.GGUFWriter(str(path), "llama")
  add(made)
  made.write_header_to_file()
  made.write_kv_data_to_file()
  made.write_tensors_to_file()
  made.close()
  return File(path)


@pytest.mark.parametrize(
  "kind, pre, said",
  [
    ("bert", None, "tokenizer bert is not supported"),
    ("gpt2", "viking", "pre-tokenizer viking is not known"),
    ("gpt2", None, "no name: an old file"),
    ("gpt2", "gpt-2", "no merges"),
    ("llama", None, "no scores"),
  ],
)
def test_tokenizers_that_cannot_be_read(kind, pre, said, tmp_path):
  def add(made):
    made.add_tokenizer_model(kind)
    made.add_token_list(["a", "b"])
    if pre:
      made.add_tokenizer_pre(pre)

  with pytest.raises(UserError, match=said):
    tokenizer_json.make(unfinished(tmp_path / "model.gguf", add))
