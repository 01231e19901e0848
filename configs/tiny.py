"""The embedded default: needs no model, no data and no network.

  adapt-pruner run --workdir=runs/tiny

A LLaMA of 1.2 million parameters is trained on the manual that ships with
Python (once, about a minute; then kept in a cache) and pruned by 40 % in four
stages with recovery training in between.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "tiny"
  config.prune.ratio = 0.4
  config.calibration.samples = 64
  return config
