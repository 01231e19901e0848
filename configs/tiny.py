"""The embedded default: needs no model, no data and no network.

  adapt-pruner run --workdir=runs/tiny

A LLaMA of 1.2 million parameters is trained on the manual that ships with
Python (once, about a minute; then kept in a cache) and pruned by 40 %, by
curvature with refits (docs/method.md), in four stages with recovery training in
between; then in one go with the same training, to compare.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "tiny"
  config.prune.method = "curvature"
  config.prune.refit = "2"
  config.prune.refit_all = True
  config.prune.ratio = 0.4
  config.prune.stages = 4
  config.calibration.samples = 64
  config.data.seq_len = 128
  config.data.batch = 4
  config.train.tokens = 120 * 512
  config.train.learning_rate = 5e-4
  config.train.min_learning_rate = 5e-5
  config.eval.text = "embedded"
  config.oneshot_control = True
  return config
