"""DeepSeek-R1-Distill-Qwen-1.5B to 1B, pruned and trained in 11 stages.

  adapt-pruner run --config=configs/deepseek_r1_qwen_15b_to_1b.py --workdir=W

Time: 196 minutes of training on 8 H100, if they reach 40 % of their 989 bf16
TFLOP/s each; computed (6 FLOPs a parameter and token), not run.
Source: arXiv 2502.03460; 1,777,088,000 to 1,005,461,760 parameters. Stages,
sizes, rates and calibration are the paper's; the number of tokens is that of
the MobileLLM recipes. The paper trains on nine instruction sets: give yours
with --config.data.source=hf:A,hf:B or jsonl:FILE.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
  config.prune.target_params = 1_005_461_760
  config.prune.stages = 11
  config.calibration.source = "hf:DKYoon/SlimPajama-6B,limit=20000"
  config.data.source = "hf:DKYoon/SlimPajama-6B"
  config.data.batch = 128
  config.train.tokens = 5_000_000_000
  config.train.dtype = "bfloat16"
  return config
