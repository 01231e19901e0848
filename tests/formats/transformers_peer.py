"""What users do with an export, with transformers and torch only.

Run as a program of its own: `transformers_peer.py ROOT [WITHOUT ...]`. ROOT has
tokens.npy and a folder for each export with logits.npy; a JSON object goes to
standard output: for each export what came out of each check. Exports whose
names begin with one of WITHOUT are left out.
"""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

# `Trainer` imports it if it is there; it is too new for Transformers 4.
sys.modules["datasets"] = None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

NEW = 6
EAGER = ("gemma2", "gpt_oss")  # who have no other attention
TRAINED = (
  "llama3-hf",
  "qwen2_holes-hf",
  "qwen3-hf_uniform",
)  # others cost time


def load(path, dtype=torch.float32):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path,
    trust_remote_code=path.name.endswith("-hf"),
    attn_implementation="eager",
    dtype=dtype,
  ).eval()


def untrusted(path):
  """What `from_pretrained` raises for want of trust."""
  try:
    transformers.AutoModelForCausalLM.from_pretrained(path)
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  return "opened"


def warnings_of(path):
  """All that is said on opening, but for what is of Transformers' own."""
  said = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: said.append(record.getMessage())
  transformers.logging.add_handler(handler)
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    load(path)
  logging.getLogger("transformers").removeHandler(handler)
  said += [str(warning.message) for warning in warned]
  own = ("Reading global config value", "CUDA-fused xIELU not available")
  return [x for x in said if not x.startswith(own)]


def heads(path, tokens):
  """Difference of the body below each head from the model's own, by task."""
  found = {}
  options = {"trust_remote_code": True, "dtype": torch.float32}
  body = transformers.AutoModel.from_pretrained(path, **options).eval()
  for task in ("Sequence", "Token"):
    auto = getattr(transformers, f"AutoModelFor{task}Classification")
    if auto.__name__ not in body.config.auto_map:
      continue
    model = auto.from_pretrained(path, num_labels=3, **options).eval()
    model.config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as saved:
      model.save_pretrained(saved)
      again = auto.from_pretrained(saved, **options).eval()
    with torch.no_grad():
      states = [m(tokens).last_hidden_state for m in (body, model.model)]
      logits = [m(tokens).logits for m in (model, again)]
    assert logits[0].shape[-1] == 3
    offs = [(one - two).abs().max() for one, two in (states, logits)]
    found[task] = float(max(offs))
  return found


def difference(model, tokens, expected):
  with torch.no_grad():
    return float((model(tokens).logits - expected).abs().max())


def half(path, dtype, tokens, expected):
  """Relative difference in half precision; tokens that are generated."""
  model = load(path, dtype)
  kept = {torch.float32} if "gpt_oss" in path.name else {dtype}  # its norms
  assert {p.dtype for p in model.parameters()} | kept == {dtype} | kept
  off = difference(model, tokens, expected) / float(expected.abs().max())
  made = len(greedy(model, tokens[:, :12])[0]) - 12
  return off, made


def greedy(model, prompt, **options):
  if getattr(model.config, "output_router_logits", False):
    # Its balance cannot be told of what a static cache has room for.
    options["output_router_logits"] = False
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
  torch.manual_seed(0)  # of dropout, which SeedOss has
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


def train(path, tokens):
  """Losses by `Trainer`; the difference after saving and opening."""
  with tempfile.TemporaryDirectory(suffix=path.name) as out:
    settings = transformers.TrainingArguments(
      out,
      max_steps=5,
      learning_rate=1e-2,
      gradient_checkpointing=True,
      logging_steps=1,
      report_to="none",
      use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(load(path), settings, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    model = trainer.model.eval()
    with torch.no_grad():
      expected = model(tokens).logits
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    return losses, difference(load(Path(out)), tokens, expected)


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


def check(path, tokens, dtype):
  expected = torch.tensor(np.load(path / "logits.npy"))
  model, prompt = load(path), tokens[:, :12]
  found = {
    "class": type(model).__name__,
    "logits": difference(model, tokens, expected),
    "by_hand": greedy_by_hand(model, prompt),
    "dynamic": greedy(model, prompt),
  }
  if path.name in TRAINED:
    found["train"] = train(path, tokens)
    found["lora"] = lora(path, tokens)
  if path.name.endswith("-hf_uniform"):
    return found  # what follows would test Transformers' own class
  if path.name != "old-hf":
    found["heads"] = heads(path, tokens)
    # What was trusted once opens again in this process.
    again = transformers.AutoModelForCausalLM.from_pretrained(
      path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
      found["again"] = difference(again, tokens, model(tokens).logits)
  if not path.name.startswith(EAGER):
    model.set_attn_implementation("sdpa")
    found["sdpa"] = difference(model, tokens, expected)
    model.set_attn_implementation("eager")
  found["static"] = greedy(model, prompt, cache_implementation="static")
  found["fine_tune"] = fine_tune(model, tokens)
  found["reload"] = reload(model, tokens)
  found[str(dtype)] = half(path, dtype, tokens, expected)
  return found


def main():
  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)
  root = Path(sys.argv[1])
  tokens = torch.tensor(np.load(root / "tokens.npy"))
  paths = [path.parent for path in sorted(root.glob("*/logits.npy"))]
  paths = [p for p in paths if not p.name.startswith(tuple(sys.argv[2:]))]
  uneven = [path for path in paths if path.name.endswith("-hf")]
  # Before any of their code is trusted.
  before = {path.name: untrusted(path) for path in uneven}
  said = {path.name: warnings_of(path) for path in uneven}
  transformers.logging.set_verbosity_error()
  dtypes = (torch.float16, torch.bfloat16)  # by turns
  found = {
    path.name: check(path, tokens, dtypes[i % 2])
    for i, path in enumerate(paths)
  }
  for path in uneven:
    found[path.name]["untrusted"] = before[path.name]
    found[path.name]["warnings"] = said[path.name]
  assert not any(m.startswith("adapt_pruner_jax") for m in sys.modules)
  print(json.dumps({"version": transformers.__version__, "found": found}))


if __name__ == "__main__":
  main()
