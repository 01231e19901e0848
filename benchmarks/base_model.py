"""Trains a base model worth pruning on real text, as a HuggingFace directory.

  python benchmarks/base_model.py --text=books.txt,c4_sample.txt --out=DIR

Documents of the texts are apart by lines of <|endoftext|>. One in ten is held
out, by its checksum: DIR/train.txt and DIR/heldout.txt keep the two parts, and
DIR/model the model, its tokenizer (byte-level BPE of the training part) and the
two in one. The default, 2.9 million parameters and 2.5 million tokens, takes
about a quarter of an hour on two cores; --width, --layers and --tokens make
more of it where there is a GPU.
"""

import argparse
import zlib
from pathlib import Path

from adapt_pruner_jax.data import packing, sources
from adapt_pruner_jax.evaluation import perplexity
from adapt_pruner_jax.formats.hf import save
from adapt_pruner_jax.runs import tiny_model


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--text", required=True, help="files, with commas")
  parser.add_argument("--out", required=True)
  parser.add_argument("--vocab", type=int, default=2048)
  parser.add_argument("--width", type=int, default=192)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--heads", type=int, default=8, help="two a KV group")
  parser.add_argument("--context", type=int, default=256)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=2_500_000)
  parser.add_argument("--learning_rate", type=float, default=2e-3)
  parser.add_argument("--seed", type=int, default=0)
  return parser.parse_args()


def recipe_of(flags: argparse.Namespace) -> tiny_model.Recipe:
  """LLaMA's proportions: an MLP of 8/3 the width."""
  return tiny_model.Recipe(
    V=flags.vocab,
    D=flags.width,
    L=flags.layers,
    K=flags.heads // 2,
    G=2,
    H=flags.width // flags.heads,
    F=8 * flags.width // 3,
    context=flags.context,
    batch=flags.batch,
    steps=flags.tokens // (flags.batch * flags.context),
    learning_rate=flags.learning_rate,
    min_learning_rate=flags.learning_rate / 20,
    seed=flags.seed,
  )


def split(paths: str, out: Path) -> tuple[str, str]:
  """Writes train.txt and heldout.txt; returns their documents as texts."""
  parts = {"train": [], "heldout": []}
  for source in sources.parse_sources(
    ",".join(f"text:{path}" for path in paths.split(",")), "text"
  ):
    for document in sources.read_documents(source):
      heldout = zlib.crc32(document.content.encode()) % 10 == 0
      parts["heldout" if heldout else "train"].append(document.content)
  for name, documents in parts.items():
    text = f"\n{sources.SEPARATOR}\n".join(documents)
    (out / f"{name}.txt").write_text(text, encoding="utf-8")
  return "\n".join(parts["train"]), "\n".join(parts["heldout"])


def main() -> None:
  flags = arguments()
  out = Path(flags.out)
  out.mkdir(parents=True)
  train, heldout = split(flags.text, out)
  recipe = recipe_of(flags)
  tokenizer = tiny_model.train_tokenizer(out / "tokenizer", recipe.V, train)
  config, params = tiny_model.fit(
    recipe, tokenizer, print, f"text:{out / 'train.txt'}"
  )
  ids = packing.heldout_tokens(
    heldout, tokenizer, recipe.V, "the held-out text"
  )
  found = perplexity.perplexity(config, params, ids, recipe.context, 8)
  print(f"held-out perplexity {found[0]:.2f} on {found[2]:,} tokens")
  save.save(config, params, out / "model", source=out / "tokenizer")


if __name__ == "__main__":
  main()
