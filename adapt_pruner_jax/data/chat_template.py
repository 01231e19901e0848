"""A chat as text, by the Jinja template that comes with a tokenizer.

It is rendered in Transformers' sandbox with what Transformers' own call passes:
the messages, tools, documents, whether the assistant is asked to speak, and the
special tokens that the tokenizer's configuration names. Nothing else of the
directory is run.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapt_pruner_jax.errors import UserError, first_line

# Names of one thing, in the order in which Transformers looks for it.
REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
  template: str,
  messages: Sequence[Mapping],
  special_tokens: Mapping[str, str],
  tools: Sequence[Mapping] | None = None,
  prompt: bool = False,
  where: str = "the chat template",
) -> str:
  """Lays out a chat as text, as Transformers' `apply_chat_template` does.

  As there, keys whose value is null are left out of the messages, and what an
  assistant thought has all the names that templates read.

  Args:
    template: Jinja.
    messages: dicts with `role` and what else the template reads.
    special_tokens: `bos_token` and so on; one that is missing is undefined.
    tools: JSON schemas of the functions that the assistant may call.
    prompt: end with what asks the assistant to speak.
    where: whose template it is, for messages.

  Raises:
    UserError: the template cannot render these messages.
  """
  try:
    return _compile(template).render(
      messages=[_shown(message) for message in messages],
      tools=tools,
      documents=None,
      add_generation_prompt=prompt,
      **special_tokens,
    )
  except UserError:
    raise
  except Exception as error:  # whatever a template's own code raises
    raise UserError(
      f"{where} cannot render the chat: {first_line(error)}"
    ) from error


def assistant_spans(
  rendered: Callable[..., str],
  messages: Sequence[Mapping],
  first: int = 0,
  where: str = "the chat template",
) -> tuple[str, list[tuple[int, int]]]:
  """Lays out a chat, and finds where in the text the assistant speaks.

  A turn starts after the prompt that asks for it and ends with what the
  template puts after it.

  Args:
    rendered: renders some messages; takes `prompt` like `render`.
    messages: the whole chat.
    first: turns before this one are left out.
    where: as of `render`.

  Returns:
    The text, and (start, stop) of each turn in it, in characters.

  Raises:
    UserError: as `render`, or the turns cannot be told apart.
  """
  text = rendered(messages)
  spans = []
  for i, message in enumerate(messages):
    if i < first or message["role"] != "assistant":
      continue
    turn = rendered(messages[: i + 1])
    if not text.startswith(turn):
      raise UserError(
        f"{where} renders turn {i + 1} in another way when more turns follow, "
        "so what the assistant said cannot be told apart; use loss=all, or one "
        "assistant turn a row"
      )
    # Where the prompt opens a thought that the turn lacks, the turn starts at
    # the point where they part.
    asked = rendered(messages[:i], prompt=True)
    spans.append((_common_prefix(asked, turn), len(turn)))
  return text, spans


def _shown(message: Mapping) -> dict:
  """A message as templates see it."""
  message = {k: v for k, v in message.items() if v is not None}
  thought = next((message[k] for k in REASONING if k in message), None)
  if thought is None:
    return message
  return {"thinking": thought} | message | {"reasoning_content": thought}


@functools.lru_cache
def _compile(template: str) -> Any:
  """A chat template, sandboxed as in Transformers (chat_template_utils.py)."""
  try:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise UserError("chats need Jinja: pip install 'jinja2>=3.1.6'") from error
  check_version(jinja2.__version__)

  def raise_exception(message: str):
    raise jinja2.TemplateError(message)

  def tojson(
    value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
  ):
    return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  # Templates print today's date; the same data must give the same tokens on
  # any day, so it is always the one that LLaMA 3.1's template falls back to.
  environment.globals["strftime_now"] = lambda _: "26 Jul 2024"
  # Transformers' own tag around what the assistant says; plain Jinja lacks it.
  template = re.sub(
    r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if 1 \2%}", template
  )
  template = re.sub(
    r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", template
  )
  return environment.from_string(template)


def check_version(version: str) -> None:
  """Raises a UserError for a Jinja whose sandbox is known to leak."""
  from packaging.version import Version

  if Version(version) < Version("3.1.6"):
    raise UserError(
      f"jinja2 {version} has known ways out of its sandbox: "
      "pip install 'jinja2>=3.1.6'"
    )


def _common_prefix(a: str, b: str) -> int:
  """Length of what two texts start with alike."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
