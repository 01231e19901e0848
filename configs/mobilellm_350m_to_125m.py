"""MobileLLM-350M to 125M, pruned and trained in 20 stages.

  adapt-pruner run --config=configs/mobilellm_350m_to_125m.py --workdir=W

Time: 29 minutes of training on 8 H100, if they reach 40 % of their 989 bf16
TFLOP/s each; computed (6 FLOPs a parameter and token), not run.
Source: arXiv 2502.03460; MMLU (5 shots) of the paper's model: 25.35. Stages,
sizes, rates and calibration are the paper's. So is the number of tokens, by its
"200 x fewer" than the 1T of MobileLLM-125M. The paper trains on nine
instruction sets: give yours with --config.data.source=hf:A,hf:B or jsonl:FILE.

The target keeps the *layers* of the paper's result. The paper's sizes,
376,075,200 and 143,067,456, count the shared embedding twice; counted once, as
here, they are 345,355,200 and 112,347,456.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "facebook/MobileLLM-350M"
  config.prune.target_params = 112_347_456
  config.prune.stages = 20
  config.calibration.source = "hf:DKYoon/SlimPajama-6B,limit=20000"
  config.data.source = "hf:DKYoon/SlimPajama-6B"
  config.data.batch = 128
  config.train.tokens = 5_000_000_000
  config.train.min_learning_rate = 0.0
  config.train.dtype = "bfloat16"
  return config
