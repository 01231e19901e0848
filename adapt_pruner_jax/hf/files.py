"""The files of a model directory: found, checked, read slice by slice."""

import json
from pathlib import Path
from typing import Any

from adapt_pruner_jax.errors import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONVERT = (
  'python -c "from transformers import AutoModelForCausalLM as M; '
  "M.from_pretrained('{0}').save_pretrained('{0}-safetensors')\""
)


def read_json(path: Path) -> dict[str, Any]:
  """A file that holds a JSON object.

  Raises:
    UserError: it is missing or holds something else.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(
      f"{path.parent} has no {path.name}: a HuggingFace model directory is "
      "needed"
    ) from error
  except (ValueError, OSError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(found, dict):
    raise UserError(f"{path} must hold a JSON object")
  return found


def write_json(file: Path, content: Any) -> None:
  file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class Checkpoint:
  """The tensors of a directory; only headers are read until `open`.

  Attributes:
    shapes, dtypes: of each tensor, by name.
  """

  def __init__(self, folder: Path):
    """Raises a UserError for files that are missing, damaged or unsafe."""
    self.folder = folder
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._file: dict[str, Path] = {}
    self._open: tuple[Path, Any] | None = None
    promised = _weight_map(folder)
    for file in sorted({*promised.values()}):
      self._read_header(file)
    for tensor, file in promised.items():
      if tensor and self._file.get(tensor) != file:
        raise UserError(f"{file} has no tensor {tensor}, unlike {INDEX} says")

  def slices(self, tensor: str) -> Any:
    """The tensor, to be indexed with slices: numpy arrays come out."""
    file = self._file[tensor]
    if self._open is None or self._open[0] != file:
      self._open = file, _open(file)
    return self._open[1].get_slice(tensor)

  def _read_header(self, file: Path) -> None:
    with _open(file) as opened:
      for tensor in opened.keys():  # noqa: SIM118, not a dict
        part = opened.get_slice(tensor)
        if tensor in self._file:
          raise UserError(
            f"{tensor} is in both {self._file[tensor].name} and {file}"
          )
        if part.get_dtype() not in DTYPES:
          raise UserError(
            f"{file}: {tensor} is stored as {part.get_dtype()}; only "
            f"{', '.join(DTYPES)} are supported, quantized models are not"
          )
        self._file[tensor] = file
        self.shapes[tensor] = tuple(part.get_shape())
        self.dtypes[tensor] = DTYPES[part.get_dtype()]


def _weight_map(folder: Path) -> dict[str, Path]:
  """Tensor -> file, as the index says; {"": file} if there is no index."""
  if (folder / SINGLE).is_file():
    return {"": folder / SINGLE}
  if not (folder / INDEX).is_file():
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])
    if pickles:
      raise UserError(
        f"{folder} has only {pickles[0].name}, which could run code when it is "
        f"read; convert it once with: {CONVERT.format(folder)}"
      )
    raise UserError(f"{folder} has no weights: no {SINGLE} and no {INDEX}")
  found = read_json(folder / INDEX).get("weight_map")
  if not isinstance(found, dict) or not found:
    raise UserError(f"{folder / INDEX} has no weight_map")
  for name in {*found.values()}:
    # Shards lie beside the index: a name with a path could lead anywhere.
    if not isinstance(name, str) or Path(name).name != name:
      raise UserError(
        f"{folder / INDEX}: {name!r} is not the name of a file in the folder"
      )
  return {tensor: folder / name for tensor, name in found.items()}


def _open(file: Path) -> Any:
  import safetensors

  try:
    return safetensors.safe_open(file, framework="numpy")
  except FileNotFoundError as error:
    raise UserError(f"{file} is missing") from error
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f"{file} is truncated or damaged ({error}): get it again"
    ) from error
