"""Model card and SHA256SUMS of an exported directory."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.formats import markdown
from adapt_pruner_jax.formats.hf import layers
from adapt_pruner_jax.formats.hf.load import HUB_ID
from adapt_pruner_jax.models.model_config import ModelConfig, count_params
from adapt_pruner_jax.storage import digest
from adapt_pruner_jax.storage.confinement import confined

SUMS = "SHA256SUMS"
CARD = "README.md"


def write(
  folder: Path,
  config: ModelConfig,
  written: ModelConfig,
  source: Path | None,
  facts: dict[str, Any],
  notes: list[str],
  sums: Mapping[str, str],
) -> None:
  """Writes README.md and, last of all files, SHA256SUMS.

  Args:
    config: the model.
    written: what the directory holds, where that is padded.
    source: the parent's directory, for its licence.
    facts: as in a run's summary.json; what is absent is left out.
    notes: lines to repeat, on padding or a missing tokenizer.
    sums: SHA-256 of files, by name, where it is known.
  """
  name = str(facts.get("model") or (source and source.name) or "a model")
  on_hub = re.fullmatch(HUB_ID, name) and not Path(name).exists()
  name = name if on_hub else Path(name).name
  base = name.partition("@")[0]
  head = _licence(source)
  head += ["library_name: transformers", "tags:", "- pruned"]
  head += [f"base_model: {base}"] if on_hub else []
  parts = [
    "\n".join(["---", *head, "---"]),
    f"# {name}, pruned",
    _summary(name, config, facts),
    *notes,
    "## Layers",
    _layers(config, facts),
    "## How to open it",
    _usage(written),
    "`sha256sum -c SHA256SUMS` checks the files.",
  ]
  (folder / CARD).write_text("\n\n".join(parts) + "\n", "utf-8")
  write_sums(folder, sums)


def _summary(name: str, config: ModelConfig, facts: dict[str, Any]) -> str:
  """What the model is, as a table."""
  after = count_params(config)
  rows = [("parent", name), ("family", config.family)]
  if method := facts.get("method"):
    rows.append(("method", method))
  if before := facts.get("params_before"):
    share = f"{after / before - 1:+.1%}"
    rows.append(("parameters", f"{before:,} → {after:,} ({share})"))
  else:
    rows.append(("parameters", f"{after:,}"))
  before, now = (facts.get(f"perplexity_{x}") for x in ("before", "after"))
  if before is not None and now is not None:
    rows.append(("perplexity", f"{float(before):.3f} → {float(now):.3f}"))
  if tokens := facts.get("train_tokens"):
    rows.append(("recovery training", f"{tokens:,} tokens"))
  versions = facts.get("versions") or {"jax": jax.__version__}
  made = ", ".join(f"{n} {v}" for n, v in versions.items() if v)
  rows.append(("made with", f"adapt_pruner_jax; {made}"))
  return markdown.table(("", ""), rows)


def _layers(config: ModelConfig, facts: dict[str, Any]) -> str:
  kept = list(zip(config.kv_groups, config.ffn_widths, strict=True))
  heads = config.heads()
  rows = [(i, heads[i], k, f) for i, (k, f) in enumerate(kept)]
  columns = ("layer", "heads", "KV heads", "MLP width")
  old = [facts.get("kv_heads_before"), facts.get("ffn_before")]
  if all(x and len(x) == config.num_layers for x in old):
    heads_before = dataclasses.replace(config, kv_groups=tuple(old[0])).heads()
    rows = [
      (
        i,
        f"{heads_before[i]} → {heads}",
        f"{k0} → {k}",
        f"{f0} → {f}",
      )
      for (i, heads, k, f), k0, f0 in zip(rows, *old, strict=True)
    ]
  return markdown.table(columns, rows)


def _usage(config: ModelConfig) -> str:
  """How each runtime opens the directory."""
  stock = layers.is_stock(config)
  option = "" if stock else ", trust_remote_code=True"
  flag = "" if stock else " --trust-remote-code"
  eager = ""
  if config.attn_softcap:
    eager = (
      '\n\nOn Transformers 4 add `attn_implementation="eager"`: its other '
      "implementations leave the soft cap of the attention scores out."
    )
  text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{option})
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

vLLM: `vllm serve PATH{flag}`"""
  if stock:
    text += (
      "\n\nThis is a plain model of its family: SGLang, MaxText, MLX and "
      "llama.cpp's converter open it as they open its parent."
    )
  else:
    text += (
      ", which runs it through its Transformers backend\n\n"
      "Layers differ in size, which config.json says in `per_layer_config`. "
      "The Python file beside it makes each layer of Transformers' model to "
      "its size. For runtimes "
      "that load no code: `adapt-pruner convert --model=PATH --out=OTHER "
      "--format=hf_uniform` (zero-padded, the same function) or "
      "`--format=gguf` (llama.cpp)."
    )
  return text + eager


def _licence(source: Path | None) -> list[str]:
  """The licence lines of the parent's model card."""
  if source is None:
    return []
  try:
    text = confined(source / CARD, source).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return []
  found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
  lines = found[1].splitlines() if found else []
  return [x for x in lines if re.match(r"licen[sc]e(_name|_link)?:\s*\S", x)]


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
  """SHA256SUMS of all files, in the format of `sha256sum`."""
  known = known or {}
  lines = [
    f"{known.get(name) or digest.of_file(folder / name)}  {name}\n"
    for name in sorted(_files(folder))
  ]
  (folder / SUMS).write_text("".join(lines))


def verify(path: Path, only: str = "") -> None:
  """Checks a directory, or one file in it, against its SHA256SUMS.

  Raises:
    UserError: a file is missing, changed, or not listed.
  """
  if not path.exists():
    raise UserError(f"{path} does not exist")
  try:
    lines = (path / SUMS).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path} has no {SUMS} that can be read: it cannot be checked"
    ) from error
  expected = {}
  for line in lines:
    known, _, name = line.partition("  ")
    if len(known) != 64 or not name or ".." in name or name.startswith("/"):
      raise UserError(f"{path / SUMS} is damaged: {line[:80]!r}")
    expected[name] = known
  names = _files(path)
  for name in [only] if only else sorted(expected.keys() | names):
    if name not in names:
      raise UserError(f"{path / name} is missing")
    if name not in expected:
      raise UserError(f"{path / name} is not in {SUMS}")
    if digest.of_file(path / name) != expected[name]:
      raise UserError(f"{path / name} was changed after it was written")


def _files(folder: Path) -> set[str]:
  """Names of all files, but for SHA256SUMS and what is hidden (.git)."""
  found = [f.relative_to(folder) for f in folder.rglob("*") if f.is_file()]
  return {
    file.as_posix()
    for file in found
    if str(file) != SUMS and not any(p.startswith(".") for p in file.parts)
  }
