"""What tokenize.py runs: its measurements."""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GOAL = 0.85
DOCUMENT = 4000  # characters
HUGE_VOCABULARY = 1 << 30


def alone(tokenizer: str, corpus: str, _: int) -> int:
  """The package on one core: counts tokens, keeps none."""
  import tokenizers

  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  backend = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
  backend.no_truncation()
  total, texts = 0, []
  with open(corpus) as file:
    for line in file:
      texts.append(json.loads(line)["text"])
      if len(texts) == 256:
        total += sum(map(len, backend.encode_batch_fast(texts)))
        texts = []
  return total + sum(map(len, backend.encode_batch_fast(texts)))


def ours(tokenizer: str, corpus: str, processes: int) -> int:
  """Shards on disk."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from adapt_pruner_jax.data import sources, token_store
  from adapt_pruner_jax.data.tokenizer import load_tokenizer
  from adapt_pruner_jax.distributed import virtual_devices

  virtual_devices.cores = lambda: processes
  source = sources.Source("jsonl", corpus)
  model = load_tokenizer(tokenizer)
  with tempfile.TemporaryDirectory(dir=Path(corpus).parent) as folder:
    found = token_store.tokenise(
      *(source, model, HUGE_VOCABULARY, folder, print)
    )
    return len(found.tokens)


def peer(tokenizer: str, corpus: str, processes: int) -> int:
  """`datasets.map`: an Arrow table on disk."""
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  import datasets
  import tokenizers

  backend = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
  backend.no_truncation()

  def encode(rows: dict) -> dict:
    found = [e.ids for e in backend.encode_batch_fast(rows["text"])]
    return {"ids": found, "length": [len(ids) for ids in found]}

  with tempfile.TemporaryDirectory(dir=Path(corpus).parent) as folder:
    rows = datasets.load_dataset(
      "json", data_files=corpus, split="train", cache_dir=folder
    )
    made = rows.map(
      encode, batched=True, num_proc=processes, remove_columns=["text"]
    )
    return sum(made["length"])


def measure(
  what: Callable[[str, str, int], int], *arguments: str | int
) -> dict:
  """Runs it in a process of its own: tokens, seconds, peak memory."""
  context = multiprocessing.get_context("spawn")
  queue = context.SimpleQueue()
  process = context.Process(target=_measured, args=(queue, what, arguments))
  process.start()
  process.join()
  if process.exitcode:
    raise SystemExit(f"{what.__name__} has failed")
  return queue.get()


def _measured(queue, what: Callable, arguments: tuple) -> None:
  begun = time.monotonic()
  tokens = what(*arguments)
  wall = time.monotonic() - begun
  used = [
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  queue.put(
    {
      "tokens": tokens,
      "wall": wall,
      "cpu": sum(u.ru_utime + u.ru_stime for u in used),
      # Of this process, and of the largest of those that it started.
      "megabytes": [u.ru_maxrss / 1024 for u in used],
    }
  )


def write_corpus(text: str, path: Path, megabytes: float) -> None:
  """JSON lines of documents, until the file is as large as it shall be."""
  size, number = 0, 0
  pieces = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
  with open(path, "w") as file:
    while size < megabytes * 1e6:
      size += file.write(json.dumps({"text": pieces[number % len(pieces)]}))
      size += file.write("\n")
      number += 1


def main(doc: str) -> None:
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--text", required=True)
  parser.add_argument("--megabytes", type=float, default=256)
  parser.add_argument("--processes", type=int, default=0, help="0 = all cores")
  flags = parser.parse_args()
  processes = flags.processes or len(os.sched_getaffinity(0))
  text = Path(flags.text).read_text("utf-8")
  with tempfile.TemporaryDirectory(prefix="tokenize-") as folder:
    corpus, quarter = (str(Path(folder) / n) for n in ("a.jsonl", "b.jsonl"))
    write_corpus(text, Path(corpus), flags.megabytes)
    write_corpus(text, Path(quarter), flags.megabytes / 4)
    rows = {
      "tokenizers, one core": measure(alone, flags.tokenizer, quarter, 1),
      "adapt-pruner, a quarter": measure(
        ours, flags.tokenizer, quarter, processes
      ),
      "adapt-pruner": measure(ours, flags.tokenizer, corpus, processes),
      "datasets.map": measure(peer, flags.tokenizer, corpus, processes),
    }
  base = rows["tokenizers, one core"]
  print(f"\n{flags.megabytes:g} MB, {processes} processes; goal {GOAL}\n")
  print("| | tokens | tokens/s | of one core, a core | by CPU time | MB |")
  print("|---|---:|---:|---:|---:|---:|")
  for name, row in rows.items():
    cores = 1 if row is base else processes
    speeds = {
      clock: (row["tokens"] / row[clock]) / (base["tokens"] / base[clock])
      for clock in ("wall", "cpu")
    }
    memory = " + ".join(f"{m:.0f}" for m in row["megabytes"])
    print(
      f"| {name} | {row['tokens']:,} | {row['tokens'] / row['wall']:,.0f} | "
      f"{speeds['wall'] / cores:.2f} | {speeds['cpu']:.2f} | {memory} |"
    )
