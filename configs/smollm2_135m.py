"""SmolLM2-135M with 20 % removed: the first real model to try with network.

  adapt-pruner run --config=configs/smollm2_135m.py --workdir=W

Needs 0.3 GB for the model and no access token. The perplexity is measured on
the manual that ships with Python; another text: --config.eval.text=FILE.

Time: half an hour on 2 CPU cores, if they reach 50 GFLOP/s; computed (about 13
steps of 6.6e12 FLOPs), not run. A GPU takes a minute, most of it to compile.
Source: the paper's one-shot settings (arXiv 2502.03460), but for a quarter of
its calibration samples, which is what the half hour is for.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "HuggingFaceTB/SmolLM2-135M"
  config.prune.ratio = 0.2
  config.calibration.source = "hf:Salesforce/wikitext,subset=wikitext-2-raw-v1"
  config.calibration.samples = 128
  config.eval.text = "embedded"
  return config
