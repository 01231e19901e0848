"""Rows of packages that have their own: HuggingFace datasets, TFDS."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_pruner_jax.data.rows import Document, to_document, without_null
from adapt_pruner_jax.errors import UserError, first_line

if TYPE_CHECKING:
  from adapt_pruner_jax.data.sources import Source


def hf_documents(source: "Source", skip: int) -> Iterator[Document]:
  """Reads rows with the package datasets, of the hub or a directory.

  Args:
    source: of kind hf.
    skip: rows that are left out, from the first.

  Raises:
    UserError: it cannot be loaded.
  """
  datasets = _package("datasets", source)
  _check_folder(source)
  folder = Path(source.name)
  saved = [folder / n for n in ("state.json", "dataset_dict.json")]
  try:
    if any(file.is_file() for file in saved):
      rows = datasets.load_from_disk(str(folder))
      rows = rows[source.split] if isinstance(rows, dict) else rows
    else:
      rows = datasets.load_dataset(
        source.name,
        source.subset or None,
        split=source.split,
        # A few documents of a huge dataset: without downloading all of it.
        streaming=bool(source.limit),
      )
    rows = rows.skip(skip) if skip else rows
    for number, row in enumerate(rows, skip):  # may download as it goes
      where = f"{source} row {number}"
      yield to_document(where, without_null(row), source.column, source.loss)
  except UserError:
    raise
  except Exception as error:  # network, cache and parser each raise their own
    raise UserError(
      f"{source} (split={source.split}) cannot be loaded: {first_line(error)}; "
      "without network, give a directory written by Dataset.save_to_disk"
    ) from error


def tfds_documents(source: "Source", skip: int) -> Iterator[Document]:
  """The same with TensorFlow Datasets, without TensorFlow."""
  tfds = _package("tensorflow_datasets", source)
  _check_folder(source)
  try:
    if Path(source.name).is_dir():
      builder = tfds.builder_from_directory(source.name)
      rows = builder.as_data_source(split=source.split)
    else:
      rows = tfds.data_source(source.name, split=source.split)
  except Exception as error:  # network, registry and reader raise their own
    raise UserError(
      f"{source} (split={source.split}) cannot be loaded: {first_line(error)}; "
      "prepare it once with file_format=array_record, for which no TensorFlow "
      "is needed"
    ) from error
  for number in range(skip, len(rows)):
    where = f"{source} row {number}"
    row = {k: _decoded(v, where) for k, v in rows[number].items()}
    yield to_document(where, row, source.column, source.loss)


def _decoded(value: Any, where: str) -> Any:
  """TFDS has strings as bytes."""
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{where} is not UTF-8: {error}") from error


def _check_folder(source: "Source") -> None:
  """A path that is not there is not a dataset to look for on the network."""
  if source.name[0] in "./~" and not Path(source.name).is_dir():
    raise UserError(f"{source}: no such directory")


def _package(name: str, source: "Source") -> Any:
  extra = {"datasets": "data", "tensorflow_datasets": "tfds"}[name]
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"{source} needs the package {name.replace('_', '-')}: "
      f"pip install 'adapt_pruner_jax[{extra}]'"
    ) from error
