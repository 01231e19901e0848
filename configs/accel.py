"""Curvature with refits in stages, measured on models of at most 2.8M.

Small prunes interleaved with training; the base of such runs.

  adapt-pruner run --config=configs/accel.py --workdir=W \\
    --config.model.path=DIR --config.prune.target_params=N \\
    --config.calibration.source=text:FILE --config.data.source=text:FILE \\
    --config.train.tokens=1_000_000_000

Units are ranked by curvature and what is left is refitted by least squares
(docs/method.md, sections 3 and 4). Stages, about 5 % of the parameters each,
with tokens growing linearly over them, AdamW at 2e-5 and WSD are those of
Adapt-Accel (arXiv 2502.03460, section 4); its own way to prune is
--config.prune.method=adapt --config.prune.refit=none.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.prune.method = "curvature"
  config.prune.refit = "2"
  config.prune.refit_all = True
  config.prune.stages = 10
  return config
