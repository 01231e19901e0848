"""Other people's pruning methods, to compare with.

One method a file, a pure function with the signature of `prune.prune`.
Adapt-Pruner with `prune.amplitude=0` is the uniform ablation.

activations   the calibration pass that they share
budget        meeting a parameter target exactly
flap          what fluctuates least becomes a bias
llm_pruner    the same share of every layer, by Taylor scores
magnitude     ... by the size of the weights
random_units  ... at random
shortgpt      whole layers
slicegpt      directions of the residual stream
wanda_sp      weights times the size of their inputs
"""

from adapt_pruner_jax.pruning.baselines import (
  flap,
  llm_pruner,
  magnitude,
  random_units,
  shortgpt,
  slicegpt,
  wanda_sp,
)

METHODS = {
  "llm_pruner": llm_pruner.prune,
  "flap": flap.prune,
  "wanda_sp": wanda_sp.prune,
  "slicegpt": slicegpt.prune,
  "shortgpt": shortgpt.prune,
  "magnitude": magnitude.prune,
  "random": random_units.prune,
}
