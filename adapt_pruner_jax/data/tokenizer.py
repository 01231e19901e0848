"""The model's tokenizer: text or a chat in, token ids out.

`tokenizer.json` is read with the `tokenizers` package alone, and what that
package makes of it is what counts. Transformers reads the same file, and then
changes it for some directories; see docs/data.md for which. Directories that
only have SentencePiece or vocabulary files are converted by Transformers, which
is imported for nothing else: it is slow to import, and pulls torch in where
torch is installed.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner_jax.config import CHOICES
from adapt_pruner_jax.data import chat_template
from adapt_pruner_jax.errors import UserError, first_line
from adapt_pruner_jax.storage import digest, json_files
from adapt_pruner_jax.storage.confinement import confined

# Any of these makes a directory without tokenizer.json worth converting.
CONVERTIBLE = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Those that Transformers hands to a chat template under these names.
SPECIAL_TOKENS = (
  "bos_token",
  "eos_token",
  "unk_token",
  "sep_token",
  "pad_token",
  "cls_token",
  "mask_token",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Encodes as Transformers does with the tokenizer of the same directory."""

  backend: Any  # tokenizers.Tokenizer
  path: str
  bos_token: str | None = None
  eos_token: str | None = None
  chat_template: str | None = None  # Jinja
  tool_template: str | None = None  # of chats with tools, where it is another
  # What chat templates see, by name.
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  bos: str = "auto"  # data.bos: whether `begin_id` is used

  @property
  def bos_id(self) -> int | None:
    """Id of `bos_token`, whether texts begin with it or not."""
    return self._id(self.bos_token)

  @property
  def eos_id(self) -> int | None:
    """Id of `eos_token`; None = there is none."""
    return self._id(self.eos_token)

  @functools.cached_property
  def begin_id(self) -> int | None:
    """The token that every window and every row of text starts with.

    It is the one that the tokenizer itself puts before a text: models with one
    were trained to see it first, and without it their losses mean nothing (a
    Gemma's perplexity is off by orders of magnitude). None where the tokenizer
    has no such token, and with `data.bos=none`.
    """
    if self.bos == "none":
      return None
    encoding = self.backend.encode("a 1")
    added = np.array(encoding.special_tokens_mask, bool)  # by the tokenizer
    if added.all() or not added[0]:
      return None
    return encoding.ids[0]

  @property
  def begin_token(self) -> str | None:
    """The text of `begin_id`, for people."""
    begin = self.begin_id
    return None if begin is None else self.backend.id_to_token(begin)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of all that decides which ids a text or a chat becomes."""
    parts = (
      *(self.eos_token, self.bos_token, self.begin_id),
      *(self.chat_template, self.tool_template, dict(self.special_tokens)),
    )
    text = json.dumps([self.backend.to_str(), *parts])
    return digest.of_bytes(text.encode())

  def encode(self, text: str) -> list[int]:
    """Encodes a text, with the special tokens that the tokenizer adds."""
    return self.backend.encode(text).ids

  def encode_plain(self, text: str) -> list[int]:
    """Encodes a text without added special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_batch(
    self, texts: Sequence[str], special: bool = True
  ) -> list[np.ndarray]:
    """Encodes many texts to int32 [N], on all cores; not `special` =
    `encode_plain`."""
    found = self.backend.encode_batch_fast(
      list(texts), add_special_tokens=special
    )
    return [np.fromiter(e.ids, "<i4", len(e)) for e in found]

  def encode_batch_said(
    self,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    special: bool = True,
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes many texts, and says which tokens are in given spans.

    Args:
      texts: each is encoded as by `encode_batch`.
      spans: for each text, (start, stop) in characters.

    Returns:
      For each text its ids, int32 [N], and bool [N]: those with a character in
      a span.
    """
    encodings = self.backend.encode_batch(
      list(texts), add_special_tokens=special
    )
    found = []
    for encoding, places in zip(encodings, spans, strict=True):
      starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
      said = np.zeros(len(starts), bool)
      for start, stop in places:
        said |= (starts < stop) & (stops > start)
      found.append((np.array(encoding.ids, "<i4"), said))
    return found

  def encode_chat(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None
  ) -> list[int]:
    """Encodes a chat, as the chat template lays it out.

    Raises:
      UserError: as `render_chat`.
    """
    return self.encode_plain(self.render_chat(messages, tools))

  def encode_chat_said(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None
  ) -> tuple[list[int], np.ndarray]:
    """Encodes a chat; bool [N] tells the ids that the assistant says.

    They come after the prompt that asks it to speak, up to and with the end of
    its turn.

    Raises:
      UserError: as `chat_spans`.
    """
    text, spans = self.chat_spans(messages, tools)
    ((ids, said),) = self.encode_batch_said([text], [spans], special=False)
    return ids.tolist(), said

  def render_chat(
    self,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    prompt: bool = False,
  ) -> str:
    """Lays out a chat as text, see `chat_template.render`.

    Raises:
      UserError: no chat template, or one that cannot render these messages.
    """
    template = self.chat_template
    if tools is not None and self.tool_template is not None:
      template = self.tool_template
    if template is None:
      raise UserError(
        f"{self.path} has no chat template (chat_template.jinja, or "
        "chat_template in tokenizer_config.json), so chats cannot be read; "
        "copy one there, or give rows of plain text "
        '{"text": ...} or {"prompt": ..., "completion": ...}'
      )
    return chat_template.render(
      template, messages, self.special_tokens, tools, prompt, self._template
    )

  def chat_spans(
    self,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    first: int = 0,
  ) -> tuple[str, list[tuple[int, int]]]:
    """Lays out a chat, and finds the assistant's turns from `first` on.

    Raises:
      UserError: as `render_chat`, or the turns cannot be told apart.
    """

    def rendered(some: Sequence[Mapping], prompt: bool = False) -> str:
      return self.render_chat(some, tools, prompt)

    return chat_template.assistant_spans(
      rendered, messages, first, self._template
    )

  @property
  def _template(self) -> str:
    """Whose chat template it is, for messages."""
    return f"the chat template of {self.path}"

  def _id(self, token: str | None) -> int | None:
    return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(
  model_dir: str | os.PathLike, bos: str = "auto"
) -> Tokenizer:
  """Opens the tokenizer of a HuggingFace directory; runs no code of it.

  Args:
    model_dir: the directory.
    bos: as `data.bos`: auto, or none for windows without a begin token.

  Raises:
    UserError: the directory is missing, or has no tokenizer that can be read.
  """
  if bos not in CHOICES["data.bos"]:
    raise UserError(f"bos={bos} is not one of {', '.join(CHOICES['data.bos'])}")
  folder = Path(model_dir)
  if not folder.is_dir():
    raise UserError(f"tokenizer: no such directory: {folder}")
  for file in folder.iterdir():
    if file.suffix in (".json", ".jinja", ".model", ".txt"):
      confined(file, folder)
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
  return dataclasses.replace(tokenizer, bos=bos)


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
  settings = _settings(folder)
  ids = _json(folder / "config.json")
  template, tool_template = _templates(folder, settings)
  return Tokenizer(
    backend,
    str(folder),
    _special(backend, settings, "bos_token", ids),
    _special(backend, settings, "eos_token", ids),
    template,
    tool_template,
    # Transformers takes a token to pad with from tokenizer.json too.
    _template_tokens((backend.padding or {}) | settings),
  )


def _settings(folder: Path) -> dict:
  """The tokenizer's settings, from the files that Transformers takes."""
  settings = _json(folder / "tokenizer_config.json")
  if "added_tokens_decoder" not in settings:  # written before 2023
    settings |= _json(folder / "special_tokens_map.json")
  return settings


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
  templates = slow.chat_template
  if not isinstance(templates, dict):
    templates = {"default": templates}
  return Tokenizer(
    backend,
    str(folder),
    slow.bos_token,
    slow.eos_token,
    templates.get("default"),
    templates.get("tool_use"),
    dict(slow.special_tokens_map),
  )


def _special(
  backend: Any, settings: Mapping, name: str, ids: Mapping
) -> str | None:
  """A special token's text, by its entry in the tokenizer's settings or the id
  in the model's."""
  token = _content(settings.get(name))
  if token is not None:
    return token
  token_id = ids.get(f"{name}_id")
  if isinstance(token_id, list):
    token_id = token_id[0] if token_id else None
  if token_id is None or token_id < 0:  # -1 is none too
    return None
  return backend.id_to_token(token_id)


def _content(token: Any) -> str | None:
  """The text of a token, which may be a serialised AddedToken."""
  if isinstance(token, Mapping):
    token = token.get("content")
  return token if isinstance(token, str) else None


def _template_tokens(settings: Mapping) -> dict[str, str]:
  """What Transformers hands to a chat template: the tokens with a usual name,
  and those that a model names itself."""
  found = {name: _content(settings.get(name)) for name in SPECIAL_TOKENS}
  own = settings.get("extra_special_tokens")
  own = own if isinstance(own, Mapping) else {}
  named = {k: v for k, v in settings.items() if k.endswith("_token")}
  for name, token in (named | dict(own)).items():
    found[name] = _content(token)
  return {name: token for name, token in found.items() if token is not None}


def _templates(folder: Path, settings: Mapping) -> tuple[str | None, ...]:
  """The chat template, and the one for chats with tools if that is another."""
  given = settings.get("chat_template")
  if isinstance(given, list):  # several, by name
    given = {t["name"]: t["template"] for t in given}
  found = given if isinstance(given, dict) else {"default": given}
  file = folder / "chat_template.jinja"
  others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
  if file.is_file() or others:  # then those of the settings do not count
    files = {"default": file} if file.is_file() else {}
    files |= {path.stem: path for path in others}
    found = {
      name: confined(path, folder).read_text(encoding="utf-8")
      for name, path in files.items()
    }
  return found.get("default"), found.get("tool_use")


def _json(path: Path) -> dict:
  """Contents of an optional JSON file."""
  if not path.is_file():
    return {}
  return json_files.read_json(path)
