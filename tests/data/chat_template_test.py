"""Chats as text, as Transformers lays them out, and what is learnt of them."""

import dataclasses
import json

import pytest

from adapt_pruner_jax.data import chat_template
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from tests.data.words import (
  ASSISTANT,
  CHAT,
  END,
  START,
  TEMPLATE,
  USER,
  error,
  ids_of,
  write,
)


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
  assert dated.render_chat(CHAT) == "26 Jul 2024"


# ---- As Transformers renders them --------------------------------------------

NAMED = {
  "bos_token": "<s>",
  "eos_token": {"__type": "AddedToken", "content": "</s>"},
  "unk_token": "<unk>",
  "pad_token": "<|im_end|>",
  "sep_token": "w30",
  "cls_token": "w31",
  "mask_token": "w32",
  "image_token": "w33",
  "extra_special_tokens": {"think_token": "w34"},
}
TOOL = {
  "type": "function",
  "function": {
    "name": "w7",
    "description": "é <b>",
    "parameters": {"type": "object", "properties": {"z": {}, "a": {}}},
  },
}
CALLED = [
  CHAT[0],
  {
    "role": "assistant",
    "content": None,
    "tool_calls": [
      {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ],
  },
  {"role": "tool", "name": "f", "content": "w8"},
  {"role": "assistant", "content": "w9", "thinking": "w1", "name": None},
]
TEMPLATES = [
  *("{{ X }}|{{ X is defined }}".replace("X", name) for name in NAMED),
  "{{ image_token }} {{ think_token }} {{ other_token is defined }}",
  "{{ tools is defined }} {{ tools is none }} {{ tools | tojson(indent=2) }}",
  "{{ documents is defined }} {{ documents is none }}",
  "{{ add_generation_prompt }} {{ messages | length }}",
  "{% for m in messages %}{{ m.content }}{{ m.content is defined }}"
  "{{ m.name is defined }}{% endfor %}",
  "{% for m in messages %}{{ m.reasoning_content }},{{ m.thinking }},"
  "{{ m.reasoning }};{% endfor %}",
  "{% for m in messages %}{{ m.tool_calls is defined }}"
  "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
  "{% if not loop.last %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
  "{{ {'b': 'é<', 'a': 1} | tojson }} "
  "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }} "
  "{{ [1, 2] | tojson(separators=(',', ':')) }}",
  "  {% set ns = namespace(x=1) %}\n  {% if ns.x %}\n w1 {{ ns.x }}\n"
  "  {% endif %}\n",
  "{% for m in messages %}{%- generation -%}\n {{ m.content }} "
  "{%- endgeneration %}\n{% endfor %}",
  "{{ messages[0].role }}{{ messages[-1]['content'] | trim | upper }}",
]


def directory(folder, tmp_path, settings):
  """A copy of the tokenizer with other settings."""
  write(tmp_path / "tokenizer.json", (folder / "tokenizer.json").read_text())
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
  write(tmp_path / "tokenizer_config.json", json.dumps(settings))
  return tmp_path


@pytest.mark.parametrize("named", [NAMED, {"eos_token": "</s>"}])
def test_templates_render_as_transformers(folder, tmp_path, named):
  """What they see: special tokens, tools, documents, null and thoughts."""
  transformers = pytest.importorskip("transformers")
  path = directory(folder, tmp_path, named)
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  ours = load_tokenizer(path)
  for template in TEMPLATES:
    mine = dataclasses.replace(ours, chat_template=template)
    theirs.chat_template = template
    for chat in (CHAT, CALLED):
      for tools in (None, [TOOL]):
        for prompt in (False, True):
          want = theirs.apply_chat_template(
            chat, tools=tools, add_generation_prompt=prompt, tokenize=False
          )
          got = mine.render_chat(chat, tools, prompt)
          assert got == want, template


def test_special_tokens_map_counts_as_in_transformers(folder, tmp_path):
  """In old directories it wins over tokenizer_config.json; in new ones, which
  list their added tokens there, it is not read."""
  transformers = pytest.importorskip("transformers")
  decoder = {"2": {"content": "</s>", "special": True}}
  for settings in ({}, {"added_tokens_decoder": decoder}):
    path = directory(folder, tmp_path, {"eos_token": "</s>"} | settings)
    write(path / "special_tokens_map.json", '{"eos_token": "<s>"}')
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    assert ours.eos_token == theirs.eos_token == ("</s>" if settings else "<s>")
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("where", ["settings", "files"])
def test_template_of_chats_with_tools(folder, tmp_path, where):
  transformers = pytest.importorskip("transformers")
  templates = {"default": "plain", "tool_use": "tools", "rag": "rag"}
  listed = [{"name": n, "template": t} for n, t in templates.items()]
  if where == "settings":
    path = directory(folder, tmp_path, {"chat_template": listed})
  else:  # these win
    path = directory(folder, tmp_path, {"chat_template": "old"})
    write(path / "chat_template.jinja", "plain")
    (path / "additional_chat_templates").mkdir()
    write(path / "additional_chat_templates" / "tool_use.jinja", "tools")
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  ours = load_tokenizer(path)
  for tools, want in ((None, "plain"), ([TOOL], "tools")):
    assert ours.render_chat(CHAT, tools) == want
    got = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert got == want


def test_real_template(shared_data):
  """minimind's, which lays out systems, tools and calls."""
  transformers = pytest.importorskip("transformers")
  path = shared_data / "tokenizers" / "minimind"
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  ours = load_tokenizer(path)
  system = {"role": "system", "content": "é  1234\n"}
  for chat in (CHAT, [system, *CHAT], CALLED):
    for tools in (None, [TOOL]):
      want = theirs.apply_chat_template(chat, tools=tools, return_dict=False)
      assert ours.encode_chat(chat, tools) == want


@pytest.mark.parametrize(
  ("version", "allowed"),
  [("3.1.6", 1), ("3.2.0rc1", 1), ("3.1.7.dev0", 1), ("4", 1), ("3.1.6rc1", 0)],
)
def test_jinja_versions(version, allowed):
  if allowed:
    chat_template.check_version(version)
  else:
    with error(f"jinja2 {version} has known ways out of its sandbox"):
      chat_template.check_version(version)
