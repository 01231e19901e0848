"""Rows of data sets as people have them, and what is learnt of each."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from adapt_pruner_jax.data import rows, sources, token_store
from tests.data.words import (
  ASSISTANT,
  CHAT,
  END,
  EOS,
  V,
  contents,
  error,
  ids_of,
  write,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SYSTEM = {"role": "system", "content": "w0"}
USER1, SAID1, USER2, SAID2 = CHAT
CALL = {
  "type": "function",
  "function": {"name": "f", "arguments": {"x": None}},
}
RESULT = {"role": "tool", "content": "w8"}


def sharegpt(*turns):
  return {"conversations": [{"from": a, "value": b} for a, b in turns]}


FORMS = {
  "text": ({"text": "w1"}, "w1"),
  "messages": ({"messages": CHAT}, CHAT),
  "system turn": ({"messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
  "row's system": ({"messages": CHAT, "system": "w0"}, [SYSTEM, *CHAT]),
  "two systems": (
    {"messages": [SYSTEM, *CHAT], "system": "w9"},
    [SYSTEM, *CHAT],
  ),
  "ShareGPT": (
    sharegpt(
      ("system", "w0"),
      ("human", "w1 w2"),
      ("gpt", "w3"),
      ("user", "w4"),
      ("chatgpt", "w5 w6"),
    ),
    [SYSTEM, *CHAT],
  ),
  "ShareGPT with other fields": (
    {"id": "7", "text": None, "conversations": CHAT},
    CHAT,
  ),
  "ShareGPT's tools": (
    sharegpt(
      ("human", "w1 w2"),
      ("function_call", '{"name": "f", "arguments": {"x": null}}'),
      ("observation", "w8"),
      ("gpt", "w3"),
    ),
    [USER1, {"role": "assistant", "tool_calls": [CALL]}, RESULT, SAID1],
  ),
  "Alpaca": (
    {"instruction": "w1 w2", "input": "", "output": "w3"},
    [USER1, SAID1],
  ),
  "Alpaca with input": (
    {"instruction": "w1", "input": "w2", "output": "w3", "system": "w0"},
    [SYSTEM, {"role": "user", "content": "w1\nw2"}, SAID1],
  ),
  "Alpaca with history": (
    {
      "instruction": "w4",
      "history": [["w1 w2", "w3"]],
      "output": "w5 w6",
    },
    CHAT,
  ),
  "Dolly": (
    {"instruction": "w1", "context": "w2", "response": "w3"},
    [{"role": "user", "content": "w1\nw2"}, SAID1],
  ),
  "OpenOrca": (
    {"system_prompt": "w0", "question": "w1 w2", "response": "w3"},
    [SYSTEM, USER1, SAID1],
  ),
  "LIMA": ({"conversations": ["w1 w2", "w3", "w4", "w5 w6"]}, CHAT),
  "a list of objects as datasets shows it": (
    {"conversations": {"from": ["human", "gpt"], "value": ["w1 w2", "w3"]}},
    [USER1, SAID1],
  ),
  "LMFlow's text2text": ({"input": "w1 w2", "output": "w3"}, [USER1, SAID1]),
  "MetaMath": ({"query": "w1 w2", "response": "w3"}, [USER1, SAID1]),
  "prompt and completion": ({"prompt": "w1 ", "completion": "w3"}, "w1 w3"),
  "turns of both": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, CHAT),
  "null of a caller": (
    {
      "messages": [
        USER1,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        RESULT | {"name": "f", "tool_call_id": None},
        SAID1,
      ]
    },
    [
      USER1,
      {"role": "assistant", "tool_calls": [CALL]},
      RESULT | {"name": "f"},
      SAID1,
    ],
  ),
  "null of an answer": (
    {"messages": [USER1, {"role": "assistant", "content": None}]},
    [USER1, {"role": "assistant", "content": ""}],
  ),
  "parts": (
    {
      "messages": [
        {
          "role": "user",
          "content": [
            {"type": "text", "text": "w1 "},
            {"type": "text", "text": "w2"},
          ],
        },
        SAID1,
      ]
    },
    [USER1, SAID1],
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
  row, want = FORMS[form]
  path = write(tmp_path / "a.jsonl", [row])
  assert contents(f"jsonl:{path}") == [want]


def test_an_instruction_of_nothing():
  """All of the question is in `input`, as in some of Alpaca's kind."""
  row = {"instruction": "", "input": "w2", "output": "w3"}
  assert rows.to_document("here", row).content == [
    {"role": "user", "content": "w2"},
    {"role": "assistant", "content": "w3"},
  ]


