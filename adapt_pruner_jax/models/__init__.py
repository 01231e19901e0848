"""The decoder: a model is a pair of a frozen config and a dict of arrays.

Pure functions of weights, below everything else in the package:
  axes          dim letters, and which dims each parameter has
  model_config  `ModelConfig`: all that shapes the function; shapes and counts
  second_kinds  sizes of layers of another kind
  arithmetic    products, norms and activations that layers are made of
  rope          rotary position embeddings
  attention     who sees whom, as data, and what the heads say
  kernels       which implementation of attention runs; splash for TPUs
  cudnn         cuDNN's attention, of packed rows too
  experts       mixture of experts: the router, the balance
  deal          tokens to the rows of their experts, and back
  exchange      rows go to the devices of their experts, and back
  grouped       products of rows with the matrix of their group
  heads         the attention of a layer, and norms
  delta_net     gated delta nets, which layers may have instead
  layer         the one driver of a layer and of its halves, with a tap
  remat         what the backward pass of a layer computes once more
  told          what each layer is told of a token
  layer_runs    runs of layers, stacked, with one scan each
  decoder       the Flax modules: parameters, embedding, layers, head
  flops         FLOPs of a token, forward and in training
  devices       peak FLOP/s and memory of devices
"""
