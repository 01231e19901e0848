"""Configuration of a pruned Llama model, whose layers differ in size.

Shipped with the model by adapt_pruner_jax. `per_layer_config` has the sizes of
each layer; the fields of the same names outside of it are the largest of them.
"""

from transformers import LlamaConfig

SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class LayerConfig:
  """The whole model's configuration, but for the sizes of one layer."""

  def __init__(self, config, sizes):
    self.__dict__.update(sizes, _config=config)

  def __getattr__(self, name):
    if name.startswith("__") or name == "_config":
      raise AttributeError(name)
    return getattr(self._config, name)


class PrunedLlamaConfig(LlamaConfig):
  model_type = "pruned_llama"

  def __init__(self, per_layer_config=None, extra_biases=(), **fields):
    sizes = {name: fields[name] for name in SIZES if name in fields}
    # The parent's checks are about models whose layers are equal.
    fields |= {name: 1 for name in SIZES[:2] if name in fields}
    fields["allow_global_per_layer_attribute_access"] = True
    super().__init__(**to_this_version(fields))
    self.__dict__.update(sizes)
    self.extra_biases = list(extra_biases)
    per_layer = per_layer_config or {}
    self.layer_sizes = {int(i): dict(s) for i, s in per_layer.items()}
    # From version 5.15 on, Transformers knows this field, for its caches.
    self.per_layer_config = {str(i): s for i, s in self.layer_sizes.items()}

  def layer_config(self, index):
    sizes = {name: getattr(self, name) for name in SIZES}
    return LayerConfig(self, sizes | self.layer_sizes.get(index, {}))

  def to_dict(self):
    fields = super().to_dict()
    del fields["layer_sizes"]
    return fields

  def validate(self):
    """Called on saving; the sizes of the layers are right as they are."""


def to_this_version(fields):
  """Version 4 passes over `rope_parameters`, the spelling of version 5."""
  rope = fields.get("rope_parameters")
  if not rope or hasattr(LlamaConfig(), "rope_parameters"):
    return fields
  fields.pop("rope_parameters")
  if "sliding_attention" in rope:
    local = rope["sliding_attention"]
    fields.setdefault("rope_local_base_freq", local["rope_theta"])
  rope = dict(rope.get("full_attention", rope))
  fields.setdefault("rope_theta", rope.pop("rope_theta"))
  if "partial_rotary_factor" in rope:
    share = rope.pop("partial_rotary_factor")
    fields.setdefault("partial_rotary_factor", share)
  if rope["rope_type"] != "default":
    fields.setdefault("rope_scaling", rope)
  return fields
