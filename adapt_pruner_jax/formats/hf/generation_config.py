"""What ends a model's answer: the end tokens of a directory."""

from pathlib import Path

from adapt_pruner_jax.data.tokenizer import Tokenizer
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.hf.files import read_object
from adapt_pruner_jax.models.model_config import ModelConfig

FILE = "generation_config.json"


def end_tokens(
  folder: str | Path | None, config: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
  """Returns the ids that end an answer, the usual one first.

  They are those of generation_config.json where it names any, as Transformers'
  `generate` takes them (Llama 3's are three), else those of config.json, else
  the tokenizer's. Where generation_config.json is there without end tokens,
  Transformers never ends an answer; here config.json's end it.

  Args:
    folder: the model's directory; None = it has none.
    tokenizer: asked where neither file names any; None = not asked.

  Raises:
    UserError: generation_config.json is damaged, or an id in it is none.
  """
  found = () if folder is None else _in_file(Path(folder) / FILE)
  # Some files say "none" with -1.
  found = found or tuple(i for i in config.eos_ids if i >= 0)
  last = None if tokenizer is None else tokenizer.eos_id
  if not found and last is not None:
    found = (last,)
  return tuple(dict.fromkeys(found))


def _in_file(path: Path) -> tuple[int, ...]:
  if not path.is_file():
    return ()
  named = read_object(path).get("eos_token_id")
  ids = named if isinstance(named, list) else [named]
  ids = [i for i in ids if i is not None]
  # A bool is an int to Python, not to this file.
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise UserError(
      f"{path}: eos_token_id={named!r} must be a token id or a list of them"
    )
  return tuple(i for i in ids if i >= 0)