def test_turns_in_a_string():
  """JSON in a column of text is a chat all the same."""
  for name in ("messages", "conversations"):
    row = {name: json.dumps(CHAT)}
    assert rows.to_document("here", row).content == CHAT
    with error(f"here: {name} is not valid JSON"):
      rows.to_document("here", {name: "not a chat"})
  with error("here: messages is int, not a string or a list"):
    rows.to_document("here", {"messages": "3"})


def test_text_beside_a_pair():
  """As tatsu-lab/alpaca has it: both forms in one row."""
  row = {"instruction": "a", "input": "", "output": "b", "text": "a b"}
  assert rows.to_document("here", row).content == "a b"
  found = rows.to_document("here", row, loss="assistant").content
  assert [turn["content"] for turn in found] == ["a", "b"]
  assert rows.to_document("here", row, column="output").content == "b"


def test_tools():
  tool = {"type": "function", "function": {"name": "f", "default": None}}
  row = {"messages": CHAT, "tools": [tool]}
  assert rows.to_document("here", row).tools == [tool]
  text = '[{"type": "function", "function": {"name": "f", "default": null}}]'
  assert rows.to_document("here", row | {"tools": text}).tools == [tool]
  assert rows.to_document("here", row | {"tools": []}).tools is None
  with error("here: tools is not valid JSON"):
    rows.to_document("here", row | {"tools": "["})
  with error("here: tools is not a list of JSON schemas"):
    rows.to_document("here", row | {"tools": ["f"]})


BAD = [
  ({"messages": [{"role": "user", "content": None}]}, "null is allowed for"),
  ({"messages": [{"content": "x"}]}, r"messages\[0\] has no string 'role'"),
  ({"messages": [{"role": "user", "content": 3}]}, "content is int, not a str"),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    r"content\[0\] is of type 'image_url'; only text",
  ),
  (sharegpt(("alien", "x")), "from 'alien'; allowed are human, prompter, gpt"),
  (sharegpt(("human", None)), "has no string 'value'"),
  (sharegpt(("function_call", "{")), "function_call is no valid JSON"),
  (sharegpt(("function_call", "[1]")), "not an object with name and arguments"),
  (
    {"instruction": "x"},
    "has no text or messages; it has instruction; allowed",
  ),
  ({"instruction": 1, "output": "x"}, "instruction is int, not a string"),
  (
    {"instruction": "x", "output": "x", "history": ["x"]},
    r"history\[0\] is no",
  ),
  ({"text": "\ud83d"}, "text has half a character"),
  ({"prompt": [USER1], "completion": "x"}, "prompt is list, not a string"),
  ({"text": None}, "has no text or messages; it has nothing"),
  ({"messages": USER1}, "messages is one object, not a list of messages"),
  (
    {"instruction": "x", "output": "x", "history": 5},
    "history is not a list of",
  ),
]


@pytest.mark.parametrize(("row", "match"), BAD)
def test_bad_rows_name_their_line(tmp_path, row, match):
  path = write(tmp_path / "a.jsonl", [{"text": "one"}, row])
  with error(rf"a.jsonl line 2\b.*{match}"):
    contents(f"jsonl:{path}")


def learnt(tmp_path, row, tokenizer, loss="assistant"):
  """The tokens of a row, and those that are to be learnt."""
  path = write(tmp_path / "a.jsonl", [row])
  source = sources.Source("jsonl", str(path), loss=loss)
  stream = token_store.tokenise(source, tokenizer, V + 2)
  trained = stream.trained
  if trained is None:
    trained = np.ones(len(stream.tokens), bool)
  return stream.tokens.tolist(), stream.tokens[trained].tolist()


