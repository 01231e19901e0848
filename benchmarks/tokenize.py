"""How fast a corpus becomes tokens, and how much memory that takes.

  python benchmarks/tokenize.py --tokenizer=DIR --text=FILE [--megabytes=256]

The text, repeated to the size that is asked for, is tokenised from a file of
JSON lines three times: by the `tokenizers` package on one core, which keeps
nothing; by `tokenise`, to shards on disk, on all cores; and by
`datasets.map(num_proc)`, to an Arrow table. Each is in processes of its own,
and what counts is tokens a second of the wall clock and of all CPUs together
(on a busy machine the first says little).

The goal: at least 0.85 of (cores x the first), and memory that does not grow
with the corpus.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
  import tokenize_bench

  tokenize_bench.main(__doc__)
else:
  # The packages that files beside this one import want Python's own `tokenize`.
  own = Path(sysconfig.get_path("stdlib")) / "tokenize.py"
  spec = importlib.util.spec_from_file_location(__name__, own)
  sys.modules[__name__] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sys.modules[__name__])
