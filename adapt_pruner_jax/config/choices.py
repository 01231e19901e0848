"""What fields of words may say, and which parts a method is made of."""

# The published pairs: which allotment and which unit score a method is. Names
# that are not choices of prune.allotment and prune.group_importance are the
# method's own.
PUBLISHED = {
  "adapt": ("adapt", "taylor"),
  "curvature": ("ranking", "curvature"),
  "fisher": ("ranking", "fisher"),
  "llm_pruner": ("llm_pruner", "taylor"),
  "flap": ("flap", "flap"),
  "wanda_sp": ("wanda_sp", "wanda_sp"),
  "slicegpt": ("slicegpt", "slicegpt"),
  "shortgpt": ("shortgpt", "shortgpt"),
  "minitron": ("minitron", "minitron"),
  "surgeon": ("surgeon", "surgeon"),
  "reap": ("reap", "reap"),
  "magnitude": ("uniform", "magnitude"),
  "random": ("uniform", "random"),
}

# Multiples of MLP widths that leave whole blocks in a quantised file.
BLOCKS = {"q8_0": 32, "q4_0": 32, "q4_k_m": 256}

# Allotments whose steps take `prune.ranking.step_size` of the budget.
RANKED = ("ranking", "one_width")

# Methods whose score and allotment are one thing.
WHOLE = ("wanda_sp", "slicegpt", "shortgpt", "minitron", "reap")

CHOICES = {
  "model.dtype": ("", "float32", "bfloat16", "float16"),
  "prune.method": tuple(PUBLISHED),
  "prune.group_importance": (
    "taylor",
    "taylor_vectorize",
    "taylor_second",
    "taylor_mix",
    "l1",
    "l2",
    "random",
    "curvature",
    "surgeon",
    "fisher",
    "fluctuation",
    "",
  ),
  "prune.allotment": (
    "adapt",
    "uniform",
    "ranking",
    "one_width",
    "search",
    "",
  ),
  "prune.budget": (
    "params",
    "flops",
    "bytes",
    "kv_bytes",
    "latency",
    "quality",
  ),
  "prune.budget_export": ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"),
  "prune.budget_phase": ("decode", "prefill"),
  "prune.layer_importance": ("cosine", "euclidean", "manhattan"),
  "prune.gqa_fold": ("aligned", "reference"),
  "prune.llm_pruner.ranking": ("layer", "global"),
  "data.bos": ("auto", "none"),
  "prune.flap.metric": ("WIFV", "WIFN", "IFV"),
  "prune.flap.structure": ("ALAM", "ALMM", "ULUM", "ULMM"),
  "prune.surgeon.matrices": ("all", "writers"),
  "prune.magnitude.norm": ("l1", "l2"),
  "prune.attention": ("auto", "plain", "blocks", "splash", "cudnn"),
  "prune.precision": ("float32", "tensorfloat32", "bfloat16"),
  "train.attention": ("auto", "plain", "blocks", "splash", "cudnn"),
  "train.remat": (
    *("auto", "none", "dots", "attention+mlp", "full", "offload"),
  ),
  "train.gradient_dtype": ("bfloat16", "float32"),
  "train.moments": ("float32", "bfloat16"),
  "train.lora_base": ("", "int8"),
  "train.scan_layers": ("auto", "on", "off"),
  "train.schedule": ("wsd", "cosine"),
  "train.dtype": ("float32", "bfloat16"),
  "train.data_share": ("linear", "constant", "cosine"),
}
