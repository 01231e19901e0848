"""A GGUF file as a HuggingFace directory, for the rest of the program.

The directory has config.json, the tokenizer and a link to the file, whose
tensors are dequantised one at a time when they are read: no copy is kept.
"""

import functools
from pathlib import Path

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats.gguf import reader, tokenizer_json
from adapt_pruner_jax.formats.hf.files import CONFIG
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.storage import cache, digest, json_files, publish

FORMAT = 1  # of the directory
WEIGHTS = ".source.gguf"  # a link
ADVICE = (
  "what is read of a gguf file is kept there: set ADAPT_PRUNER_CACHE to a "
  "directory that can be written"
)


def is_gguf(path: Path) -> bool:
  """Whether a path is a GGUF file, by its name."""
  return path.suffix.lower() == ".gguf" and path.is_file()


def of(path: Path) -> Path:
  """The directory of a GGUF file, made unless it is there.

  Raises:
    UserError: the file cannot be read, or the directory not be written.
  """
  state = path.stat()
  key = f"{FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
  name = f"gguf-{digest.of_bytes(key.encode())[:16]}"
  folder = cache.home() / name / path.stem
  if (folder / CONFIG).is_file():
    return folder
  file = _open(path)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise publish.unwritable(folder, error, ADVICE) from error
  try:
    with publish.directory(folder, advice=ADVICE) as made:
      _fill(made, file)
  except UserError:
    if not (folder / CONFIG).is_file():  # else another process was faster
      raise
  return folder


def checkpoint(
  folder: Path, config: ModelConfig | None = None
) -> reader.Checkpoint | None:
  """The tensors of a directory that `of` made; None for any other.

  Args:
    config: of the model; None = as the file says.
  """
  link = folder / WEIGHTS
  if not link.is_symlink():
    return None
  file = _open(link)
  return reader.Checkpoint(file, config or reader.read_config(file))


def _open(path: Path) -> reader.File:
  path = path.resolve()
  if not path.is_file():
    raise UserError(f"{path} is gone: give the gguf file's new place")
  state = path.stat()
  return _open_once(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_once(path: Path, size: int, changed: int) -> reader.File:
  """Headers with vocabularies take seconds to read."""
  return reader.File(path)


def _fill(folder: Path, file: reader.File) -> None:
  reader.Checkpoint(file, reader.read_config(file))  # or it is refused now
  raw = reader.raw_config(file)
  json_files.write_json(folder / CONFIG, raw)
  if content := tokenizer_json.make(file):
    json_files.write_json(folder / "tokenizer.json", content)
    context = raw["max_position_embeddings"]
    settings = tokenizer_json.settings(file, context)
    json_files.write_json(folder / "tokenizer_config.json", settings)
  if licence := file.get("general.license"):
    card = f"---\nlicense: {str(licence).splitlines()[0]}\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
  (folder / WEIGHTS).symlink_to(file.path.resolve())
