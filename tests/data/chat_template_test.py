"""Chats as text, as Transformers lays them out, and what is learnt of them."""

import dataclasses

from tests.data.words import (
  ASSISTANT,
  CHAT,
  END,
  START,
  TEMPLATE,
  USER,
  error,
  ids_of,
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
