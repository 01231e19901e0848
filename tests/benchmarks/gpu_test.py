"""benchmarks/gpu.sh runs, so that it works the day a GPU is there."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A machine with a GPU has jax, flax, optax, orbax, and what is pure Python.
ABSENT = """
import sys

class Absent:
  def find_spec(self, name, *_):
    if name.split(".")[0] in {NAMES}:
      raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Absent())
"""
NAMES = {"torch", "transformers", "tokenizers", "safetensors", "datasets"}
NAMES |= {"lm_eval", "gguf", "sentencepiece", "pyarrow", "ml_collections"}
NAMES |= {"huggingface_hub", "tiktoken", "matplotlib", "pandas"}


@pytest.fixture
def gpu(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import gpu

  yield gpu
  sys.modules.pop("gpu")


@pytest.mark.slow
def test_small_shapes_on_a_cpu(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(
    ABSENT.replace("{NAMES}", repr(NAMES))
  )
  parts = ["kernels", "train 1b", "prune 1b", "lora 4b in 24 GB"]
  out = tmp_path / "gpu.json"
  script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
  done = subprocess.run(
    [*script, "--tiny", "--here", "--parts", *parts],
    env=os.environ
    | {
      "PYTHON": sys.executable,
      "PYTHONPATH": str(tmp_path),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())["parts"]
  assert [*found] == parts
  for name, part in found.items():
    assert "error" not in part, (name, part)
  assert found["kernels"]["64, packed"]["good"]
  assert found["train 1b"]["tokens_per_s"] > 0
  assert found["prune 1b"]["refit_s"] > 0


def test_a_part_that_fails_hides_no_other(gpu, tmp_path, monkeypatch):
  def fails(**_):
    raise MemoryError("all of it")

  monkeypatch.setattr(gpu, "train", fails)
  monkeypatch.setattr(gpu, "kernels", lambda tiny: {"error_of": tiny})
  out = tmp_path / "gpu.json"
  flags = [f"--out={out}", "--here", "--parts", "kernels", "train 1b"]
  monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
  gpu.main()
  found = json.loads(out.read_text())["parts"]
  assert found["train 1b"]["error"] == "MemoryError: all of it"
  assert found["kernels"]["error_of"] is False
  assert gpu.elsewhere("train 1b", True, 1.0) == {"error": "no time was left"}
