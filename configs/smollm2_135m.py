"""SmolLM2-135M with 20 % removed: the first real model to try with network.

  adapt-pruner run --config=configs/smollm2_135m.py --workdir=W

Needs pip install .[data], 0.3 GB for the model and 6.5 GB of memory. Perplexity
is measured on the manual that ships with Python; another text:
--config.eval.text=FILE.

Time: half an hour of a CPU core and the time to compile, measured on this shape
(docs/results.md; the memory in docs/speed.md). A GPU was not at hand.
Source: configs/oneshot.py, which was best on this shape there.
"""

from adapt_pruner_jax.config import Config


def get_config() -> Config:
  config = Config()
  config.model.path = "HuggingFaceTB/SmolLM2-135M"
  config.prune.ratio = 0.2
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
  config.calibration.source = "hf:Salesforce/wikitext,subset=wikitext-2-raw-v1"
  config.eval.text = "embedded"
  return config
