"""The decoder: a model is a pair of a frozen config and a dict of arrays.

axes          dim letters, and which dims each parameter has
model_config  `ModelConfig`: all that shapes the function; shapes and counts
arithmetic    products, norms and activations that layers are made of
rope          rotary position embeddings
attention     who sees whom, and what the heads say
layer         halves of a layer
decoder       the Flax modules
flops         FLOPs of a token, forward and in training
devices       peak FLOP/s and memory of devices
"""
