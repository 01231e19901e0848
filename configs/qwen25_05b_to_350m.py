"""Qwen2.5-0.5B to 350M, pruned and trained in 5 stages.

  adapt-pruner run --config=configs/qwen25_05b_to_350m.py --workdir=W

Time: 64 minutes of training on 8 H100, if they reach 40 % of their 989 bf16
TFLOP/s each; computed (6 FLOPs a parameter and token), not run.
Source: arXiv 2502.03460; 494,032,768 to 376.1 million parameters. Stages,
sizes, rates and calibration are the paper's; the number of tokens is that of
the MobileLLM recipes. The paper trains on nine instruction sets: give yours
with --config.data.source=hf:A,hf:B or jsonl:FILE.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "Qwen/Qwen2.5-0.5B"
  config.prune.target_params = 376_075_200
  config.prune.stages = 5
  config.calibration.source = "hf:DKYoon/SlimPajama-6B,limit=20000"
  config.data.source = "hf:DKYoon/SlimPajama-6B"
  config.data.batch = 128
  config.train.tokens = 5_000_000_000
  config.train.dtype = "bfloat16"
  return config
