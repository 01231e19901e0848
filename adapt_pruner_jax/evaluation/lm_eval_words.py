"""lm-eval's texts and chats as token ids: as its HF model makes them."""

import functools
from typing import Any

from absl import logging
from lm_eval.api.model import TemplateLM

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.models.model_config import ModelConfig

# What Transformers puts behind a message that is to be continued, with a space
# that tells whether a template trims.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class WordsLM(TemplateLM):
  """The part of an lm-eval model that only needs the tokenizer."""

  def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
    super().__init__()
    self.model_config, self.words = config, tokenizer
    self._system_role = True  # until the chat template refuses it
    # Each question's context is encoded once for each of its choices.
    self._encode = functools.lru_cache(maxsize=8)(tokenizer.encode)

  @property
  def eot_token_id(self) -> int:
    ids = self.model_config.eos_ids
    found = self.words.eos_id
    found = ids[0] if found is None and ids else found
    return 0 if found is None else found

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is replaced by: as lm-eval's HF model has it, the
    tokenizer's own begin token, else its end token; else the model's."""
    own = self.words.special_tokens
    if "eos_token" in own and "bos_token" not in own:
      return self.eot_token_id
    found = self.words.bos_id
    found = self.model_config.bos_id if found is None else found
    return self.eot_token_id if found is None else found

  @property
  def tokenizer_name(self) -> str:
    return self.words.path.replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The Jinja text that `apply_chat_template` uses; False = None of it."""
    return self.words.chat_template if chat_template else None

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Lays a chat out as lm-eval's HF model does.

    A template that refuses the system's role is asked without it, and that is
    said once.

    Args:
      add_generation_prompt: ends with what asks the assistant to speak; False =
        ends within the last message, which the answer continues.

    Raises:
      UserError: no chat template, or one that cannot render this.
    """
    rest = [said for said in chat_history if said["role"] != "system"]
    if not self._system_role:
      chat_history = rest
    try:
      if add_generation_prompt:
        return self.words.render_chat(chat_history, prompt=True)
      return self._unfinished(chat_history)
    except UserError:
      if len(rest) == len(chat_history):
        raise
      self._system_role = False
      logging.warning(
        "the chat template of %s refuses the system's role: descriptions and "
        "--system_instruction are left out",
        self.words.path,
      )
      return self.apply_chat_template(rest, add_generation_prompt)

  def _unfinished(self, messages: list[dict[str, str]]) -> str:
    """The chat up to the end of its last message's content."""
    *before, last = messages
    marked = last | {"content": last["content"] + MARK}
    text = self.words.render_chat([*before, marked])
    at = text.rfind(MARK.strip())
    if at < 0:
      raise UserError(
        f"the chat template of {self.words.path} drops the end of the last "
        "message, so an answer that begins with it cannot be asked for"
      )
    kept = text[at:].startswith(MARK)
    return text[:at] if kept else text[:at].rstrip()

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    if add_special_tokens is None:
      bos = self.words.bos_token
      add_special_tokens = not (bos and string.startswith(bos))
    if add_special_tokens:
      return self._encode(string)
    return self.words.encode_plain(string)

  def _pair(self, context: str, said: str) -> tuple[list[int], list[int]]:
    """Token ids of both; an empty context is lm-eval's prefix token."""
    if context:
      prefix, ids = self._encode_pair(context, said)
      # Blanks alone: they went over to the continuation.
      return prefix or [self.prefix_token_id], ids
    ids = self.tok_encode(said, add_special_tokens=False)
    if ids and ids[0] == self.prefix_token_id:
      return ids[:1], ids[1:]
    return [self.prefix_token_id], ids
