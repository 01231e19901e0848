"""Benchmarks are scripts: what lies beside one must not hide a module."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_python_has_its_own_tokenize_beside_the_benchmark_of_that_name():
  program = "import tokenize; print(tokenize.generate_tokens.__module__)"
  found = subprocess.run(
    [sys.executable, "-c", program],
    cwd=BENCHMARKS,
    capture_output=True,
    text=True,
  )
  assert found.stdout == "tokenize\n", found.stderr
