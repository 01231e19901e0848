"""Other people's pruning methods, to compare with: one method a file.

  activations  the calibration pass that they share
  flap         FLAP: fluctuations, and what is gone as biases
  kronecker    removals from matrices whose curvature is a Kronecker product
  llm_pruner   LLM-Pruner; magnitude and random choices in its place
  minitron     Minitron: activations, and layers by the loss
  shortgpt     ShortGPT: whole layers
  reap         REAP: whole experts, by what they say where they are asked
  slicegpt     SliceGPT: directions of the residual stream
  surgeon      LLM Surgeon: Kronecker-factored curvature, weights updated
  wanda_sp     Wanda-sp: layer after layer

A file has the parts of a method that `methods` puts together; SliceGPT, which
removes no units, has a `prune` of its own. Adapt-Pruner with
`prune.amplitude=0` is the uniform ablation.
"""
