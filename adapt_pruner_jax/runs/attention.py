"""Which implementations of attention a run takes, for people."""

from jax.sharding import Mesh

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.models import kernels
from adapt_pruner_jax.models.model_config import ModelConfig


def taken(recipe: Config, full: ModelConfig, mesh: Mesh) -> str:
  """Says what pruning and training take, and why not what was asked for."""
  windows = set(full.window or (0,))
  source, found = recipe.calibration, []
  each = [("pruning", recipe.prune.attention, source.batch, source.seq_len)]
  if recipe.train.tokens:
    rows = recipe.data.batch // recipe.train.accumulation
    each.append(("training", recipe.train.attention, rows, recipe.data.seq_len))
  for name, asked, rows, length in each:
    training = name == "training"
    dtype = recipe.train.dtype if training else recipe.model.dtype or "float32"
    case = kernels.case_of_run(full, mesh, rows, length, dtype, training)
    # The walk of pruning has the layers' windows as data.
    known = sorted(windows) if training or windows == {0} else [None]
    chosen = [kernels.choose(asked, case._replace(window=w)) for w in known]
    words = dict.fromkeys(f"{k} ({why})" if why else k for k, why in chosen)
    found.append(f"{name} by {' and '.join(words)}")
  return ", ".join(found)
