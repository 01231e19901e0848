"""A row of a data set as a document: plain text, or the turns of a chat.

The forms that people have, told apart by their fields:

  {"text": "..."}
  {"messages": [{"role": "user", "content": "..."}, ...]}      OpenAI
  {"conversations": [{"from": "human", "value": "..."}, ...]}  ShareGPT
  {"instruction": "...", "input": "...", "output": "..."}      Alpaca
  {"prompt": "...", "completion": "..."}                       plain text

`question` and `query` are names of an instruction, `response` and `answer` of
an output. `system` is a turn before all others, `tools` the functions that the
assistant may call, `history` of Alpaca earlier pairs. A prompt and a completion
may also be lists of turns.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapt_pruner_jax.errors import UserError

TURNS = ("messages", "conversations")
QUESTIONS = ("instruction", "question", "query", "prompt", "input")
ANSWERS = ("output", "response", "answer", "completion")
SYSTEMS = ("system", "system_prompt")
PROMPT_FIELDS = ("prompt", "messages", "system", "system_prompt", "tools")
SAID = {"role": "content", "from": "value"}  # fields of a turn
ALLOWED = (
  "text, messages, conversations, instruction and output, or prompt and "
  "completion"
)
ROLES = {
  "human": "user",
  "prompter": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "bing": "assistant",
  "bard": "assistant",
  "bot": "assistant",
  "model": "assistant",
  "observation": "tool",
  "function_response": "tool",
  "function_call": "function_call",
} | {
  role: role
  for role in ("user", "assistant", "system", "developer", "tool", "function")
}
# Of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), for models without
# a chat template: what their instruction data looked like.
ALPACA = (
  "Below is an instruction that describes a task. Write a response that "
  "appropriately completes the request.\n\n"
  "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
  "Below is an instruction that describes a task, paired with an input that "
  "provides further context. Write a response that appropriately completes the "
  "request.\n\n"
  "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Document(NamedTuple):
  """Holds what is tokenised as one piece."""

  where: str  # for messages, e.g. "a.jsonl line 12"
  content: str | list[dict]  # text, or the messages of a chat
  # How much of it is a prompt, not learnt with loss=assistant: characters of a
  # text, turns of a chat.
  prompt: int = 0
  tools: list[dict] | None = None  # JSON schemas of functions
  # (prompt, answer) as text, for a model without a chat template.
  plain: tuple[str, str] | None = None
  tokens: list[int] | None = None  # as they are; `prompt` counts tokens then


def to_document(
  where: str, row: Any, column: str = "", loss: str = "all"
) -> Document:
  """Reads and checks the document in a row.

  Args:
    where: the row's file and line, for messages.
    row: an object with the fields of one of the forms at the top.
    column: the field with the text or the turns; empty = by the row's fields.
    loss: all or assistant; with the latter the row must tell the prompt from
      the answer, and `text` is only taken where nothing else is there.

  Raises:
    UserError: the row has none of the forms, or something else in a field.
  """
  if not isinstance(row, Mapping):
    raise UserError(
      f'{where} is not an object; write {{"text": ...}} or '
      '{"messages": [{"role": ..., "content": ...}]}'
    )
  row = {key: value for key, value in row.items() if value is not None}
  if column:
    if column not in row:
      raise _no_field(where, row, column)
    return _of_field(where, row, column, loss)
  names = [*TURNS, "text"] if loss == "assistant" else ["text", *TURNS]
  if loss == "assistant" and _pair(row):
    names.remove("text")
  found = next((name for name in names if name in row), None)
  if found is not None:
    return _of_field(where, row, found, loss)
  pair = _pair(row)
  if pair is None:
    raise _no_field(where, row, "")
  return _of_pair(where, row, *pair)


def to_prompt(where: str, row: Any) -> tuple[list[dict], list[dict] | None]:
  """Reads a prompt that a model is to answer: its messages, and its tools.

  Args:
    where: the row's file and line, for messages.
    row: {"prompt": str} or {"messages": [...]}, and perhaps system and tools;
      what the assistant says last is left out, it is to be said anew.

  Raises:
    UserError: the row has neither, other fields too, or nobody asks anything.
  """
  allowed = '{"prompt": "..."} or {"messages": [{"role": ..., "content": ...}]}'
  if not isinstance(row, Mapping):
    raise UserError(f"{where} is not an object; write {allowed}")
  row = {key: value for key, value in row.items() if value is not None}
  if ("prompt" in row) == ("messages" in row):
    raise UserError(
      f"{where} must have one of prompt and messages; it has "
      f"{', '.join(map(str, row)) or 'nothing'}; write {allowed}"
    )
  others = [key for key in row if key not in PROMPT_FIELDS]
  if others:
    raise UserError(
      f"{where} has {others[0]!r}, which a prompt has not; write {allowed}, "
      "with system and tools where they are needed"
    )
  if "prompt" in row:
    asked = _text(f"{where}: prompt", row["prompt"])
    messages = [{"role": "user", "content": asked}]
  elif isinstance(row["messages"], list):
    messages = _turns(f"{where}: messages", row["messages"])
  else:
    raise UserError(f"{where}: messages is not a list; write {allowed}")
  while messages and messages[-1]["role"] == "assistant":
    messages.pop()
  if not messages or not str(messages[-1].get("content", "")).strip():
    raise UserError(f"{where} asks nothing: the prompt is empty")
  return _with_system(where, row, messages), _tools(where, row)


def to_answer(where: str, row: Any) -> Document:
  """Reads a row of a file that `evaluation/answers.py` writes.

  Raises:
    UserError: it is not such a row.
  """
  names = ("prompt_tokens", "answer_tokens", "messages")
  if not isinstance(row, Mapping) or any(
    not isinstance(row.get(name), list) for name in names
  ):
    raise UserError(
      f"{where} is no answer of a dense model, with {', '.join(names)}; "
      "self:FILE has prompts answered"
    )
  prompt, answer = row["prompt_tokens"], row["answer_tokens"]
  if not all(type(token) is int for token in (*prompt, *answer)):
    raise UserError(f"{where}: a token is not a whole number")
  return Document(where, row["messages"], len(prompt), tokens=prompt + answer)


def without_null(value: Any) -> Any:
  """Copies without the fields that are null: a table gives every row all the
  fields that any row has. What a turn says stays, as null may be meant."""
  if isinstance(value, Mapping):
    said = next((SAID[name] for name in SAID if name in value), None)
    return {
      k: without_null(v) for k, v in value.items() if v is not None or k == said
    }
  if isinstance(value, list):
    return [without_null(item) for item in value]
  return value


def _no_field(where: str, row: Mapping, column: str) -> UserError:
  return UserError(
    f"{where} has no {column or 'text or messages'}; it has "
    f"{', '.join(map(str, row)) or 'nothing'}; allowed are {ALLOWED}; name "
    "another field that has the text or the turns with column=NAME"
  )


def _pair(row: Mapping) -> tuple[str, str] | None:
  """The names of the fields with the question and with the answer."""
  question = next((name for name in QUESTIONS if name in row), None)
  answer = next((name for name in ANSWERS if name in row), None)
  return (question, answer) if question and answer else None


def _of_field(where: str, row: Mapping, name: str, loss: str) -> Document:
  """The document of a field with a text or with turns."""
  content = row[name]
  if name in TURNS and isinstance(content, str):
    content = _json(f"{where}: {name}", content)
  if isinstance(content, Mapping):  # how `datasets` shows a list of objects
    if not all(isinstance(column, list) for column in content.values()):
      raise UserError(f"{where}: {name} is one object, not a list of messages")
    turns = zip(*content.values(), strict=False)
    content = [dict(zip(content, turn, strict=True)) for turn in turns]
  if name == "conversations" and _all_strings(content):
    # LIMA's: only what is said, turn by turn.
    roles = itertools.cycle(("user", "assistant"))
    turns = zip(roles, content, strict=False)
    content = [{"role": role, "content": said} for role, said in turns]
  if isinstance(content, list):
    messages = _with_system(where, row, _turns(f"{where}: {name}", content))
    return Document(where, messages, tools=_tools(where, row))
  if not isinstance(content, str):
    raise UserError(
      f"{where}: {name} is {type(content).__name__}, not a string or a list "
      "of messages"
    )
  if loss == "assistant":
    raise UserError(
      f"{where} is plain text, and loss=assistant needs chats "
      '{"messages": [{"role": ..., "content": ...}]} or pairs '
      '{"prompt": ..., "completion": ...}'
    )
  return Document(where, _text(f"{where}: {name}", content))


def _all_strings(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _of_pair(where: str, row: Mapping, ask: str, answer: str) -> Document:
  """The document of a question and its answer."""
  question, said = row[ask], row[answer]
  tools = _tools(where, row)
  if isinstance(question, list) and isinstance(said, list):
    before = _turns(f"{where}: {ask}", question)
    before = _with_system(where, row, before)
    after = _turns(f"{where}: {answer}", said)
    return Document(where, before + after, len(before), tools)
  question = _text(f"{where}: {ask}", question)
  said = _text(f"{where}: {answer}", said)
  if (ask, answer) == ("prompt", "completion"):
    return Document(where, question + said, len(question))
  more = next(
    (row[n] for n in ("input", "context") if n in row and n != ask), ""
  )
  more = _text(f"{where}: input", more)
  messages = _history(where, row)
  # As LLaMA-Factory joins them.
  asked = "\n".join(filter(None, (question, more)))
  messages += [
    {"role": "user", "content": asked},
    {"role": "assistant", "content": said},
  ]
  plain = None
  if len(messages) == 2:
    layout = ALPACA_INPUT if more else ALPACA
    prompt = layout.format(instruction=question, input=more)
    system = _system(where, row)
    plain = (f"{system}\n\n{prompt}" if system else prompt, said)
  messages = _with_system(where, row, messages)
  return Document(where, messages, len(messages) - 1, tools, plain)


def _history(where: str, row: Mapping) -> list[dict]:
  """The pairs before Alpaca's last one."""
  messages = []
  pairs = row.get("history", [])
  if not isinstance(pairs, Sequence):
    raise UserError(f"{where}: history is not a list of [question, answer]")
  for i, pair in enumerate(pairs):
    if not (isinstance(pair, Sequence) and len(pair) == 2):
      raise UserError(f"{where}: history[{i}] is not [question, answer]")
    for role, text in zip(("user", "assistant"), pair, strict=True):
      content = _text(f"{where}: history[{i}]", text)
      messages.append({"role": role, "content": content})
  return messages


