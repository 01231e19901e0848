"""What vLLM computes: `vllm_peer.py DIR TOKENS NEW`, in vLLM's environment.

The last line of output is JSON: version, class, logits [T, V] of the tokens in
the file TOKENS and the NEW tokens that it generates after them.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB

import numpy as np
import vllm


def main():
  path, tokens, new = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
  uneven = path.name.endswith("-hf")
  vocab = json.loads((path / "config.json").read_text())["vocab_size"]
  server = vllm.LLM(
    str(path),
    skip_tokenizer_init=True,
    trust_remote_code=uneven,
    dtype="float32",
    enforce_eager=True,
    max_logprobs=vocab,
    logprobs_mode="raw_logits",
  )
  settings = vllm.SamplingParams(
    temperature=0,
    max_tokens=new,
    prompt_logprobs=vocab,
    logprobs=vocab,
    detokenize=False,
    ignore_eos=True,
  )
  (done,) = server.generate({"prompt_token_ids": tokens.tolist()}, settings)
  (answer,) = done.outputs
  # The first token of the prompt has no logits before it.
  rows = [*done.prompt_logprobs[1:], answer.logprobs[0]]
  logits = [[row[i].logprob for i in range(vocab)] for row in rows]
  result = {
    "version": vllm.__version__,
    "class": server.llm_engine.model_config.architecture,
    "logits": logits,
    "greedy": list(answer.token_ids),
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
