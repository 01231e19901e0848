"""Files of an export whose bytes are limited: what is in them beside weights,
and the sizes that they have in the end."""

from pathlib import Path

import jax.numpy as jnp

from adapt_pruner_jax.config import Config, Prune
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.formats.gguf import writer
from adapt_pruner_jax.formats.hf import weights
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.pruning import budgets
from adapt_pruner_jax.storage import places

GGUF = "model.gguf"  # in the work directory
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def dtype(recipe: Config) -> str:
  """The dtype that weights are exported in; "" = as they are stored."""
  settings = recipe.prune
  if settings.counts("bytes") and settings.budget_export in DTYPES:
    return DTYPES[settings.budget_export]
  return recipe.model.dtype


def beside(settings: Prune, config: ModelConfig, source: Path) -> int:
  """Bytes of an export beside its weights, at most: names, sizes, tokens.

  Args:
    settings: say which export; without a limit of bytes there is none.
    config: of the model to prune.
    source: its directory, which has the tokenizer.

  Raises:
    UserError: a gguf of this model has other bytes than its weights'.
  """
  if not settings.counts("bytes"):
    return 0
  export = settings.budget_export
  if export in DTYPES:
    return weights.header_bytes(config, jnp.dtype(DTYPES[export]))
  # llama.cpp's own tool begins with a file of ours, which it only quantises.
  kind = export if export in writer.KINDS else "f16"
  params = model_config.abstract_params(config, jnp.dtype("float32"))
  arch = writer.architecture(config)
  if arch == "qwen3" and not config.tied:
    raise UserError(
      f"--config.prune.budget_export={export}: a gguf of {config.family} has "
      "layers of one size, to which unequal ones are padded; limit another "
      "export (bf16), or another budget (params)"
    )
  return writer.header_bytes(config, params, source, kind)


def write(settings: Prune, path: Path) -> str:
  """Writes the gguf whose bytes are limited; says what it did, "" = nothing.

  Args:
    path: the work directory, which has the result as `model`.
  """
  export = settings.budget_export
  if not settings.counts("bytes") or export in DTYPES:
    return ""
  if export not in writer.KINDS:
    return (
      f"llama.cpp's own tool makes the {export} file: adapt-pruner convert "
      f"--model={path / 'model'} --format=gguf --dtype=f16 --out=f16.gguf, "
      f"then llama-quantize f16.gguf {GGUF} {export.upper()}"
    )
  out = path / GGUF
  convert.convert(
    str(path / "model"), out, "gguf", dtype=export, overwrite=True
  )
  return f"{out}: {places.size(out):,} bytes"


def amounts(
  settings: Prune,
  before: ModelConfig,
  after: ModelConfig,
  path: Path,
  extra: int,
  weights: int,
) -> dict:
  """What the budget holds before and after, of bytes in the files written.

  Args:
    before, after: the original and the result.
    path: the work directory with the result's export.
    extra: of the original, from `beside`.
    weights: bytes of the result's safetensors files.
  """
  extra = extra if settings.budget == "bytes" else 0
  sizes = [budgets.count(c, settings) + extra for c in (before, after)]
  if settings.budget == "bytes" and settings.budget_export in DTYPES:
    sizes[1] = weights
  elif settings.budget == "bytes" and (path / GGUF).exists():
    sizes[1] = places.size(path / GGUF)
  first, last = (budgets.value(size, settings) for size in sizes)
  return {"budget_before": first, "budget_after": last}
