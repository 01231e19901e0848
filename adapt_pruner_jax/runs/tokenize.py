"""Fills the cache of tokens before a run needs them."""

from collections.abc import Callable
from pathlib import Path

from adapt_pruner_jax.data.sources import parse_sources
from adapt_pruner_jax.data.token_store import tokenise
from adapt_pruner_jax.data.tokenizer import load_tokenizer
from adapt_pruner_jax.distributed.stopping import stop_signals
from adapt_pruner_jax.errors import StoppedError, UserError
from adapt_pruner_jax.formats.hf import load
from adapt_pruner_jax.reporting.log import Log
from adapt_pruner_jax.runs.inputs import model_path
from adapt_pruner_jax.storage import cache


def tokenize(
  spec: str,
  model: str,
  tokens: int = 0,
  bos: str = "auto",
  say: Callable[[str], None] | None = None,
) -> None:
  """Tokenises sources, as a run with the same model would.

  Args:
    spec: as `data.source`.
    model: as `model.path`.
    tokens: that a run can use of all sources together; 0 = all there are.
    bos: as `data.bos`.
    say: is told in a line how far it is; default the console.

  Raises:
    UserError: a source cannot be read, or does not fit the model.
    StoppedError: asked to stop by SIGTERM or SIGINT; shards that are done stay.
  """
  if tokens < 0:
    raise UserError(f"--tokens={tokens} must be at least 0; 0 = all there are")
  try:
    sources = parse_sources(spec, "data.source")
  except UserError as error:
    named = str(error).replace("--config.data.source", "--source")
    raise UserError(named) from error
  for source in sources:
    if source.kind in ("npy", "self"):
      raise UserError(f"--source={spec}: {source.kind} is not tokenised")
  log = Log(None)
  say = say or log.say
  folder = model_path(model, log)
  vocab_size = load.read_config(str(folder)).vocab_size
  tokenizer = load_tokenizer(folder, bos)
  weights = sum(source.weight for source in sources)
  kept = cache.tokens(Path())
  with stop_signals() as stopping:

    def stop() -> None:
      if stopping.here:
        raise StoppedError("stopped; the same command goes on")

    for source in sources:
      need = -(-tokens * source.weight // weights)
      found = tokenise(
        *(source, tokenizer, vocab_size, kept, say, int(need), stop)
      )
      more = "" if found.whole else ", enough of it"
      say(f"{source}: {len(found.tokens):,} tokens in {kept}{more}")
