"""The model's tokenizer: text or a chat in, token ids out.

`tokenizer.json` is read with the `tokenizers` package alone. Directories that
only have SentencePiece or vocabulary files are converted by Transformers, which
is imported for nothing else: it is slow to import, and pulls torch in where
torch is installed.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.storage import digest, json_files

# Any of these makes a directory without tokenizer.json worth converting.
CONVERTIBLE = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Encodes as Transformers does with the tokenizer of the same directory."""

  backend: Any  # tokenizers.Tokenizer
  path: str
  bos_token: str | None = None
  eos_token: str | None = None
  chat_template: str | None = None  # Jinja

  @property
  def bos_id(self) -> int | None:
    return self._id(self.bos_token)

  @property
  def eos_id(self) -> int | None:
    return self._id(self.eos_token)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of all that decides which ids a text or a chat becomes."""
    parts = (self.eos_token, self.bos_token, self.chat_template)
    text = json.dumps([self.backend.to_str(), *parts])
    return digest.of_bytes(text.encode())

  def encode(self, text: str) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds by itself."""
    return self.backend.encode(text).ids

  def encode_plain(self, text: str) -> list[int]:
    """Token ids without added special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    return [e.ids for e in self.backend.encode_batch_fast(list(texts))]

  def encode_chat(self, messages: Sequence[dict]) -> list[int]:
    """Token ids of a chat, as the chat template lays it out.

    Raises:
      UserError: no chat template, or one that cannot render these messages.
    """
    return self.encode_plain(self._apply_template(messages))

  def encode_chat_said(
    self, messages: Sequence[dict]
  ) -> tuple[list[int], np.ndarray]:
    """Token ids of a chat, and bool [N]: those that the assistant says.

    They come after the prompt that asks it to speak, up to and with the end of
    its turn.

    Raises:
      UserError: as `encode_chat`, or turns cannot be told apart.
    """
    text = self._apply_template(messages)
    encoding = self.backend.encode(text, add_special_tokens=False)
    starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    said = np.zeros(len(starts), bool)
    for start, stop in self._assistant_spans(messages, text):
      said |= (starts < stop) & (stops > start)
    return encoding.ids, said

  def _assistant_spans(
    self, messages: Sequence[dict], text: str
  ) -> list[tuple[int, int]]:
    """(start, stop) of the assistant's turns in the rendered `text`."""
    spans = []
    for i, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      turn = self._apply_template(messages[: i + 1])
      if not text.startswith(turn):
        raise UserError(
          f"the chat template of {self.path} renders turn {i + 1} in another "
          "way when more turns follow, so what the assistant said cannot be "
          "told apart; use loss=all, or one assistant turn a row"
        )
      # Where the prompt opens a thought that the turn lacks, the turn starts
      # at the point where they part.
      prompt = self._apply_template(messages[:i], prompt=True)
      spans.append((_common_prefix(prompt, turn), len(turn)))
    return spans

  def _apply_template(self, messages: Sequence[dict], prompt=False) -> str:
    if self.chat_template is None:
      raise UserError(
        f"{self.path} has no chat template (chat_template.jinja, or "
        "chat_template in tokenizer_config.json), so chats cannot be read; "
        'give rows of plain text {"text": ...}'
      )
    try:
      return _compile(self.chat_template).render(
        messages=list(messages),
        add_generation_prompt=prompt,
        bos_token=self.bos_token or "",
        eos_token=self.eos_token or "",
      )
    except UserError:
      raise
    except Exception as error:  # whatever a template's own code raises
      raise UserError(
        f"the chat template of {self.path} cannot render the chat: "
        f"{first_line(error)}"
      ) from error

  def _id(self, token: str | None) -> int | None:
    return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(model_dir: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a HuggingFace directory. No code of it is ever run.

  Raises:
    UserError: the directory is missing, or has no tokenizer that can be read.
  """
  folder = Path(model_dir)
  if not folder.is_dir():
    raise UserError(f"tokenizer: no such directory: {folder}")
  if (folder / "tokenizer.json").is_file():
    tokenizer = _from_json(folder)
  elif any((folder / name).is_file() for name in CONVERTIBLE):
    tokenizer = _converted(folder)
  else:
    raise UserError(
      f"{folder} has no tokenizer (tokenizer.json or {', '.join(CONVERTIBLE)});"
      " copy the tokenizer files of the original model there"
    )
  # Some files carry the length limit of the job they were last used for.
  tokenizer.backend.no_truncation()
  tokenizer.backend.no_padding()
  return tokenizer


def check_ids(
  ids: np.ndarray, vocab_size: int, where: str, tokenizer: Any = None
) -> None:
  """Raises a UserError naming the first id outside [0, vocab_size)."""
  if not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
    return
  bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
  token = tokenizer and tokenizer.backend.id_to_token(bad)
  raise UserError(
    f"{where}: token id {bad}{f' ({token!r})' if token else ''} is outside the "
    f"model's vocabulary of {vocab_size}; use the tokenizer that the model was "
    "trained with"
  )


def _from_json(folder: Path) -> Tokenizer:
  import tokenizers

  path = folder / "tokenizer.json"
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises bare Exception
    raise UserError(f"{path} cannot be read: {first_line(error)}") from error
  settings = _json(folder / "special_tokens_map.json")
  settings |= _json(folder / "tokenizer_config.json")
  ids = _json(folder / "config.json")
  return Tokenizer(
    backend,
    str(folder),
    _special(backend, settings.get("bos_token"), ids.get("bos_token_id")),
    _special(backend, settings.get("eos_token"), ids.get("eos_token_id")),
    _template(folder, settings.get("chat_template")),
  )


def _converted(folder: Path) -> Tokenizer:
  try:
    import transformers
  except ImportError as error:
    raise UserError(
      f"{folder} has no tokenizer.json, and converting what it has needs "
      "Transformers: pip install transformers sentencepiece"
    ) from error
  try:
    slow = transformers.AutoTokenizer.from_pretrained(
      str(folder), trust_remote_code=False, local_files_only=True
    )
    backend = slow.backend_tokenizer
  except Exception as error:  # it raises a dozen kinds
    raise UserError(
      f"{folder}: its tokenizer cannot be converted: {first_line(error)}; put "
      "a tokenizer.json there"
    ) from error
  return Tokenizer(
    backend, str(folder), slow.bos_token, slow.eos_token, slow.chat_template
  )


def _special(backend: Any, token: Any, token_id: Any) -> str | None:
  """A special token's text, by its entry in the tokenizer's config or the id
  in the model's."""
  if isinstance(token, dict):  # a serialised AddedToken
    token = token.get("content")
  if token is not None:
    return token
  if isinstance(token_id, list):
    token_id = token_id[0] if token_id else None
  return None if token_id is None else backend.id_to_token(token_id)


def _template(folder: Path, setting: Any) -> str | None:
  file = folder / "chat_template.jinja"
  if file.is_file():
    return file.read_text(encoding="utf-8")
  if isinstance(setting, list):  # several, by name
    setting = {t["name"]: t["template"] for t in setting}.get("default")
  return setting


@functools.lru_cache
def _compile(template: str) -> Any:
  """A chat template, sandboxed as in Transformers (chat_template_utils.py)."""
  try:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise UserError("chats need Jinja: pip install 'jinja2>=3.1.6'") from error
  if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
    raise UserError(
      f"jinja2 {jinja2.__version__} has known ways out of its sandbox: "
      "pip install 'jinja2>=3.1.6'"
    )

  def raise_exception(message: str):
    raise jinja2.TemplateError(message)

  def tojson(value, indent=None, **_):
    return json.dumps(value, ensure_ascii=False, indent=indent)

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


def _common_prefix(a: str, b: str) -> int:
  """Length of what two texts start with alike."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _json(path: Path) -> dict:
  """Contents of an optional JSON file."""
  if not path.is_file():
    return {}
  return json_files.read_json(path)
