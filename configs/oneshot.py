"""Fisher scores and a refit by the loss, measured on SmolLM2-135M.

No training on data of its own; the base of all one-shot runs.

  adapt-pruner run --config=configs/oneshot.py --workdir=W \\
    --config.model.path=DIR --config.prune.ratio=0.2 \\
    --config.calibration.source=text:FILE --config.eval.text=HELDOUT

Units are ranked once by Fisher scores on 32k tokens; what is left learns to
predict as the dense model did, by all weights, on 98k tokens of the calibration
source, a window a step (docs/method.md). That is as many tokens in all as
sixteen steps of 8k, and on a model of another context or for more, what
--config.calibration.seq_len, .samples, .refit_samples and
--config.prune.refit_passes say. The paper's method is configs/paper.py.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.prune.method = "fisher"
  config.prune.ranking.step_size = 0.2
  config.prune.ranking.cap = 0.8
  config.prune.refit = "loss"
  config.prune.refit_passes = 3
  config.prune.refit_rate = 1.5e-4
  config.prune.refit_batch = 1
  config.calibration.samples = 64
  config.calibration.refit_samples = 64
  config.calibration.seq_len = 512
  config.calibration.batch = 4
  return config
