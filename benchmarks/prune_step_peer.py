"""The peers of prune_step.py: a LLaMA in plain PyTorch and its scoring step."""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from adapt_pruner_jax.models import axes
from adapt_pruner_jax.models.model_config import ModelConfig
from adapt_pruner_jax.models.rope import rope_frequencies

SCORED = ("q", "k", "v", "o", "gate", "up", "down")  # of a LLaMA


def torch_params(
  params: axes.Params, config: ModelConfig, dtype: torch.dtype
) -> dict:
  """Weights as torch.nn.Linear has them, [out, in]; biases there are none."""

  def one(name, _, array):
    array = np.asarray(array, np.float32)
    if name in ("q", "k", "v", "gate", "up"):
      array = array.reshape(config.hidden_size, -1).T
    elif name in ("o", "down", "lm_head"):
      array = array.reshape(-1, array.shape[-1]).T
    tensor = torch.tensor(np.ascontiguousarray(array))
    return tensor.to(dtype)

  return axes.map_named(one, params)


class Peer:
  """A LLaMA in plain PyTorch, and its scoring step.

  Args:
    params, config: the pair.
    lean: one pass, and gradients of the scored matrices only.
    batch: sequences of a minibatch.
    tokens: of a sequence.
    dtype: of weights and arithmetic, by its name.
  """

  def __init__(
    self,
    params: axes.Params,
    config: ModelConfig,
    lean: bool,
    batch: int,
    tokens: int,
    dtype: str,
  ):
    self.config, self.lean, self.batch = config, lean, batch
    kind = getattr(torch, dtype)
    self.weights = torch_params(params, config, kind)
    self.layers = [self.weights[f"layer_{i}"] for i in range(config.num_layers)]
    self.track()
    frequency = torch.tensor(rope_frequencies(config.rope, config.head_dim))
    angle = torch.arange(tokens)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    self.cos, self.sin = angle.cos().to(kind), angle.sin().to(kind)

  def track(self) -> None:
    """Asks for the gradients that are needed, or for all."""
    for layer in self.layers:
      for name, weight in layer.items():
        weight.requires_grad_(not self.lean or name in SCORED)
    for name in ("embedding", "final_norm", "lm_head"):
      self.weights[name].requires_grad_(not self.lean)

  def norm(self, x, scale):
    return F.rms_norm(
      x, (self.config.hidden_size,), scale, self.config.norm_eps
    )

  def rotate(self, x):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * self.cos + turned * self.sin

  def block(self, layer, x):
    B, T, _ = x.shape
    heads = lambda y: y.view(B, T, -1, self.config.head_dim).transpose(1, 2)
    h = self.norm(x, layer["attn_norm"])
    q = self.rotate(heads(F.linear(h, layer["q"])))
    k = self.rotate(heads(F.linear(h, layer["k"])))
    v = heads(F.linear(h, layer["v"]))
    said = F.scaled_dot_product_attention(
      q, k, v, is_causal=True, enable_gqa=self.config.queries_per_group > 1
    )
    x = x + F.linear(said.transpose(1, 2).reshape(B, T, -1), layer["o"])
    h = self.norm(x, layer["mlp_norm"])
    hidden = F.silu(F.linear(h, layer["gate"])) * F.linear(h, layer["up"])
    return x + F.linear(hidden, layer["down"])

  def forward(self, tokens, importances, head=True):
    x = F.embedding(tokens, self.weights["embedding"])
    for i, layer in enumerate(self.layers):
      y = self.block(layer, x)
      if importances is not None:
        with torch.no_grad():
          like = F.cosine_similarity(x.float(), y.float(), dim=-1)
          importances[i] -= like.mean().item()
      x = y
    if not head:
      return None
    x = self.norm(x[:, :-1], self.weights["final_norm"])
    logits = F.linear(x, self.weights["lm_head"]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

  def step(self, samples: np.ndarray):
    """(scores of each scored matrix per layer, importances)."""
    importances = np.zeros(self.config.num_layers)
    tokens_NT = torch.tensor(samples, dtype=torch.long)
    for tokens in tokens_NT.split(self.batch):
      if self.lean:
        self.forward(tokens, importances).backward()
        continue
      with torch.no_grad():
        self.forward(tokens, importances, head=False)
      self.forward(tokens, None).backward()
    scores = [
      {n: self.unit_scores(n, layer[n]) for n in SCORED}
      for layer in self.layers
    ]
    for leaf in jax.tree.leaves(self.weights):
      leaf.grad = None
    return scores, importances

  @torch.no_grad()
  def unit_scores(self, name, weight):
    """Sums |W g| over the width, and over the channels of a head."""
    out = name in ("q", "k", "v", "gate", "up")
    score = (weight.float() * weight.grad.float()).abs().sum(1 if out else 0)
    return (
      score.view(-1, self.config.head_dim).sum(1) if name in "qkvo" else score
    )

  def memory(self, samples: np.ndarray) -> int:
    """Bytes that autograd saves for a minibatch, and of the gradients."""
    leaves = jax.tree.leaves(self.weights)
    known = {w.untyped_storage().data_ptr() for w in leaves}
    saved = {}

    def pack(tensor):
      storage = tensor.untyped_storage()
      if storage.data_ptr() not in known:
        saved[storage.data_ptr()] = storage.nbytes()
      return tensor

    tokens = torch.tensor(samples[: self.batch], dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
      held = self.forward(tokens, None)
    del held
    grads = sum(w.nbytes for w in leaves if w.requires_grad)
    return sum(saved.values()) + grads

  def prune(self, scores: list[dict], share: float) -> None:
    """Removes the share of each module's units with the lowest scores."""
    H, G = self.config.head_dim, self.config.queries_per_group
    for layer, found in zip(self.layers, scores, strict=True):
      kv = found["k"] + found["v"]
      kv = kv + found["q"].view(-1, G).sum(1) + found["o"].view(-1, G).sum(1)
      channel = found["gate"] + found["up"] + found["down"]
      for score, width in (
        (kv, {"k": H, "v": H, "q": G * H, "o": G * H}),
        (channel, dict.fromkeys(("gate", "up", "down"), 1)),
      ):
        stay = score.argsort()[int(share * len(score)) :].sort().values
        for name, size in width.items():
          at = (stay[:, None] * size + torch.arange(size)).flatten()
          dim = int(name in ("o", "down"))
          cut = layer[name].detach().index_select(dim, at)
          layer[name] = cut.contiguous()
    self.track()
