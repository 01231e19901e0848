"""What a model says behind a prompt: `adapt-pruner generate`."""

from jax.sharding import Mesh

from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.evaluation import generate
from adapt_pruner_jax.formats import opening
from adapt_pruner_jax.formats.hf.generation_config import end_tokens


def of(
  model: str,
  prompt: str,
  max_new_tokens: int,
  sampling: generate.Sampling,
  seed: int,
  *,
  dtype: str,
  ignore_fields: str,
  mesh: Mesh,
) -> str:
  """The prompt and its continuation, without special tokens.

  Args:
    model: a directory or hub id.
    prompt: text.
    max_new_tokens, sampling, seed: as `generate.generate`'s.
    dtype: of the arithmetic.
    ignore_fields: fields of config.json to ignore, separated by commas.
    mesh: the devices.

  Raises:
    UserError: the model is missing or damaged, or the prompt too long.
  """
  config, params, folder = opening.open_model(model, dtype, ignore_fields, mesh)
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode(prompt)
  (new,) = generate.generate(
    *(config, params, [ids], max_new_tokens, sampling, seed),
    eos_ids=end_tokens(folder, config, tokenizer),
    mesh=mesh,
  )
  return tokenizer.backend.decode(ids + new, skip_special_tokens=True)
