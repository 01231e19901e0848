"""What users do with an export, with transformers and torch only.

Run as a program of its own: `transformers_peer.py ROOT [peft]`. ROOT has
tokens.npy and a folder for each export with logits.npy; a JSON object goes to
standard output: for each export what came out of each check.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

VERSION = int(transformers.__version__.split(".")[0])
DTYPE = {"dtype" if VERSION >= 5 else "torch_dtype": torch.float32}
NEW = 6


def load(path, attention="eager"):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path,
    trust_remote_code=path.name.endswith("-hf"),
    attn_implementation=attention,
    **DTYPE,
  ).eval()


def difference(model, tokens, expected):
  with torch.no_grad():
    return float((model(tokens).logits - expected).abs().max())


def greedy(model, prompt, **options):
  found = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    **options,
  )
  return found.tolist()


def greedy_by_hand(model, prompt):
  """Without any cache."""
  for _ in range(NEW):
    with torch.no_grad():
      best = model(prompt, use_cache=False).logits[:, -1].argmax(-1)
    prompt = torch.cat([prompt, best[:, None]], 1)
  return prompt.tolist()


def gradients(model, tokens):
  model.zero_grad()
  loss = model(tokens, labels=tokens).loss
  loss.backward()
  return loss, {n: p.grad.clone() for n, p in model.named_parameters()}


def fine_tune(model, tokens):
  """Difference made by gradient checkpointing; whether a step helps."""
  model.train()
  before, plain = gradients(model, tokens)
  model.gradient_checkpointing_enable()
  _, saved = gradients(model, tokens)
  model.gradient_checkpointing_disable()
  off = max(float((plain[n] - saved[n]).abs().max()) for n in plain)
  torch.optim.SGD(model.parameters(), 0.05).step()
  after, _ = gradients(model, tokens)
  return off, bool(after < before)


def reload(model, tokens):
  """Difference after `save_pretrained` and opening that."""
  model.eval()
  with torch.no_grad():
    expected = model(tokens).logits
  ending = "-hf" if "Pruned" in type(model).__name__ else ""
  with tempfile.TemporaryDirectory(suffix=ending) as path:
    model.save_pretrained(path)
    return difference(load(Path(path)), tokens, expected)


def lora(path, tokens):
  """Differences after saving and merging a trained adapter."""
  import peft

  settings = peft.LoraConfig(r=2, target_modules="all-linear")
  model = peft.get_peft_model(load(path), settings)
  optimizer = torch.optim.SGD(model.parameters(), 1.0)
  for _ in range(2):
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
  model.eval()
  with torch.no_grad():
    expected = model(tokens).logits
  with tempfile.TemporaryDirectory() as adapter:
    model.save_pretrained(adapter)
    again = peft.PeftModel.from_pretrained(load(path), adapter).eval()
  changed = difference(load(path), tokens, expected)
  saved = difference(again, tokens, expected)
  merged = difference(model.merge_and_unload(), tokens, expected)
  return changed, saved, merged


def check(path, tokens, peft):
  expected = torch.tensor(np.load(path / "logits.npy"))
  model = load(path)
  found = {
    "class": type(model).__name__,
    "logits": difference(model, tokens, expected),
  }
  if "gemma2" not in path.name:  # which only has eager
    model.set_attn_implementation("sdpa")
    found["sdpa"] = difference(model, tokens, expected)
    model.set_attn_implementation("eager")
  prompt = tokens[:, :12]
  found["by_hand"] = greedy_by_hand(model, prompt)
  found["dynamic"] = greedy(model, prompt)
  found["static"] = greedy(model, prompt, cache_implementation="static")
  found["fine_tune"] = fine_tune(model, tokens)
  found["reload"] = reload(model, tokens)
  if peft:
    found["lora"] = lora(path, tokens)
  return found


def main():
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)
  root = Path(sys.argv[1])
  tokens = torch.tensor(np.load(root / "tokens.npy"))
  found = {
    path.parent.name: check(path.parent, tokens, "peft" in sys.argv)
    for path in sorted(root.glob("*/logits.npy"))
  }
  assert not any(m.startswith("adapt_pruner_jax") for m in sys.modules)
  print(json.dumps({"version": transformers.__version__, "found": found}))


if __name__ == "__main__":
  main()
