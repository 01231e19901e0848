"""Adapt-Accel: small prunes interleaved with training; the base of such runs.

  adapt-pruner run --config=configs/accel.py --workdir=W \\
    --config.model.path=DIR --config.prune.target_params=N \\
    --config.calibration.source=text:FILE --config.data.source=text:FILE \\
    --config.train.tokens=1_000_000_000

The paper's settings (arXiv 2502.03460, section 4): about 5 % of the parameters
a stage, tokens growing linearly over the stages, AdamW at 2e-5, WSD.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.prune.stages = 10
  config.train.remat = True
  return config
