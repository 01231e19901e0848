"""A pruned Llama model, whose layers differ in size.

Shipped with the model by adapt_pruner_jax. It is the model of Transformers with
each layer made to its own sizes; a layer may also lack its attention, its MLP,
or have biases on its way out that others have not.
"""

import torch
from torch import nn
from transformers.models.llama import modeling_llama as stock

from .configuration_pruned_llama import PrunedLlamaConfig

CACHES = ("cache", "past_key_values", "past_key_value")  # by version


class Bias(nn.Module):
  """In place of a linear layer without inputs: adds its bias if it has one."""

  def __init__(self, linear):
    super().__init__()
    self.bias = linear.bias

  def forward(self, x):
    return torch.zeros_like(x) if self.bias is None else self.bias.expand_as(x)


class NoAttention(nn.Module):
  """In place of an attention without heads."""

  def __init__(self, attention):
    super().__init__()
    self.layer_idx = attention.layer_idx
    self.is_sliding = getattr(attention, "is_sliding", False)
    self.o_proj = Bias(attention.o_proj)

  def forward(self, hidden_states, **others):
    # Caches count the tokens of their first layer: one channel is kept here.
    token = hidden_states[:, None, :, :1]
    for cache in (others.get(name) for name in CACHES):
      if cache is not None:
        cache.update(token, token, self.layer_idx)
    return self.o_proj(hidden_states), None


class NoMlp(nn.Module):
  """In place of an MLP without channels."""

  def __init__(self, mlp):
    super().__init__()
    self.down_proj = Bias(mlp.down_proj)

  def forward(self, x):
    return self.down_proj(x)


def make_layer(config, index):
  """Layer `index`, of its own sizes."""
  sizes = config.layer_config(index)
  heads, width = sizes.num_key_value_heads, sizes.intermediate_size
  if not heads:  # made with one head, which is then taken out
    sizes.__dict__.update(num_attention_heads=1, num_key_value_heads=1)
  if not width:
    sizes.__dict__.update(intermediate_size=1)
  layer = stock.LlamaDecoderLayer(sizes, index)
  for name in config.extra_biases:
    linear = layer.get_submodule(name)
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))
  if not heads:
    layer.self_attn = NoAttention(layer.self_attn)
    drop(layer, ['input_layernorm'])
  if not width:
    layer.mlp = NoMlp(layer.mlp)
    drop(layer, ['post_attention_layernorm'])
  return layer


def drop(layer, norms):
  for name in norms:
    setattr(layer, name, nn.Identity())


class PrunedLlamaModel(stock.LlamaModel):
  config_class = PrunedLlamaConfig

  def __init__(self, config):
    super().__init__(config)
    for i in range(config.num_hidden_layers):
      self.layers[i] = make_layer(config, i)
    self.post_init()


class PrunedLlamaForCausalLM(stock.LlamaForCausalLM):
  config_class = PrunedLlamaConfig

  def __init__(self, config):
    super().__init__(config)
    self.model = PrunedLlamaModel(config)
    self.post_init()


# So that `save_pretrained` copies these files.
PrunedLlamaConfig.register_for_auto_class()
PrunedLlamaModel.register_for_auto_class("AutoModel")
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
