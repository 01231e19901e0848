"""Adapt-Pruner as published, without training.

  adapt-pruner run --config=configs/paper.py --workdir=W \\
    --config.model.path=DIR --config.prune.ratio=0.2 \\
    --config.calibration.source=text:FILE --config.eval.text=HELDOUT

The paper's settings (arXiv 2502.03460, section 4): steps of 2 % of mean
sparsity, amplitude 0.02, 512 x 64 fresh calibration tokens a step. Two more
flags give what the authors' code does, to the last index:
--config.prune.gqa_fold=reference --config.prune.trim=False.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  return Config()
