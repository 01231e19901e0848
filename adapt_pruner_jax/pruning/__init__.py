"""Which units go, and what the rest of a layer becomes.

methods         the methods by name
task            what a prune works on
adapt           Adapt-Pruner
curvature       by the curvature of the loss
schedule        how much of each module goes, in float64
ranking         the units that score least
targets         what a target means, and what can be reached
exact_target    the last step, so that the size ends at the target
scores          what a layer and a unit are worth
refit           what is left learns to stand in for what was removed
linear_algebra  Grams and their factors
surgery         units that are left, and arrays cut to them
baselines       other people's methods
"""
