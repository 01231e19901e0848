"""LLaMA-3.1-8B with 20, 40 or 60 % removed in one shot, without training.

  adapt-pruner run --config=configs/llama31_8b_oneshot.py:0.4 --workdir=W

What follows the colon is the share of all parameters to remove.

Time: 1, 2 and 3 minutes of scoring on an H100, if it reaches 40 % of its 989
bf16 TFLOP/s; computed (about 13, 27 and 40 steps of 1.6e15 FLOPs), not run.
Source: arXiv 2502.03460, the comparison with LLM-Pruner, FLAP and SliceGPT; in
`adapt-pruner compare --config=... --methods=adapt,llm_pruner,flap,slicegpt`
the ratio here means nothing, --ratios does.
"""

from adapt_pruner_jax.config import Config


def get_config(ratio: str = "0.2") -> Config:
  config = Config()
  config.model.path = "meta-llama/Llama-3.1-8B"
  config.model.dtype = "bfloat16"
  config.prune.ratio = float(ratio)
  config.calibration.source = "hf:DKYoon/SlimPajama-6B,limit=20000"
  return config
