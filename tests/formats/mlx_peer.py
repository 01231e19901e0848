"""What MLX computes: `mlx_peer.py DIR TOKENS NEW`, in MLX's environment.

The last line of output is JSON, as that of vllm_peer.py.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def main():
  path, tokens, new = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
  model, _ = load_model(path)
  prompt = mx.array(tokens)
  made = generate_step(prompt, model, max_tokens=new)
  result = {
    "version": mlx_lm.__version__,
    "class": type(model).__module__,
    "logits": model(prompt[None])[0].tolist(),
    "greedy": [int(token) for token, _ in made],
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
