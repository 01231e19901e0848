"""Exports cut over several processes: `parallel_peer.py TOKENS DIR ...`.

Started by torch.distributed.run. Writes logits of the tokens to out.npz in each
directory.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def held(parameter):
  """The shape of what this process holds of it."""
  local = getattr(parameter, "to_local", lambda: parameter)()
  return tuple(local.shape)


def check(path, tokens):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path,
    trust_remote_code=True,
    dtype=torch.float32,
    attn_implementation="eager",
    tp_plan="auto",
  ).eval()
  with torch.no_grad():
    logits = model(tokens).logits
  whole = transformers.AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, dtype=torch.float32
  )
  shapes = {name: held(p) for name, p in whole.named_parameters()}
  parts = [
    name.split(".")[3]  # model.layers.N.self_attn...
    for name, parameter in model.named_parameters()
    if ".layers." in name and held(parameter) != shapes[name]
  ]
  if torch.distributed.get_rank() == 0:
    parts = sorted({*parts})
    np.savez(path / "out.npz", logits=logits.float().numpy(), parts=parts)


def main():
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  tokens, *paths = map(Path, sys.argv[1:])
  for path in paths:
    check(path, torch.tensor(np.load(tokens)))
  torch.distributed.destroy_process_group()


if __name__ == "__main__":
  main()
