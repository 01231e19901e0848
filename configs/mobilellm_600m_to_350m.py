"""MobileLLM-600M to 350M, pruned and trained in 9 stages.

  adapt-pruner run --config=configs/mobilellm_600m_to_350m.py --workdir=W

Time: 70 minutes of training on 8 H100, if they reach 40 % of their 989 bf16
TFLOP/s each; computed (6 FLOPs a parameter and token), not run.
Source: arXiv 2502.03460; 603,188,352 to 376.1 million parameters, MMLU (5
shots) of the paper's model: 32.25. Stages, sizes, rates and calibration are the
paper's, and so is the number of tokens, by its "200 x fewer" than the 1T of
MobileLLM. The paper trains on nine instruction sets: give yours with
--config.data.source=hf:A,hf:B or jsonl:FILE.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "facebook/MobileLLM-600M"
  config.prune.target_params = 376_075_200
  config.prune.stages = 9
  config.calibration.source = "hf:DKYoon/SlimPajama-6B,limit=20000"
  config.data.source = "hf:DKYoon/SlimPajama-6B"
  config.data.batch = 128
  config.train.tokens = 5_000_000_000
  config.train.dtype = "bfloat16"
  return config
