"""The pruning methods by name. All have the signature of `prune.prune`."""

from adapt_pruner_jax import baselines, curvature, prune
from adapt_pruner_jax.config import Prune

METHODS = {
  "adapt": prune.prune,
  "curvature": curvature.prune,
  **baselines.METHODS,
}


def refits_at_end(settings: Prune) -> bool:
  """Whether the run refits after the method; curvature does it by itself."""
  return settings.refit != "none" and settings.method != "curvature"


def resumes(settings: Prune) -> bool:
  """Whether a stage can go on from one of its steps: only masks change."""
  return settings.method == "adapt"
