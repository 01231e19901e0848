"""Pruning: which units of a model go, and what the rest becomes.

task            what a prune works on, its steps, and what it gives back
methods         the methods by name, made of a score and an allotment
steps           the one loop: measure, allot, choose, refit
scores          Taylor, magnitude and random scores; importance of layers
curvature       second-order scores
fisher          scores of each row's own gradients
backward        the walk through a masked model and back that scores take
ends            what is before and behind the layers of that walk
visitor         what it visits, and what it brings back
passes          scores in parts, so that memory does not grow
allotment       how much goes where: adapt, uniform, one ranking
one_width       as much of each layer, so that all have one width
search          how much goes where, tried out on the masked model
schedule        Adapt-Pruner's schedule, targets of stages
budgets         what a target is counted in, and what a unit takes of it
exact_target    a target met within one channel
file_bytes      bytes of a parameter in a file
quality         a loss to keep: pruning stops where it is too much
targets         what may be pruned, and how far
choice          the lowest units go
surgery         kept units, masks, and the gather of arrays
refit           least squares on what is left
refit_loss      then a distillation on more windows
least_squares   how a refit is solved, layer by layer
normal_equations  what it sums over tokens, on the devices
refit_experts   of experts, each by its own tokens
streams         the two residual streams of a refit
linear_algebra  inverses and solves of Gram matrices
elimination     the same on many devices, by a program that compiles
float32_product  products at full precision, which TPUs' compiler is quick at
median          medians, which it is quick at too
baselines       other people's methods
"""
