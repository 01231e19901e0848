"""What tests of text share: a tokenizer with a token a word, files, chats."""

import json

import pytest

from adapt_pruner_jax.data import sources
from adapt_pruner_jax.errors import UserError

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


CHAT = [
  {"role": "user", "content": "w1 w2"},
  {"role": "assistant", "content": "w3"},
  {"role": "user", "content": "w4"},
  {"role": "assistant", "content": "w5 w6"},
]
START, END, USER, ASSISTANT = 3, 4, V, V + 1


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