ANSWER = [*ids_of("w3"), END]
BOTH = [*ANSWER, *ids_of("w5", "w6"), END]


@pytest.mark.parametrize(
  ("form", "want"),
  [
    ("messages", BOTH),
    ("system turn", BOTH),
    ("ShareGPT", BOTH),
    ("Alpaca", ANSWER),
    ("LIMA", BOTH),
    ("LMFlow's text2text", ANSWER),
    ("Alpaca with input", ANSWER),
    ("OpenOrca", ANSWER),
    ("parts", ANSWER),
    ("Alpaca with history", BOTH[2:]),  # of an example only its own answer
    ("turns of both", BOTH[2:]),
    ("prompt and completion", [*ids_of("w3"), EOS]),
  ],
)
def test_what_is_learnt(tmp_path, words, unbegun, form, want):
  """What the assistant says, or the completion; equal chats are equal ids."""
  row, content = FORMS[form]
  ids, said = learnt(tmp_path, row, unbegun)
  assert said == want
  if isinstance(content, list):
    assert ids == unbegun.encode_chat(content)
  begun, said = learnt(tmp_path, row, words)
  assert said == want
  begin = [] if isinstance(content, str) else [words.bos_id]
  assert begun == begin + ids  # a text has it from the tokenizer
  everything, said = learnt(tmp_path, row, unbegun, loss="all")
  assert everything == said == ids


def test_alpaca_without_a_chat_template(tmp_path, words):
  """Its own prompt, as models without a template were taught on it."""
  base = dataclasses.replace(words, chat_template=None)
  row, _ = FORMS["Alpaca with input"]
  [document] = sources.read_documents(
    sources.Source("jsonl", str(write(tmp_path / "a.jsonl", [row])))
  )
  prompt, answer = document.plain
  assert answer == "w3"
  assert prompt == (
    "w0\n\nBelow is an instruction that describes a task, paired with an input "
    "that provides further context. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nw1\n\n### Input:\nw2\n\n"
    "### Response:\n"
  )
  ids, said = learnt(tmp_path, row, base)
  assert ids == [*base.encode(prompt + answer), EOS]
  assert said == [*ids_of("w3"), EOS]
  with error("a.jsonl line 1: .* has no chat template"):
    learnt(tmp_path, {"messages": CHAT}, base)


def test_examples_of_the_docs(tmp_path):
  """docs/data.md: each row is read, and each source is one."""
  page = (ROOT / "docs" / "data.md").read_text()
  [block] = re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)
  examples = block.splitlines()
  assert len(examples) == 8
  path = write(tmp_path / "a.jsonl", block)
  found = list(sources.read_documents(sources.Source("jsonl", str(path))))
  assert len(found) == len(examples)
  assert [bool(document.tools) for document in found] == [False] * 7 + [True]
  learnable = sources.Source("jsonl", str(path), loss="assistant")
  with error("a.jsonl line 1 is plain text"):
    list(sources.read_documents(learnable))
  [block] = re.findall(r"^```source\n(.*?)^```", page, re.M | re.S)
  for line in block.splitlines():
    sources.parse_sources(line, "data.source")
  for kind in sources.OPTIONS:
    assert f"| `{kind}` |" in page


def test_mask_equals_transformers(tmp_path, folder, unbegun):
  """Its mask of the template's own tag, on many turns."""
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )
  theirs.chat_template = template
  unbegun = dataclasses.replace(unbegun, chat_template=template)
  row, content = FORMS["ShareGPT"]
  found = theirs.apply_chat_template(
    content, return_assistant_tokens_mask=True, return_dict=True
  )
  ids, said = learnt(tmp_path, row, unbegun)
  assert ids == found["input_ids"]
  mask = np.array(found["assistant_masks"], bool)
  assert said == np.array(ids)[mask].tolist()
  assert ASSISTANT not in said
