"""The files of a model directory: found, checked, mapped into memory."""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.storage import json_files
from adapt_pruner_jax.storage.confinement import confined

CONFIG = "config.json"
MANIFEST = "model.json"  # what an orbax directory has in its place
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = r"model-(\d+)-of-(\d+)\.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALL = slice(None)  # rows
FLOAT8 = "float8_e4m3fn"
# Others that are read: see fp8, mxfp4, text_part.
READ = DTYPES | {"F8_E4M3": FLOAT8, "U8": "uint8", "BOOL": "bool"}
COUNTER = ".num_batches_tracked"  # of a batch norm's training, no parameter
CONVERT = (
  'python -c "from transformers import AutoModelForCausalLM as M; '
  "M.from_pretrained('{0}').save_pretrained('{0}-safetensors')\""
)


def read_object(path: Path) -> dict[str, Any]:
  """A file of a model directory that holds a JSON object.

  Raises:
    UserError: it is missing or holds something else.
  """
  if not confined(path, path.parent).exists():
    raise UserError(
      f"{path.parent} has no {path.name}: a HuggingFace model directory is "
      "needed"
    )
  found = json_files.read_json(path)
  if not isinstance(found, dict):
    raise UserError(f"{path} must hold a JSON object")
  return found


def quant_method(quantization: Any) -> Any:
  """The method of a `quantization_config`, None if there is none."""
  found = quantization if isinstance(quantization, dict) else {}
  return found.get("quant_method")


class Checkpoint:
  """The tensors of a directory; only headers are read until `array`.

  Attributes:
    shapes, dtypes: of each tensor, by name; types that are not read are as the
      file names them.
  """

  def __init__(self, folder: Path, absent: Collection[str] = ()):
    """Reads the headers of all files of weights.

    Args:
      absent: tensors that need not be there though the index has them.

    Raises:
      UserError: files are missing, damaged, or outside of the folder.
    """
    self.folder = folder
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._file: dict[str, Path] = {}
    self._start: dict[str, int] = {}
    promised = _weight_map(folder)
    shards = {*promised.values()} if promised else _whole_files(folder)
    for file in sorted(shards):
      self._read_header(confined(file, folder))
    for tensor, file in promised.items():
      if tensor in absent or tensor.endswith(COUNTER):
        continue
      if self._file.get(tensor) != file:
        raise UserError(f"{file} has no tensor {tensor}, unlike {INDEX} says")

  def array(self, tensor: str, rows: slice = ALL) -> np.ndarray:
    """Rows of the tensor in its file: what is not looked at is not read.

    They have a mapping of their own, so that its pages go when the array goes.
    """
    mapped = np.memmap(
      self._file[tensor],
      jnp.dtype(self.dtypes[tensor]),
      "r",
      self._start[tensor],
      self.shapes[tensor],
    )
    whole = mapped.view(np.ndarray)
    return whole if rows == ALL else whole[rows]  # a number has no rows

  def _read_header(self, file: Path) -> None:
    with _open(file) as opened:
      start, header = _header(file)
      for tensor in opened.keys():  # noqa: SIM118, not a dict
        if tensor.endswith(COUNTER):
          continue
        part = opened.get_slice(tensor)
        if tensor in self._file:
          raise UserError(
            f"{tensor} is in both {self._file[tensor].name} and {file}"
          )
        self._file[tensor] = file
        self.shapes[tensor] = tuple(part.get_shape())
        self.dtypes[tensor] = READ.get(part.get_dtype(), part.get_dtype())
        if part.get_dtype() not in READ:
          continue  # it may be of a part that is not read
        first, end = header[tensor]["data_offsets"]
        size = math.prod(self.shapes[tensor])
        if end - first != size * jnp.dtype(self.dtypes[tensor]).itemsize:
          raise UserError(f"{file} is damaged at {tensor}: get it again")
        self._start[tensor] = start + first


def readable(checkpoint: Any) -> Any:
  """The checkpoint, or one of its parts, if all its types are read.

  Raises:
    UserError: a tensor is stored in another.
  """
  for tensor, kind in checkpoint.dtypes.items():
    if kind not in READ.values():
      raise UserError(
        f"{checkpoint.folder}: {tensor} is stored as {kind}; only "
        f"{', '.join(DTYPES)} are supported, quantized models are not"
      )
  return checkpoint


def _weight_map(folder: Path) -> dict[str, Path]:
  """Tensor -> file, as the index says; {} if there is none."""
  if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
    return {}
  found = read_object(folder / INDEX).get("weight_map")
  if not isinstance(found, dict) or not found:
    raise UserError(f"{folder / INDEX} has no weight_map")
  for name in {*found.values()}:
    # Shards lie beside the index: a name with a path could lead anywhere.
    good = isinstance(name, str) and "\0" not in name
    if not good or Path(name).name != name:
      raise UserError(
        f"{folder / INDEX}: {name!r} is not the name of a file in the folder"
      )
  return {tensor: folder / name for tensor, name in found.items()}


def _whole_files(folder: Path) -> list[Path]:
  """The file of weights, or all shards, where there is no index.

  Raises:
    UserError: there are none, or not all.
  """
  if (folder / SINGLE).is_file():
    return [folder / SINGLE]
  numbered = {f: re.fullmatch(SHARD, f.name) for f in folder.iterdir()}
  shards = {int(m[1]): f for f, m in numbered.items() if m}
  if shards:
    total = max(int(m[2]) for m in numbered.values() if m)
    gone = [n for n in range(1, total + 1) if n not in shards]
    if not gone and len(shards) == total:
      return list(shards.values())
    raise UserError(
      f"{folder} has {', '.join(sorted(f.name for f in shards.values()))}, but "
      f"no {INDEX}, and of {total} shards not number "
      f"{', '.join(map(str, gone))}: get them too"
    )
  pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])
  if pickles:
    raise UserError(
      f"{folder} has only {pickles[0].name}, which could run code when it is "
      f"read; convert it once with: {CONVERT.format(folder)}"
    )
  raise UserError(
    f"{folder} has no weights: no {SINGLE} and no {INDEX}; if its hub "
    "repository has pytorch_model.bin only, convert it once with: "
    f"{CONVERT.format('HUB_ID')}"
  )


def _header(file: Path) -> tuple[int, dict[str, Any]]:
  """Where the data starts, and the header, of a file that `_open` accepts."""
  with open(file, "rb") as opened:
    size = int.from_bytes(opened.read(8), "little")
    return 8 + size, json.loads(opened.read(size))


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