def _system(where: str, row: Mapping) -> str:
  name = next((name for name in SYSTEMS if name in row), None)
  return "" if name is None else _text(f"{where}: {name}", row[name])


def _with_system(where: str, row: Mapping, messages: list[dict]) -> list[dict]:
  """The turns behind the row's own system turn, if it has one."""
  system = _system(where, row)
  if not system or (messages and messages[0]["role"] == "system"):
    return messages
  return [{"role": "system", "content": system}, *messages]


def _tools(where: str, row: Mapping) -> list[dict] | None:
  """The row's functions; some sets keep them as JSON in a string."""
  tools = row.get("tools")
  if isinstance(tools, str):
    tools = _json(f"{where}: tools", tools) if tools.strip() else None
  if not tools:
    return None
  if not isinstance(tools, list) or not all(
    isinstance(tool, Mapping) for tool in tools
  ):
    raise UserError(f"{where}: tools is not a list of JSON schemas")
  return list(tools)


def _json(where: str, text: str) -> Any:
  """What some sets keep as JSON in a string, as tables hold it more easily."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not valid JSON: {error}") from error


def _turns(where: str, turns: Sequence) -> list[dict]:
  """Messages with `role` and `content`, as chat templates read them."""
  return [_turn(f"{where}[{i}]", turn) for i, turn in enumerate(turns)]


def _turn(where: str, turn: Any) -> dict:
  if not isinstance(turn, Mapping):
    raise UserError(f"{where} is not an object with role and content")
  sharegpt = "from" in turn and "role" not in turn
  who, what = ("from", "value") if sharegpt else ("role", "content")
  role, content = turn.get(who), turn.get(what)
  if not isinstance(role, str):
    raise UserError(f"{where} has no string {who!r}")
  if sharegpt:
    if role.lower() not in ROLES:
      raise UserError(
        f"{where} is from {role!r}; allowed are {', '.join(ROLES)}"
      )
    role = ROLES[role.lower()]
  if role == "function_call":
    return _call(where, content)
  rest = {k: v for k, v in turn.items() if k not in (who, what)}
  message = {"role": role} | {k: v for k, v in rest.items() if v is not None}
  if content is None and message.get("tool_calls"):
    return message
  if content is None and role == "assistant" and what in turn:
    content = ""  # an answer of nothing
  if content is None:
    raise UserError(
      f"{where} has no string {what!r}; null is allowed for the assistant only"
    )
  message["content"] = _text(f"{where}: {what}", content, parts=True)
  return message


def _call(where: str, content: Any) -> dict:
  """ShareGPT's turn with a function's name and arguments, as JSON."""
  try:
    calls = json.loads(content) if isinstance(content, str) else content
  except ValueError as error:
    raise UserError(
      f"{where}: a function_call is no valid JSON: {error}"
    ) from error
  calls = calls if isinstance(calls, list) else [calls]
  if not all(isinstance(c, Mapping) and "name" in c for c in calls):
    raise UserError(
      f"{where}: a function_call is not an object with name and arguments"
    )
  made = [{"type": "function", "function": dict(call)} for call in calls]
  return {"role": "assistant", "tool_calls": made}


def _text(where: str, value: Any, parts: bool = False) -> str:
  """A string, or a list of parts of text as one string."""
  if parts and isinstance(value, list):
    return "".join(_part(f"{where}[{i}]", part) for i, part in enumerate(value))
  if not isinstance(value, str):
    raise UserError(
      f"{where} is {type(value).__name__}, not a string"
      + (" or a list of parts with text" if parts else "")
    )
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f"{where} has half a character (a lone surrogate) at {error.start}"
      ) from error
  return value


def _part(where: str, part: Any) -> str:
  if isinstance(part, Mapping):
    kind = part.get("type", "text")
    if kind != "text":
      raise UserError(f"{where} is of type {kind!r}; only text can be read")
    part = part.get("text")
  return _text(where, part)
