"""What a run depends on, in a few bytes: its model, tokens and versions."""

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from adapt_pruner_jax.config import latency_table
from adapt_pruner_jax.data import sources
from adapt_pruner_jax.data.tuning_questions import TuningQuestions
from adapt_pruner_jax.distributed import agreement
from adapt_pruner_jax.formats.gguf import directory as gguf_directory
from adapt_pruner_jax.formats.hf import cut_vocabulary, files, load
from adapt_pruner_jax.runs import vocabulary
from adapt_pruner_jax.storage import digest

if TYPE_CHECKING:
  from adapt_pruner_jax.runs.inputs import Inputs


def fingerprints(inputs: "Inputs") -> dict[str, str]:
  """Digests of the original's files, of the tokens that stay if not all do,
  of the first calibration samples, and of what choices and results are by."""
  windows_NT = inputs.calibration.batch(0)
  source, texts = inputs.original.source, _of_texts(inputs)
  found = {name: value for name, value in texts.items() if value}
  if linked := _linked(source):
    found["linked"] = digest.of_parts(linked)
  if inputs.whole:
    found["vocab"] = vocabulary.fingerprint(inputs.source)
  settings = inputs.recipe.prune
  if settings.counts("latency"):
    table = latency_table.read(settings.budget_table)
    found["latency"] = digest.of_json(table)
  return found | {
    "model": digest.of_parts(_own(source)),
    "calibration": digest.of_bytes(windows_NT),
  }


def what_is_asked(recipe: Any, path: Path, **more: Any) -> dict[str, Any]:
  """By what it is for people: what processes are told, before one of them takes
  another way than the others and all wait.

  Args:
    recipe: of the run.
    path: its work directory.
    more: other flags.
  """
  return {
    "versions": versions(),
    "recipe": dataclasses.asdict(recipe),
    "--workdir": str(path),
    "flags": more,
  }


def require_same_evaluation(**flags: Any) -> None:
  """Raises as `agreement.require_same`, of what an evaluation depends on.

  Args:
    flags: as of `what_is_evaluated`.
  """
  if jax.process_count() > 1:
    agreement.require_same(what_is_evaluated(**flags), "at the start")


def what_is_evaluated(**flags: Any) -> dict[str, Any]:
  """By what it is for people: what an evaluation without a run depends on.

  Args:
    flags: all of `evaluate`'s, with `model`, `baseline` or "", and `text`, a
      file or "".
  """
  models = [m for m in (flags["model"], flags["baseline"]) if m]
  text = flags["text"]
  return {
    "versions": versions(),
    "flags": flags,
    "model": [_of_files(load.resolve(m)) for m in models],
    "text": text and digest.of_bytes(sources.read_text(text).encode()),
  }


def _of_files(folder: Path) -> str:
  """Digest of a model's directory: weights, tokenizer, what else there is."""
  return digest.of_parts(sorted(p for p in folder.iterdir() if p.is_file()))


def what_is_read(inputs: "Inputs") -> dict[str, Any]:
  """By what it is for people: all that a run depends on, in a few bytes."""
  return {
    "versions": versions(),
    "recipe": dataclasses.asdict(inputs.recipe),
    "model": weights_fingerprint(inputs.source),
    "tokenizer": inputs.tokenizer and inputs.tokenizer.fingerprint,
    "calibration tokens": _of_tokens(inputs.calibration),
    "training tokens": inputs.rows and inputs.rows.fingerprint,
  } | {f"{name} tokens": value for name, value in _of_texts(inputs).items()}


def _of_texts(inputs: "Inputs") -> dict[str, str | None]:
  """Digests of what choices are made by and results are measured on."""
  reported_N = inputs.eval_tokens
  return {
    "tuning": _of_tokens(inputs.tuning),
    "search": _of_tokens(inputs.search_data),
    "evaluation": None if reported_N is None else digest.of_bytes(reported_N),
  }


def _of_tokens(data: Any) -> str | None:
  """Digest of the first windows, or of all questions; None of nothing."""
  if data is None:
    return None
  asked = isinstance(data, TuningQuestions)
  return digest.of_bytes(data.tokens_NT if asked else data.batch(0))


def versions() -> dict[str, str]:
  """Of Python and of the packages that a result depends on."""
  names = ("adapt-pruner-jax", "jax", "flax", "optax", "orbax-checkpoint")
  return {"python": platform.python_version()} | {
    name: importlib.metadata.version(name) for name in names
  }


def weights_fingerprint(source: Path) -> str:
  """Digest of a model's files, and of those that it has by a link."""
  return digest.of_parts([*_own(source), *_linked(source)])


def _own(source: Path) -> list[Path]:
  if source.is_file():
    return [source]
  return [source / files.CONFIG, *sorted(source.glob("*.safetensors"))]


def _linked(source: Path) -> list[Path]:
  """A gguf file, or the files of the model whose vocabulary was cut."""
  gguf = source / gguf_directory.WEIGHTS
  if gguf.is_symlink():
    return [gguf]
  uncut = cut_vocabulary.source_of(source)
  if uncut is None:
    return []
  return [source / cut_vocabulary.KEPT, *_own(uncut), *_linked(uncut)]
